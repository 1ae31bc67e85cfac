"""Replays a recorded run of a reference script through our own step, and compares.

    python -m tests.runtime.replay TRACE PIPELINE [--set sampling=uniform shift=3.0 ...]

A trace is a dict: `init` and `final` are lists with one {parameter name: tensor}; `steps[k]` holds,
per micro-batch, `u`, `randn` (the noise), `latents` (before shift and scale), `fwd` (what the
transformer was given and gave), the update's `grad_norm`, and `logged` (the last micro-batch's
loss). Parameters without `lora_` in their names are a full fine-tune.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from compiler.families import FAMILIES
from compiler.plan import Adapter, Layout, Model, Objective, Optimizer, Precision
from runtime.batch import Batch
from runtime.build import Built, build, load_state
from runtime.families import family_of
from runtime.families.base import Family
from runtime.noise_levels import sigmas_from_uniform
from runtime.objective import add_noise, loss_weights
from runtime.optimizers import make_optimizer, set_lr
from runtime.step import gradient_norm, micro_step, update
from tests.runtime.tiny import tiny_model

FP32 = Precision(compute="float32", weights="float32", trained="float32", cache="float32")
OBJECTIVE = Objective(
    prediction="flow",
    sampling="logit-normal",
    logit_mean=0.0,
    logit_std=1.0,
    mode_scale=1.29,
    shift=3.0,
    loss="mse",
    weighting="none",
)
TEXT = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")


@frozen(kw_only=True)
class Settings:
    """How the recorded run was set. `extra_weighting` multiplies the objective's own weights, as
    the SD3 scripts multiply a weighting with their preconditioning."""

    objective: Objective = OBJECTIVE
    lr: float = 1e-3
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    extra_weighting: str = "none"
    alpha: float | None = None  # None: the rank
    accumulate: int = 1  # micro-batches in an update, of which one record may hold several
    fused: bool = False  # the scripts' AdamW is not


@frozen(kw_only=True)
class Compared:
    """Ours and theirs at one update; the losses are those of the last micro-batch."""

    loss: float
    loss_theirs: float
    grad_norm: float
    grad_norm_theirs: float
    input_difference: float  # largest, of what the transformer is given
    output_difference: float  # largest, of what it gives


@frozen(kw_only=True)
class Replayed:
    """What a replay found; `weights` is {name: (ours, theirs)} at the end."""

    steps: tuple[Compared, ...]
    weights: dict[str, tuple[Tensor, Tensor]]

    def worst_weight(self, atol: float = 0.0) -> float:
        """The largest relative difference of any entry that differs by more than `atol`."""
        return max(_relative(ours, theirs, atol) for ours, theirs in self.weights.values())


def _relative(ours: Tensor, theirs: Tensor, atol: float) -> float:
    difference = (ours - theirs).abs()
    share = difference / theirs.abs().clamp(min=torch.finfo(torch.float32).tiny)
    return float(torch.where(difference > atol, share, 0.0).max())


def settings_of_script(arguments: list[str], steps: list[Any]) -> Settings:
    """Settings from a recorded command line of Diffusers' DreamBooth scripts."""
    given = _arguments(arguments)
    sd3 = any("pooled_projections" in f["kwargs"] for s in steps[:1] for f in s["fwd"])
    scheme = given.get("--weighting_scheme", "logit_normal" if sd3 else "none")
    conditioned = sd3 and given.get("--precondition_outputs", "1") != "0"
    weighting = {"sigma_sqrt": "sigma-sqrt", "cosmap": "cosmap"}.get(scheme, "none")
    objective = evolve(
        OBJECTIVE,
        sampling={"logit_normal": "logit-normal", "mode": "mode"}.get(scheme, "uniform"),
        logit_mean=float(given.get("--logit_mean", 0.0)),
        logit_std=float(given.get("--logit_std", 1.0)),
        mode_scale=float(given.get("--mode_scale", 1.29)),
        weighting="diffusers-compat" if conditioned else weighting,
    )
    accumulate = int(given.get("--gradient_accumulation_steps", 1))
    return Settings(
        objective=objective,
        lr=float(given.get("--learning_rate", 1e-4)),
        weight_decay=float(given.get("--adam_weight_decay", 1e-4)),
        max_grad_norm=float(given.get("--max_grad_norm", 1.0)),
        extra_weighting=weighting if conditioned else "none",
        alpha=None if sd3 else float(given.get("--lora_alpha", 4)),
        accumulate=accumulate,
    )


def _arguments(words: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            given[name] = value
        elif given:
            given[list(given)[-1]] = word
    return given


def load_trace(path: Path) -> dict[str, Any]:
    """A recorded run."""
    trace: dict[str, Any] = torch.load(path, weights_only=True)
    return trace


def replay(trace: Mapping[str, Any], pipeline: Path, settings: Settings) -> Replayed:
    """Run the recorded inputs through our model, step and optimizer."""
    model = tiny_model(_family_of(pipeline), pipeline)
    family = family_of(model.family)
    built = prepare(model, family, trace["init"][0], settings)
    optimizer = make_optimizer(adamw(settings), built.trainable.items(), torch.device("cpu"))
    steps = []
    for window in windows(trace["steps"], settings.accumulate):
        set_lr(optimizer, window[-1]["logged"].get("lr", settings.lr))
        steps.append(one_update(model, family, built, optimizer, window, settings))
    theirs = trace["final"][0]
    return Replayed(
        steps=tuple(steps),
        weights={name: (built.trainable[name].detach(), value) for name, value in theirs.items()},
    )


def adamw(settings: Settings) -> Optimizer:
    """The scripts' AdamW."""
    return Optimizer(
        name="adamw",
        lr=settings.lr,
        arguments={"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": settings.weight_decay},
        fused=settings.fused,
    )


def _family_of(pipeline: Path) -> str:
    index = json.loads((pipeline / "model_index.json").read_text())
    return next(c.name for c in FAMILIES.values() if c.pipeline == index["_class_name"])


def prepare(model: Model, family: Family, init: Mapping[str, Tensor], settings: Settings) -> Built:
    """Our model with the recorded start; an adapter where the record is of one."""
    adapter = None
    if any(".lora_A." in name for name in init):
        rank = next(v.shape[0] for name, v in init.items() if ".lora_A." in name)
        modules = sorted({name.split(".lora_")[0] for name in init})
        adapter = Adapter(
            kind="lora",
            rank=rank,
            alpha=float(rank) if settings.alpha is None else settings.alpha,
            dropout=0.0,
            init="gaussian",
            targets=tuple(re.escape(name) for name in modules),
        )
    device = torch.device("cpu")
    built = build(model, adapter, FP32, Layout(), family, device, empty=False, seed=0)
    load_state(built, init)
    return built


def windows(steps: list[Any], accumulate: int) -> list[list[Any]]:
    """Records grouped by update.

    A record may be an update with all its micro-batches, or one micro-batch of several: then only
    the last one of an update has a gradient norm.
    """
    grouped: list[list[Any]] = [[]]
    for record in steps:
        grouped[-1].append(record)
        if record["grad_norm"]:
            grouped.append([])
    assert not grouped[-1], "a trace ends with an update"
    return grouped[:-1]


def one_update(
    model: Model,
    family: Family,
    built: Built,
    optimizer: torch.optim.Optimizer,
    window: list[Any],
    settings: Settings,
) -> Compared:
    """One update over the micro-batches of `window`."""
    batches, forwards = [], []
    for record in window:
        for index, forward in enumerate(record["fwd"]):
            batches.append(batch_of(model, family, record, index, settings))
            forwards.append(forward)
    differences = [difference(family, built, b, f) for b, f in zip(batches, forwards, strict=True)]
    # The scripts divide by the number of micro-batches that a full window has, in the last one too.
    count = max(settings.accumulate, len(batches))
    for batch in batches:
        size = batch.latents.shape[0]
        losses = micro_step(family, built.model, batch, settings.objective, FP32, size * count)
    norm = gradient_norm(built.trainable.values())
    update(optimizer, norm, settings.max_grad_norm)
    return Compared(
        loss=float(losses.mean()),
        loss_theirs=float(window[-1]["logged"]["loss"]),
        grad_norm=float(norm),
        grad_norm_theirs=float(window[-1]["grad_norm"][-1]),
        input_difference=max(given for given, _ in differences),
        output_difference=max(gave for _, gave in differences),
    )


def batch_of(
    model: Model, family: Family, record: Mapping[str, Any], index: int, settings: Settings
) -> Batch:
    """A recorded micro-batch as ours. Prompts encoded once are repeated for the whole batch."""
    given = record["fwd"][index]["kwargs"]
    latents = family.latents(
        {"mean": record["latents"][index]}, json.loads(model.configs["vae"]), None
    )
    size = latents.shape[0]
    sigmas = sigmas_from_uniform(record["u"][index], settings.objective)
    weighting = evolve(settings.objective, weighting=settings.extra_weighting)  # type: ignore[arg-type]
    return Batch(
        latents=latents,
        noise=record["randn"][index],
        sigmas=sigmas,
        text={k: given[k] for k in TEXT if k in given},
        weights=None
        if settings.extra_weighting == "none"
        else loss_weights(sigmas, weighting)[:size],
    )


@torch.no_grad()
def difference(
    family: Family, built: Built, batch: Batch, forward: Mapping[str, Any]
) -> tuple[float, float]:
    """Largest differences from what the recorded transformer was given, and from what it gave."""
    noisy = add_noise(batch.latents, batch.noise, batch.sigmas)
    given = (noisy - forward["kwargs"]["hidden_states"]).abs().max()
    time = (batch.sigmas * 1000 - forward["kwargs"]["timestep"]).abs().max()
    gave = family.predict(built.model, noisy, batch.sigmas, batch.text) - forward["out"]
    return float(torch.maximum(given, time)), float(gave.abs().max())


def main() -> None:
    """Print, per update, our loss and gradient norm and how far they are from the record's."""
    parser = argparse.ArgumentParser(description="Replay a recorded training run.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="changes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trace = load_trace(arguments.trace)
    settings = settings_of_script(trace.get("settings", []), trace["steps"])
    for change in arguments.changes:
        settings = changed(settings, *change.split("=", 1))
    print(settings)
    replayed = replay(trace, arguments.pipeline, settings)
    for number, step in enumerate(replayed.steps, 1):
        print(
            f"{number:3d}  loss {step.loss:.6f} ({step.loss / step.loss_theirs - 1:+.1e})  "
            f"grad norm {step.grad_norm:.6f} ({step.grad_norm / step.grad_norm_theirs - 1:+.1e})  "
            f"input {step.input_difference:.1e}  output {step.output_difference:.1e}"
        )
    print(f"final weights: largest relative difference {replayed.worst_weight():.1e}")


def changed(settings: Settings, key: str, value: str) -> Settings:
    """`settings` with one field of theirs, or of their objective, set from text."""
    owner = settings if hasattr(settings, key) else settings.objective
    old = getattr(owner, key)
    new = value if isinstance(old, str) else int(value) if isinstance(old, int) else float(value)
    return (
        evolve(settings, **{key: new})
        if owner is settings
        else evolve(settings, objective=evolve(settings.objective, **{key: new}))
    )


if __name__ == "__main__":
    main()
