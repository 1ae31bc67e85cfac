"""What a run did of that which its plan counted: told by the batches that it met.

An allocator tells the peak of a phase, whatever was done in it. The plan counts the largest
batches, with prompts of full length; a run pads prompts to the longest of a batch, and may end
before it has met the largest. What was not done in full says nothing of the plan.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache

import torch
from attrs import mutable
from torch import Tensor

from compiler.families import FAMILIES
from compiler.plan import Plan
from runtime import examples
from runtime.batch import Batch
from runtime.data.feed import Window
from runtime.families import family_of
from runtime.loop import Trained
from runtime.memory.buckets import evaluated_shapes, trained_shapes
from runtime.memory.gauge import Gauge, Met, Reading
from runtime.memory.pieces import picture_words
from runtime.methods.base import is_rivals
from runtime.methods.sprint_draws import NEGATIVE
from runtime.one_more import sides, trained_whole

AVERAGE = "an update of the average"
NOTHING = "nothing that was planned"
UNSEEN, FULL = "prompts of a length that was not seen", "prompts of full length"
META = torch.device("meta")


def noted(
    windows: Iterable[Window], plan: Plan, trained: Trained, gauge: Gauge
) -> Iterable[Window]:
    """The windows of a run, which are noted as they pass where there is an allocator to ask."""
    if not gauge.asks:
        return windows
    met = gauge.met["train"] = Met(missed=_trained(plan, trained))
    return map(_Steps(plan=plan, trained=trained, met=met), windows)


@mutable(kw_only=True)
class _Steps:
    """Notes what the windows of a run are, in the order in which they are trained on."""

    plan: Plan
    trained: Trained
    met: Met
    begun: int = 0

    def __call__(self, window: Window) -> Window:
        """`window` itself. In the first update of each side its optimizer has no state before it,
        and once an encoder rests, less is trained: these are not noted."""
        plan, trained, met = self.plan, self.trained, self.met
        full = self.begun >= len(sides(plan, trained)) and window.step < trained_whole(plan)
        if full and met.missed:
            size = float(sum(map(_numbers, window.batches)))
            met.note(_step_words(plan, trained, window.step, window.batches), size)
            if _averages(trained, window.step + 1):
                met.note(AVERAGE, 0)
        self.begun += 1
        return window


def judged(plan: Plan, gauge: Gauge) -> Callable[[Batch], None]:
    """What notes the batches of held-out pictures that it is called with, where there is an
    allocator to ask."""
    if not gauge.asks:
        return lambda batch: None
    met = gauge.met["evaluate"] = Met(missed=_judged(plan))

    def note(batch: Batch) -> None:
        if met.missed:
            met.note(_words(plan, batch), _numbers(batch))

    return note


def met_readings(trained: Trained, gauge: Gauge, phases: Collection[str]) -> dict[str, Reading]:
    """Of those of `phases` that are told by the batches which a run met: how these are like what
    the plan counted. All of that has to be met; the largest that was stands for what was."""
    found = {name: _reading(met) for name, met in gauge.met.items() if name in phases}
    if trained.shards is not None and "validate" in phases:  # nobody looks into what they draw
        found["validate"] = Reading(size=0, on=UNSEEN, planned=FULL)
    return found


def _reading(met: Met) -> Reading:
    if not met.missed:
        return Reading(size=0)
    return Reading(size=0, on=met.largest or NOTHING, planned="; ".join(sorted(met.missed)))


def _trained(plan: Plan, trained: Trained) -> set[str]:
    found = set()
    for step in sides(plan, trained):
        for shape in trained_shapes(plan):
            batch = examples.trained(examples.of_plan(plan), trained.family, shape, step, META)
            found.add(_step_words(plan, trained, step, [batch] * plan.steps.accumulate))
    return found if trained.ema is None else found | {AVERAGE}


def _judged(plan: Plan) -> set[str]:
    family = family_of(plan.model.family)
    contents = examples.of_plan(plan)
    return {
        _words(plan, examples.held_out(contents, family, shape, META))
        for shape in evaluated_shapes(plan)
    }


def _averages(trained: Trained, done: int) -> bool:
    """Whether the average follows after `done` updates, of both sides if there are two."""
    if trained.ema is None or trained.turn(done - 1) is trained.rival:
        return False
    count = done if trained.rival is None else -(-done // 2)
    return count % trained.ema.facts.every == 0


def _step_words(plan: Plan, trained: Trained, step: int, batches: Collection[Batch]) -> str:
    """Of all batches of an update: what they are, and how many, where there are several."""
    each = sorted({_words(plan, batch) for batch in batches})
    words = " beside ".join(each)
    if len(batches) > 1:
        words = f"{len(batches)} times {words}"
    if trained.rival is not None and is_rivals(step):
        words += ", for the discriminator"
    return words


def _words(plan: Plan, batch: Batch) -> str:
    """What decides of a batch how much memory it takes."""
    factor = _factor(plan.model.family, plan.model.configs["vae"])
    count, _, height, width = batch.latents.shape
    words = f"{picture_words(width * factor, height * factor, count)}, {_text_words(batch)}"
    words += ", with masks" if batch.mask is not None else ""
    return words + (", as the base sees it too" if batch.keeps_base else "")


@lru_cache(1)
def _factor(family: str, vae: str) -> int:
    """How many pixels an edge of a latent is; every batch asks."""
    return FAMILIES[family].vae_factor(json.loads(vae))


def _text_words(batch: Batch) -> str:
    """Of a prompt's tokens, and whether a mask says which of them count."""
    text = [each for name, each in batch.text.items() if not name.startswith(NEGATIVE)]
    states = [each.shape[1] for each in text if each.dim() == 3]
    hidden = any(each.dim() == 2 and each.shape[1] in states for each in text)
    numbers = batch.tokens.numbers.values() if batch.tokens else ()
    count = sum(states) + sum(each.shape[1] for each in numbers)
    return f"{count:,} tokens of text" + (" and their mask" if hidden else "")


def _numbers(batch: Batch) -> float:
    tensors: list[Tensor] = [batch.latents, *batch.text.values()]
    return float(sum(each.numel() for each in tensors))
