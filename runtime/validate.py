"""Validation pictures: what the model draws for the plan's prompts, while it is trained.

    samples/step-000400/NAME-WIDTHxHEIGHT-SEED.png      NAME is percent-encoded where it must be
    samples/step-000400/scores.json                     if the plan names a measure
    samples/step-000400/clip.json                       if it asks for CLIP scores

Nothing here touches what training depends on: noise comes from generators of its own, embeddings
from the cache, and with an average (EMA) the weights are put back bit for bit.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from attrs import field, frozen
from PIL import Image
from torch import Tensor, nn

from compiler.keeping import CLIP_SCORE
from compiler.plan import Plan, Prompt, Validation
from runtime import files
from runtime.ema import Ema
from runtime.errors import MachineUnfit
from runtime.events import Events
from runtime.families.base import Family, TextEmbedding
from runtime.families.common import sample
from runtime.memory.drawing import drawing
from runtime.memory.gauge import NO_GAUGE, Gauge
from runtime.refined import picture_part
from runtime.stop import Stop
from runtime.text_training import TrainedText, tokenizers
from runtime.track import Tracker

SCORES = "scores.json"
CLIP = "clip.json"
Measure = Callable[[Image.Image, str], float | None]


@frozen(kw_only=True)
class Picture:
    """One picture to draw."""

    prompt: Prompt
    width: int
    height: int
    seed: int

    @property
    def file(self) -> str:
        """Its file's name; different pictures have different names."""
        name = quote(self.prompt.name, safe=" ,()+=@")
        return f"{name}-{self.width}x{self.height}-{self.seed}.png"


@frozen(kw_only=True)
class Painter:
    """What drawing needs besides the weights in training."""

    plan: Plan
    family: Family
    model: nn.Module
    vae: nn.Module
    scheduler: Any
    positive: Mapping[str, TextEmbedding]  # by prompt text
    negative: TextEmbedding
    ema: Ema | None
    trackers: Sequence[Tracker]
    events: Events
    stop: Stop
    clip: Measure | None = None
    told: set[int] = field(factory=set)  # steps whose CLIP score is among the metrics already
    text: TrainedText | None = None  # encoders that are trained: they encode the prompts anew
    gauge: Gauge = NO_GAUGE
    there: Callable[[], Mapping[str, Sequence[Tensor]]] = dict  # on the device, by category


def pictures(validation: Validation) -> list[Picture]:
    """All pictures of one validation, in the order in which they are drawn."""
    return [
        Picture(prompt=prompt, width=width, height=height, seed=seed)
        for prompt in validation.prompts
        for width, height in validation.sizes
        for seed in validation.seeds
    ]


def folder_of(run_folder: Path, step: int) -> Path:
    """Where the pictures drawn after `step` updates lie."""
    return run_folder / "samples" / f"step-{step:06d}"


def is_complete(plan: Plan, step: int) -> bool:
    """Whether all pictures of `step` are there, and their scores where the plan wants them."""
    folder = folder_of(Path(plan.run_folder), step)
    wanted = [p.file for p in pictures(plan.validation)]
    if plan.validation.score and wanted:
        wanted.append(SCORES)
    if plan.validation.clip_model and wanted:
        wanted.append(CLIP)
    return all((folder / name).exists() for name in wanted)


def is_done(painter: Painter, step: int) -> bool:
    """Whether nothing is left to do after `step` updates: a run that was killed may have drawn
    the pictures, and then lost the metrics behind its checkpoint."""
    told = painter.clip is None or step in painter.told
    return is_complete(painter.plan, step) and told


def validate(painter: Painter, step: int) -> None:
    """Draw what is missing of the pictures after `step` updates, and score them.

    Returns early if a stop is requested; what is missing is drawn when the run goes on.
    """
    if not is_complete(painter.plan, step) and not _drawn(painter, step):
        return
    if painter.clip is not None and step not in painter.told:
        _tell_clip(painter, painter.clip, step)


def _drawn(painter: Painter, step: int) -> bool:
    """Draw and score; whether it came to an end."""
    plan = painter.plan
    folder = folder_of(Path(plan.run_folder), step)
    folder.mkdir(parents=True, exist_ok=True)
    files.clean(folder)
    wanted = pictures(plan.validation)
    painter.events.phase("validate", len(wanted), "pictures")
    with _drawing(painter):
        positive, negative = _embeddings(painter)
        for index, picture in enumerate(wanted):
            if painter.stop.asked:
                return False
            if not (folder / picture.file).exists():
                told = positive[picture.prompt.text], negative
                _draw(painter, picture, told, folder / picture.file, step)
            if painter.trackers:
                image = beside_the_base(Path(plan.run_folder), step, picture)
                for tracker in painter.trackers:
                    tracker.picture(step, Path(picture.file).stem, image)
            painter.events.advance(index + 1)
    if plan.validation.score:
        _score(plan, folder, step, "ema" if painter.ema else "trained")
    return True


def beside_the_base(run_folder: Path, step: int, picture: Picture) -> Image.Image:
    """The picture of `step` as trackers show it: the untrained model's, if that was drawn, stands
    left of it."""
    drawn, base = (folder_of(run_folder, number) / picture.file for number in (step, 0))
    with Image.open(drawn) as opened:
        image = opened.convert("RGB")
    if step == 0 or not base.exists():
        return image
    both = Image.new("RGB", (2 * picture.width, picture.height))
    with Image.open(base) as opened:
        both.paste(opened.convert("RGB"), (0, 0))
    both.paste(image, (picture.width, 0))
    return both


def _tell_clip(painter: Painter, score: Measure, step: int) -> None:
    """Tell the trackers the CLIP score of what was drawn; measure it first if need be."""
    folder = folder_of(Path(painter.plan.run_folder), step)
    if not (folder / CLIP).exists():
        _measure_clip(painter.plan, score, folder, step)
    mean = json.loads((folder / CLIP).read_text(encoding="utf-8"))["mean"]
    for tracker in painter.trackers:
        tracker.metrics(step, {CLIP_SCORE: mean})
    painter.told.add(step)


def _measure_clip(plan: Plan, score: Measure, folder: Path, step: int) -> None:
    by_prompt: dict[str, list[float]] = {p.name: [] for p in plan.validation.prompts}
    found: dict[str, float] = {}
    for picture in pictures(plan.validation):
        with Image.open(folder / picture.file) as image:
            value = score(image.convert("RGB"), picture.prompt.text)
        assert value is not None, "every prompt has a CLIP score"
        found[picture.file] = value
        by_prompt[picture.prompt.name].append(value)
    content = {
        "step": step,
        "model": plan.validation.clip_model,
        "mean": fmean(found.values()),
        "prompts": {name: fmean(values) for name, values in by_prompt.items()},
        "pictures": found,
    }
    files.write_whole(folder / CLIP, json.dumps(content, indent=2) + "\n")


@contextmanager
def _drawing(painter: Painter) -> Iterator[None]:
    """Inside, the model holds its average if there is one, and the VAE is on the device."""
    with painter.ema.swapped() if painter.ema else nullcontext():
        painter.vae.to(painter.plan.device)
        try:
            yield
        finally:
            painter.vae.to("cpu")


def _embeddings(painter: Painter) -> tuple[Mapping[str, TextEmbedding], TextEmbedding]:
    """Of the prompts, by text, and of the negative one: by the encoders as they are now."""
    text, plan = painter.text, painter.plan
    if text is None:
        return painter.positive, painter.negative
    made = tokenizers(plan, painter.family)
    assert made is not None, "the plan trains encoders"
    return text.embedded(made, painter.positive, (plan.validation.negative, painter.negative))


def _draw(
    painter: Painter,
    picture: Picture,
    told: tuple[TextEmbedding, TextEmbedding],
    path: Path,
    step: int,
) -> None:
    validation = painter.plan.validation
    parts = {
        painter.plan.model.trained_component: painter.model,
        "vae": painter.vae,
        "scheduler": painter.scheduler,
        **picture_part(painter.plan, picture.width, picture.height),
    }
    options: dict[str, Any] = {
        "width": picture.width,
        "height": picture.height,
        "guidance": validation.guidance,
        "steps": validation.steps,
        "seed": picture.seed,
    }
    # Before the first step the optimizer has no state, and what compiled blocks make is not seen.
    seen = step > 0 and painter.plan.speed.compile == "off"
    gauge, there = (painter.gauge, painter.there()) if seen else (NO_GAUGE, {})
    with drawing(gauge, painter.plan, painter.family, parts, told, options, there):
        image = sample(painter.family, parts, *told, **options)
    with files.partial_file(path) as partial:
        image.save(partial, "png")


def measure(name: str) -> Measure:
    """The function `score(image, prompt)` of a module in `runtime.scores`. Raises MachineUnfit."""
    try:
        module = importlib.import_module(f"runtime.scores.{name}")
    except ImportError as error:
        raise MachineUnfit(f"the measure `{name}` can't be loaded: {error}") from error
    score: Measure = module.score
    return score


def _by_group(plan: Plan, by_prompt: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each named group of prompts."""
    values: dict[str, list[float]] = {}
    for prompt in plan.validation.prompts:
        if prompt.group:
            values.setdefault(prompt.group, []).extend(by_prompt[prompt.name])
    return {group: fmean(found) for group, found in values.items() if found}


def _score(plan: Plan, folder: Path, step: int, weights: str) -> None:
    score = measure(plan.validation.score)
    by_prompt: dict[str, list[float]] = {p.name: [] for p in plan.validation.prompts}
    for picture in pictures(plan.validation):
        with Image.open(folder / picture.file) as image:
            value = score(image.convert("RGB"), picture.prompt.text)
        if value is not None:
            by_prompt[picture.prompt.name].append(value)
    means = {name: fmean(values) for name, values in by_prompt.items() if values}
    every = [value for values in by_prompt.values() for value in values]
    content = {
        "step": step,
        "measure": plan.validation.score,
        "weights": weights,
        "mean": fmean(every) if every else None,
        "scored": len(every),
        "groups": _by_group(plan, by_prompt),
        "prompts": means,
    }
    files.write_whole(folder / SCORES, json.dumps(content, indent=2) + "\n")
