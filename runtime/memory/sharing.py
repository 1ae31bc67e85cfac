"""What sharing the work among ranks changes in one rank's memory.

Sharded (FSDP2): weights, gradients, optimizer state and average are divided by the ranks, and the
weights that compute are gathered. What is gathered is counted from what `fully_shard` does:

- all that is in no block is gathered once for each pass through the model, and stays;
- a block is gathered into one buffer and copied from there to its weights, so that twice its bytes
  are there for a moment; the one before it is computing meanwhile: three times;
- without `reshard` all blocks stay until their backward pass;
- a block's gradients are complete in the type of the computation, are copied to float32 to be added
  up, and only this rank's rows of the sums stay.

The activations are those of the step simulated without sharding, at their highest. All moments are
taken together, so this is an upper estimate. Not sharded: sums of gradients go through a buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import evolve

from compiler.memory import Candidate
from runtime.families.common import DTYPES
from runtime.memory.curve import Curve
from runtime.memory.rounding import rounded
from runtime.memory.step import Course
from runtime.ranks import BUCKET

OWNED = ("weights", "adapter", "gradients", "optimizer", "ema")
"""Categories of which each rank holds a share."""
SUMS = "sums over devices"
"""The category of what adding up over the ranks takes."""


def shared_parts(candidate: Candidate, course: Course) -> dict[str, Mapping[str, int]]:
    """Bytes by category of the phases of `course` in one of the candidate's ranks."""
    whole = {
        "load": _loaded(course),
        "train": course.train_peak,
        "update": course.update_peak,
        **({"evaluate": course.evaluate_peak} if candidate.evaluated else {}),
        **({"validate": course.validate_peak} if candidate.pictures else {}),
        "save": course.save,
    }
    if candidate.ranks == 1:
        return whole
    if candidate.sharing.strategy == "ddp":
        return {**whole, "update": _summed(course)}
    if candidate.sharing.strategy == "deepspeed":
        from runtime.memory.zero import zero_parts  # which counts with functions of this module

        return zero_parts(candidate, course, whole)
    share = _share(candidate, course)
    passes = share | _gathered(candidate, course) | others(course.window)
    model = {name: share[name] for name in ("weights", "adapter")}  # all else comes afterwards
    found: dict[str, Mapping[str, int]] = {
        "load": {**model, "gathered": rounded(_block(course) * _kept(candidate))},
        "train": passes | _reduced(candidate, course),
        "update": share | divided(others(course.update), candidate.ranks),
    }
    if candidate.evaluated:
        found["evaluate"] = share | _gathered(candidate, course) | others(course.evaluate)
    if candidate.pictures:
        vae = course.validate_peak.get("weights", 0) - course.load.get("weights", 0)
        drawing = share | _gathered(candidate, course) | others(course.validate)
        found["validate"] = {**drawing, "weights": share["weights"] + max(vae, 0)}
    found["save"] = share
    return {name: {k: v for k, v in parts.items() if v} for name, parts in found.items()}


def _loaded(course: Course) -> Mapping[str, int]:
    """All that there is in the end, or the moment before when the last weight is quantised."""
    last = {"weights": course.load.get("weights", 0), "workspace": rounded(course.quantising)}
    return max(course.load, last, key=lambda parts: sum(parts.values()))


def _summed(course: Course) -> Mapping[str, int]:
    """The update's peak, or the moment when gradients are added up over the ranks, in float32: a
    large one in place where that is its type, others in a flat buffer."""
    sizes = [torch.Size(shape).numel() for _, shape, _ in course.forms]
    large = [
        torch.Size(shape).numel()
        for _, shape, dtype in course.forms
        if dtype != torch.float32 and torch.Size(shape).numel() > BUCKET
    ]
    buffer = rounded(4 * max([min(sum(sizes), BUCKET), *large]))
    summing = {**course.after, SUMS: buffer}
    return max(course.update_peak, summing, key=lambda parts: sum(parts.values()))


def _share(candidate: Candidate, course: Course) -> dict[str, int]:
    """What one rank keeps of every weight; each is cut by rows, and the parts are padded alike."""
    ranks = candidate.ranks
    trained = sum(
        rounded(-(-shape[0] // ranks) * torch.Size(shape[1:]).numel() * dtype.itemsize)
        for _, shape, dtype in course.forms
    )
    frozen = candidate.adapter is not None
    base = -(-course.parameters // ranks) * DTYPES[candidate.precision.weights].itemsize
    whole = sum(torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in course.forms)
    state = {n: course.save.get(n, 0) * trained // whole for n in ("optimizer", "ema")}
    return {
        "weights": (base if frozen else trained) + course.block_numbers["buffer bytes"],
        "adapter": trained if frozen else 0,
        "gradients": trained,
        **state,
    }


def _gathered(candidate: Candidate, course: Course) -> dict[str, int]:
    """Weights in the type of the computation, gathered in a forward or backward pass."""
    size = DTYPES[candidate.precision.compute].itemsize
    blocks = 3 * _block(course)
    if not candidate.sharing.reshard:
        blocks = course.block_numbers["all"] + _block(course)
    return {"gathered": (course.block_numbers["apart"] + blocks) * size}


def _reduced(candidate: Candidate, course: Course) -> dict[str, int]:
    """A block's gradients, copied to be added up over the ranks, and this rank's sums."""
    size = DTYPES[candidate.precision.compute].itemsize
    trained = max(course.block_numbers["trained"], course.block_numbers["trained apart"])
    return {SUMS: trained * (size + 4) + -(-4 * trained // candidate.ranks)}


def _block(course: Course) -> int:
    return course.block_numbers["largest"]


def _kept(candidate: Candidate) -> int:
    """Bytes of a number of the weights as they are loaded."""
    precision = candidate.precision
    return DTYPES[precision.trained if candidate.adapter is None else precision.weights].itemsize


def others(curves: Sequence[Curve]) -> dict[str, int]:
    """At the moment when most is there of what is no rank's share."""
    found: dict[str, int] = {}
    for curve in curves:
        kept = [n for n, name in enumerate(curve.categories) if name not in OWNED]
        names = tuple(curve.categories[n] for n in kept)
        rest = evolve(curve, categories=names, live=curve.live[:, kept])
        if rest.live.size and rest.peak > sum(found.values()):
            found = rest.at_peak()
    return found


def divided(parts: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Copies of what is updated, and the batch, which is whole."""
    return {k: v if k == "batch" else -(-v // ranks) for k, v in parts.items()}
