"""Batches of zeros of the most that a run is given: they need what others need at most."""

from __future__ import annotations

import torch
from attrs import evolve, frozen

from compiler.memory import Candidate
from compiler.plan import Model, Plan, Sprint, Text
from runtime.batch import Batch, masked
from runtime.families.base import Family
from runtime.methods import sprint_draws
from runtime.new_tokens import encoders_of
from runtime.text_training import example_tokens

Shape = tuple[int, int, int]  # width, height (pixels), samples


@frozen(kw_only=True)
class Contents:
    """What a run's batches hold."""

    model: Model
    text: Text
    masked: bool
    encoders: tuple[str, ...]  # that change, and so are given tokens
    keeps_base: bool
    sprint: Sprint | None


def of_plan(plan: Plan) -> Contents:
    """Of a plan's run."""
    return Contents(
        model=plan.model,
        text=plan.text,
        masked=any(source.mask for source in plan.sources),
        encoders=encoders_of(plan.text_training, plan.embeddings),
        keeps_base=any(source.target == "base" for source in plan.sources),
        sprint=plan.sprint,
    )


def of_candidate(candidate: Candidate) -> Contents:
    """Of a run that is to be simulated."""
    return Contents(
        model=candidate.model,
        text=candidate.text,
        masked=candidate.masked,
        encoders=encoders_of(candidate.text_training, candidate.embeddings),
        keeps_base=candidate.keeps_base,
        sprint=candidate.sprint,
    )


def held_out(contents: Contents, family: Family, shape: Shape, device: torch.device) -> Batch:
    """A batch of held-out pictures."""
    batch = family.example_batch(contents.model, *shape, contents.text, device)
    if contents.masked:
        batch = masked(batch)
    if contents.encoders:
        tokens = example_tokens(contents.model, contents.encoders, shape[2], device)
        batch = evolve(batch, tokens=tokens)
    return batch


def trained(
    contents: Contents, family: Family, shape: Shape, step: int, device: torch.device
) -> Batch:
    """What the update after `step` others is given."""
    batch = held_out(contents, family, shape, device)
    if contents.keeps_base:
        batch = evolve(batch, keeps_base=True)
    return batch if contents.sprint is None else sprint_draws.example(contents.sprint, batch, step)
