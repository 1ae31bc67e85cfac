"""Pictures by a run's weights: what `tuner sample` draws, equal to the run's own validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import evolve
from safetensors import SafetensorError
from torch import nn

from compiler.data.prompts import Prompt
from compiler.plan import Device, Layout, Plan, Sprint
from runtime import files
from runtime.build import build, load_state, without_starts
from runtime.data.encoders import Encoders
from runtime.device import device_of
from runtime.errors import RunFailed
from runtime.export.pictures import Drawing, Wanted
from runtime.export.request import Weights
from runtime.export.weights import trained_weights
from runtime.families import family_of, sana_sprint
from runtime.families.base import Family, TextEmbedding
from runtime.families.common import DTYPES, component_of, sample
from runtime.methods.student import OF_LOSS, make_student
from runtime.out_of_memory import is_out_of_memory, shortage
from runtime.refined import picture_part
from runtime.text_training import TrainedText, tokenizers

Told = Callable[[Path], None]
Words = dict[Prompt, TextEmbedding]


def draw(weights: Weights, wanted: Wanted, told: Told = lambda path: None) -> list[Path]:
    """Draw the pictures that `wanted` lists; returns their files. `told` hears of each.

    The encoders are on the device one after the other, before the model is loaded. Raises
    MachineUnfit if the device can't be used, OutOfMemory, and RunFailed.
    """
    plan = _on(weights.plan, wanted.device)
    family = family_of(plan.model.family) if plan.sprint is None else sana_sprint.FAMILY
    with _failing(torch.device(plan.device), wanted):
        device = device_of(plan)
        torch.set_num_threads(plan.threads)  # sums are split by threads
        words = _embedded(plan, family_of(plan.model.family), wanted)
        model, text = _model(plan, family, evolve(weights, plan=plan), device)
        parts = {plan.model.trained_component: model, **_parts(plan, family, device)}
        if text is not None:
            words = _renewed(plan, family, text, words)
        for drawing in wanted.drawings:
            _draw(plan, family, parts, words, wanted, drawing)
            told(drawing.path)
    return [drawing.path for drawing in wanted.drawings]


@contextmanager
def _failing(device: torch.device, wanted: Wanted) -> Iterator[None]:
    """Inside, what the machine lacks is turned into errors that say so."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if is_out_of_memory(error):
            doing = f"drawing pictures of {wanted.width}x{wanted.height} pixels"
            help = "draw smaller ones with --size"
            help += "" if device.type == "cpu" else ", or slowly with --device cpu"
            raise shortage(doing, error, device, help, "validate") from error
        if isinstance(error, OSError | SafetensorError):  # no base there, a disk that is full
            raise RunFailed(str(error)) from error
        raise


def _on(plan: Plan, device: Device | Literal[""]) -> Plan:
    """The plan on `device`; where that is another one, with nothing waiting elsewhere."""
    if not device or device == plan.device:
        return plan
    memory = evolve(plan.memory, layout=Layout())
    return evolve(plan, device=device, memory=memory)


def _embedded(plan: Plan, family: Family, wanted: Wanted) -> Words:
    """Embeddings of all prompts, rounded as the run's cache rounds them."""
    prompts = [*(Prompt(drawing.prompt, False) for drawing in wanted.drawings)]
    prompts = list(dict.fromkeys([*prompts, Prompt(wanted.negative, True)]))
    encoders = Encoders(plan, family, lambda name: nullcontext(), waiting=False)
    try:
        found = encoders(prompts, lambda done: None)
    finally:
        encoders.free()
    dtype = DTYPES[plan.precision.cache]
    return {
        prompt: {k: v.to(dtype) if v.is_floating_point() else v for k, v in embedding.items()}
        for prompt, embedding in zip(prompts, found, strict=True)
    }


def _renewed(plan: Plan, family: Family, text: TrainedText, words: Words) -> Words:
    """The embeddings by the encoders that were trained, of those by the base's."""
    made = tokenizers(plan, family)
    assert made is not None, "the plan trains encoders"
    return {
        prompt: text.renewed(made.batch([prompt.text], [prompt.negative and not prompt.text]), old)
        for prompt, old in words.items()
    }


def _parts(plan: Plan, family: Family, device: torch.device) -> dict[str, Any]:
    """The VAE and the scheduler."""
    vae = DTYPES[component_of(plan.model, "vae").dtype]
    sampler = (
        family.load(plan.model, "scheduler", torch.float32, torch.device("cpu"))
        if plan.sprint is None
        else sana_sprint.scheduler(plan.sprint)
    )
    return {
        "vae": family.load(plan.model, "vae", vae, device),
        "scheduler": sampler,
    }


def _student(
    plan: Plan, sprint: Sprint, family: Family, weights: Weights, device: torch.device
) -> nn.Module:
    """What was distilled; without what only its training reads."""
    name, dtype = plan.model.trained_component, DTYPES[plan.precision.compute]
    student: nn.Module = family.load(plan.model, name, dtype, device)
    make_student(student, sprint, plan.seed)
    trained = trained_weights(weights)
    found = student.load_state_dict({k: lazy.read() for k, lazy in trained.items()}, strict=False)
    if found.unexpected_keys or any(not key.startswith(OF_LOSS) for key in found.missing_keys):
        raise RunFailed("these are weights of another model")
    return student


def _model(
    plan: Plan, family: Family, weights: Weights, device: torch.device
) -> tuple[nn.Module, TrainedText | None]:
    """The trained component with its weights, and the text encoders that were trained with it."""
    if plan.sprint is not None:
        return _student(plan, plan.sprint, family, weights, device), None
    precision = plan.precision
    if precision.trained == "float32":  # masters round to the same copies: none are needed
        precision = evolve(precision, trained=precision.compute)
    plan = without_starts(plan)
    built = build(
        plan.model,
        plan.adapter,
        precision,
        plan.memory.layout,
        family,
        device,
        empty=False,
        seed=plan.seed,
        text_training=plan.text_training,
        embeddings=plan.embeddings,
    )
    trained = trained_weights(weights)
    found = {name: trained[name].read() for name in built.trainable if name in trained}
    try:
        load_state(built, found)
    except ValueError as error:
        raise RunFailed(str(error)) from error
    return built.model, built.text


def _draw(
    plan: Plan,
    family: Family,
    parts: dict[str, Any],
    words: Words,
    wanted: Wanted,
    drawing: Drawing,
) -> None:
    image = sample(
        family,
        {**parts, **picture_part(plan, wanted.width, wanted.height)},
        words[Prompt(drawing.prompt, False)],
        words[Prompt(wanted.negative, True)],
        width=wanted.width,
        height=wanted.height,
        guidance=wanted.guidance,
        steps=wanted.steps,
        seed=drawing.seed,
    )
    drawing.path.parent.mkdir(parents=True, exist_ok=True)
    with files.partial_file(drawing.path) as partial:
        image.save(partial, "png")
