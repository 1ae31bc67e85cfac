"""The evaluation loss: against the model and the formula, and what it must leave alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file

from compiler.data.counts import bucket_rows
from compiler.data.manifest import Manifest
from compiler.keeping import LOSS
from compiler.plan import Checkpoints, Evaluation, HeldOut, Plan
from runtime import checkpoints, evaluate, rng
from runtime.data.cache import Cache
from runtime.data.fill import prompt_embeddings
from runtime.data.leaks import NothingToJudge
from runtime.data.located import sample_keys
from runtime.execute import execute
from runtime.families import family_of
from runtime.step import forward_losses
from runtime.track.background import Background
from runtime.track.base import numbers
from tests.runtime.plans import LORA, draw_data, tiny_plan
from tests.runtime.run_plan import Interrupting
from tests.runtime.without_float64 import Without

NEVER = ("", 0, signal.SIGTERM)
SIZES = ((70, 70),) * 5 + ((140, 70),)
QUANTILES = (0.25, 0.8)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture
def make(tiny_sana: Path, tmp_path: Path) -> Any:
    """A maker of plans of four trained and two held-out pictures, of different sizes."""
    draw_data(tmp_path / "dog", SIZES)

    def made(name: str = "run", judged: bool = True, **changes: Any) -> tuple[Plan, Manifest]:
        settings = {"steps": 5, "every": 2, "adapter": evolve(LORA, dropout=0.2), **changes}
        plan, whole = tiny_plan("sana", tiny_sana, tmp_path / "dog", tmp_path / name, **settings)
        samples = list(whole)
        manifest = Manifest(whole.folders, samples[:4], samples[4:] if judged else None)
        plan = evolve(
            plan,
            buckets=bucket_rows(manifest, plan.sources, [2]),
            manifest=manifest.digest,
            steps=evolve(
                plan.steps, per_epoch=2, epochs=3, batches_per_epoch=2, samples_per_epoch=4
            ),
        )
        return (evolve(plan, evaluation=_evaluation(manifest)) if judged else plan), manifest

    return made


def _evaluation(manifest: Manifest) -> Evaluation:
    assert manifest.held_out is not None
    return Evaluation(
        every=2,
        timesteps=QUANTILES,
        weights="average",
        manifest=manifest.held_out.digest,
        groups=tuple(
            HeldOut(
                source="dog",
                width=members.width,
                height=members.height,
                images=len(members.samples),
                batch_size=2,
            )
            for members in manifest.held_out.buckets
        ),
    )


def _rows(plan: Plan) -> list[dict[str, Any]]:
    lines = (Path(plan.run_folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def _losses(plan: Plan) -> dict[int, float]:
    found = [row for row in _rows(plan) if "evaluation/loss" in row]
    assert len({row["step"] for row in found}) == len(found)
    return {row["step"]: row["evaluation/loss"] for row in found}


def _weights(plan: Plan) -> dict[str, torch.Tensor]:
    saved = checkpoints.latest(Path(plan.run_folder) / "checkpoints")
    assert saved is not None
    snapshot = checkpoints.load(saved)
    return {**snapshot.weights, **{f"ema.{k}": v for k, v in (snapshot.ema or {}).items()}}


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def test_the_first_loss_is_the_base_s(make: Any) -> None:
    """An adapter that is not trained yet adds nothing: the mean over pictures and levels of the
    velocity's squared error, by Diffusers' own model, noising and target in float64."""
    plan, manifest = make()
    execute(plan, manifest, Interrupting(*NEVER))
    family, cache, held = family_of("sana"), Cache(Path(plan.cache_folder)), manifest.held_out
    model = SanaTransformer2DModel.from_pretrained(Path(plan.model.base) / "transformer").eval()
    scale = json.loads(plan.model.configs["vae"])["scaling_factor"]
    errors = []
    for row, key in enumerate(sample_keys(plan, held, family, cache)):
        latents = cache.get(key)["mean"].double() * scale
        (embedding,) = prompt_embeddings(plan, family, cache, held.captions_of(row)).values()
        text = family.collate_text([embedding])
        for quantile in QUANTILES:
            # logit-normal(0, 1) at 1 - q of u, on the table of 1000, shifted by 3
            normal = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - quantile))
            s = (1000 - int(1000 * torch.sigmoid(normal).item())) / 1000
            sigma = 3 * s / (1 + 2 * s)
            place = (_number(held.name(row)), _number(repr(quantile)))
            noise = rng.normal(tuple(latents.shape), plan.seed, "evaluation-noise", *place)
            noisy = (1 - sigma) * latents + sigma * noise.double()
            with torch.no_grad():
                found = model(
                    hidden_states=noisy[None].float(),
                    encoder_hidden_states=text["encoder_hidden_states"],
                    encoder_attention_mask=text["encoder_attention_mask"],
                    timestep=torch.tensor([1000 * sigma]),
                ).sample[0]
            errors.append(((found.double() - (noise.double() - latents)) ** 2).mean().item())
    assert len(errors) == 4
    assert _losses(plan)[0] == pytest.approx(np.mean(errors), rel=1e-5)


def test_measured_when_due_and_weights_stay_the_same(make: Any) -> None:
    """Weights, averages and training metrics are equal bit for bit with and without."""
    plan, manifest = make("with")
    other, without = make("without", judged=False)
    assert plan.manifest == other.manifest
    execute(plan, manifest, Interrupting(*NEVER))
    execute(other, without, Interrupting(*NEVER))
    assert list(_losses(plan)) == [0, 2, 4, 5]
    assert len(set(_losses(plan).values())) == 3  # the average has not moved after step 4
    ours, theirs = _weights(plan), _weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [row for row in _rows(plan) if "loss" in row] == _rows(other)


def test_resumed_it_is_neither_doubled_nor_missing(make: Any) -> None:
    whole, manifest = make("whole")
    parts, _ = make("parts")
    execute(whole, manifest, Interrupting(*NEVER))
    # stopped by step 2, where the loss is due: it is measured when the run goes on
    assert execute(parts, manifest, Interrupting("step", 2, signal.SIGTERM)).status == "stopped"
    assert list(_losses(parts)) == [0]
    assert execute(parts, manifest, Interrupting(*NEVER)).status == "finished"
    assert _losses(parts) == _losses(whole)


def test_means_are_taken_where_float64_is(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def losses(*arguments: Any) -> torch.Tensor:
        seen.append(forward_losses(*arguments))
        return seen[-1].as_subclass(Without)

    monkeypatch.setattr(evaluate, "forward_losses", losses)
    plan, manifest = make(steps=1, every=1)
    execute(plan, manifest, Interrupting(*NEVER))
    first = torch.cat(seen[: len(seen) // 2]).double().mean().item()
    assert _losses(plan)[0] == pytest.approx(first, rel=1e-12)


@pytest.mark.parametrize("at", [5, None])
def test_a_loss_that_is_no_number_is_said_and_left_out(
    make: Any, monkeypatch: pytest.MonkeyPatch, at: int | None
) -> None:
    """Of one picture after step 5, or of it whenever it is measured."""
    plan, manifest = make(checkpoints=Checkpoints(every=2, keep=0, best=LOSS))
    bad, measured, seen = manifest.held_out.name(1), evaluate.Judge.judge, []

    def judge(self: Any, model: Any, ema: Any, step: int, *rest: Any, **named: Any) -> None:
        seen.append(step)
        measured(self, model, ema, step, *rest, **named)

    def losses(*arguments: Any) -> torch.Tensor:
        found = forward_losses(*arguments)
        wide = arguments[2].latents.shape[-1] > arguments[2].latents.shape[-2]
        return found * torch.nan if wide and at in (seen[-1], None) else found

    monkeypatch.setattr(evaluate.Judge, "judge", judge)
    monkeypatch.setattr(evaluate, "forward_losses", losses)
    events = Interrupting(*NEVER)
    assert execute(plan, manifest, events).status == "finished"
    assert list(_losses(plan)) == ([0, 2, 4] if at else [])
    said = [text for text in events.texts if "no finite number" in text]
    steps = [5] if at else [0, 2, 4, 5]
    assert said == [
        f"the evaluation loss after step {step} is no finite number for {bad}; it is left out"
        for step in steps
    ]


def test_the_average_is_judged_if_the_plan_says_so(make: Any) -> None:
    plan, manifest = make("average")
    trained, _ = make("trained")
    trained = evolve(trained, evaluation=evolve(trained.evaluation, weights="trained"))
    execute(plan, manifest, Interrupting(*NEVER))
    execute(trained, manifest, Interrupting(*NEVER))
    ours, theirs = _losses(plan), _losses(trained)
    assert ours[0] == theirs[0]  # the average begins at the weights
    assert ours[5] != theirs[5]
    assert all(torch.equal(v, _weights(trained)[k]) for k, v in _weights(plan).items())


def test_copies_of_what_is_held_out_are_named(make: Any, tmp_path: Path) -> None:
    """A plan knows pictures by where they lie; what they hold is read when they are encoded."""
    for copies, words in (
        ((), None),
        (("02",), "1 held-out image is trained too, under another name"),
        (("00", "02"), "1 held-out image is trained too, under another name"),
    ):
        for number in copies:  # the last but one of `make` is the first that is held out
            shutil.copy(tmp_path / "dog/04.png", tmp_path / f"dog/{number}.png")
        plan, manifest = make("-".join(("run", *copies)))
        events = Interrupting(*NEVER)
        execute(plan, manifest, events)
        said = [text for text in events.texts if "held-out" in text]
        assert len(said) == (words is not None)
        assert words is None or (words in said[0] and "dog/04.png is dog/02.png" in said[0])


def test_copies_are_not_judged(make: Any, tmp_path: Path) -> None:
    """The loss is that of the other picture alone, of the two that are held out."""
    plan, manifest = make("plain")
    execute(plan, manifest, Interrupting(*NEVER))
    shutil.copy(tmp_path / "dog/04.png", tmp_path / "dog/02.png")
    copied, manifest = make("copied")
    execute(copied, manifest, Interrupting(*NEVER))
    samples = list(manifest)
    only = Manifest(manifest.folders, samples, list(manifest.held_out)[1:])
    alone = evolve(copied, run_folder=str(tmp_path / "alone"), evaluation=_evaluation(only))
    execute(alone, only, Interrupting(*NEVER))
    assert _losses(copied) == _losses(alone)
    assert _losses(copied)[0] != _losses(plan)[0]
    for number in ("00", "01", "03"):
        shutil.copy(tmp_path / "dog/05.png", tmp_path / f"dog/{number}.png")
    every, manifest = make("every")
    with pytest.raises(NothingToJudge, match="each of the 2 held-out images is trained too"):
        execute(every, manifest, Interrupting(*NEVER))


def test_a_source_that_only_judges(make: Any, tmp_path: Path) -> None:
    """It is encoded and measured, and the training is that without it, bit for bit."""
    plain, whole = make("plain", judged=False)
    execute(plain, whole, Interrupting(*NEVER))
    plan, manifest = make("own")
    (trained,), (folder,) = plan.sources, manifest.folders
    judged = [evolve(sample, source=1) for sample in manifest.held_out]
    own = Manifest([folder, evolve(folder, id="set")], list(manifest), judged)
    groups = tuple(evolve(group, source="set") for group in plan.evaluation.groups)
    plan = evolve(
        plan,
        sources=(trained, evolve(trained, id="set", images=0, held_out=2)),
        manifest=own.digest,
        evaluation=evolve(plan.evaluation, manifest=own.held_out.digest, groups=groups),
    )
    execute(plan, own, Interrupting(*NEVER))
    assert list(_losses(plan)) == [0, 2, 4, 5]
    ours, theirs = _weights(plan), _weights(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_trackers_are_told_under_names_of_their_own() -> None:
    found = numbers({"loss": 1.0, "evaluation/loss": 2.0, "evaluation/loss/dog": 3.0})
    assert found == {"train/loss": 1.0, "evaluation/loss": 2.0, "evaluation/loss/dog": 3.0}


def test_a_service_is_told_of_the_untrained_model_too(tmp_path: Path) -> None:
    """Step 0 is told once, and not again by a run that goes on."""

    class Service:
        def __init__(self) -> None:
            self.told: list[int] = []

        def metrics(self, step: int, values: Any) -> None:
            self.told.append(step)

        def close(self) -> None:
            pass

    service, state = Service(), tmp_path / "service.json"
    for _ in range(2):
        tracker = Background("service", service, Interrupting(*NEVER), state)  # type: ignore[arg-type]
        tracker.metrics(0, {"evaluation/loss": 1.0})
        tracker.metrics(1, {"loss": 1.0})
        tracker.close()
    assert service.told == [0, 1]


def test_the_best_checkpoint_stays_and_is_the_result(make: Any) -> None:
    """Kept although newer ones push it out; with the average, that is judged and exported."""
    rules = Checkpoints(every=1, keep=1, best="evaluation/loss", result="best")
    plan, manifest = make(steps=8, lr=0.3, checkpoints=rules)  # so high that training gets worse
    plan = evolve(plan, evaluation=evolve(plan.evaluation, every=2))
    events = Interrupting(*NEVER)
    outcome = execute(plan, manifest, events)
    folder = Path(plan.run_folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["evaluation/loss"] for row in rows if "evaluation/loss" in row}
    assert sorted(losses) == [0, 2, 4, 6, 8]
    best = min((2, 4, 6, 8), key=lambda step: losses[step])
    assert best != 8, losses
    found = checkpoints.complete(folder / "checkpoints")
    assert [checkpoints.step_of(each) for each in found] == [best, 8]
    assert f"the result is that of step {best}, the best by evaluation/loss" in events.texts
    average = checkpoints.load(found[0]).ema
    assert average is not None and outcome.result is not None
    (file,) = outcome.result.glob("*.safetensors")
    exported = load_file(file)
    assert len(exported) == len(average)
    for tensor in exported.values():
        assert any(torch.equal(tensor, other) for other in average.values())
