"""What ZeRO changes in one rank's memory, counted from what DeepSpeed's settings make it hold.

With P numbers trained, of `size` bytes where they compute, and N ranks:

- weights that compute are whole; in stage 3 an N-th, small ones apart, with what is gathered: the
  layer that computes and two buffers;
- float32 weights and the optimizer's state are an N-th, on the host with `offload_optimizer`;
- gradients are whole in stage 1, in both types; an N-th from stage 2 on, in float32, twice while
  the last pass's are added. A copy is made for the update;
- in stage 3 a whole gradient goes once it is summed (`partition_grads` of stage3.py, 0.19): between
  the passes and the update no weight has one, nor while it is made (measured, two processors);
- sums over ranks go through buffers of `runtime.zero.REDUCED` numbers, or of the largest weight.

Activations are those of the step simulated without ZeRO. All moments are taken together: an upper
estimate, as for FSDP.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compiler.memory import Candidate
from runtime.families.common import DTYPES
from runtime.memory.sharing import divided, others
from runtime.memory.step import Course
from runtime.zero import REDUCED

SINGLE = 4  # bytes of a float32
PERSISTS = 100_000  # numbers of a weight that stage 3 keeps whole, DeepSpeed's default


def zero_parts(
    candidate: Candidate, course: Course, whole: Mapping[str, Mapping[str, int]]
) -> dict[str, Mapping[str, int]]:
    """Bytes by category of the phases in `whole` in one of the ranks."""
    held = _weights(candidate, course) | _owned(candidate, course)
    passes = held | _gathered(candidate, course)
    found: dict[str, Mapping[str, int]] = {
        "load": {k: v for k, v in held.items() if k != "gradients"},
        "train": passes | _sums(candidate, course) | others(course.window),
        "update": held
        | _copied(candidate, course)
        | divided(others(course.update), candidate.ranks),
    }
    if "evaluate" in whole:
        found["evaluate"] = passes | others(course.evaluate)
    if "validate" in whole:
        vae = course.validate_peak.get("weights", 0) - course.load.get("weights", 0)
        drawing = passes | others(course.validate)
        found["validate"] = {**drawing, "weights": held["weights"] + max(vae, 0)}
    found["save"] = held
    return {name: {k: v for k, v in parts.items() if v} for name, parts in found.items()}


def on_host(candidate: Candidate, trainable: int, state: int) -> int:
    """Bytes that wait on the host of one rank: float32 weights, their gradients, the state."""
    if not candidate.sharing.offload_optimizer:
        return 0
    return -(-(2 * SINGLE * trainable + state) // candidate.ranks)


def _weights(candidate: Candidate, course: Course) -> dict[str, int]:
    size, sizes = _size(candidate), _sizes(course)
    small = sum(n for n in sizes if n <= PERSISTS)
    stage3 = candidate.sharing.stage == 3
    trained = small + -(-(sum(sizes) - small) // candidate.ranks) if stage3 else sum(sizes)
    frozen = candidate.adapter is not None
    base = course.parameters * DTYPES[candidate.precision.weights].itemsize
    base = -(-base // candidate.ranks) if stage3 else base
    return {
        "weights": (base if frozen else trained * size) + course.block_numbers["buffer bytes"],
        "adapter": trained * size if frozen else 0,
    }


def _owned(candidate: Candidate, course: Course) -> dict[str, int]:
    """Float32 weights with the state, and gradients."""
    count, ranks = sum(_sizes(course)), candidate.ranks
    whole = (SINGLE + _size(candidate)) * count
    gradients = whole if candidate.sharing.stage == 1 else 2 * SINGLE * -(-count // ranks)
    if candidate.sharing.offload_optimizer:
        return {"gradients": whole if candidate.sharing.stage == 1 else 0, "optimizer": 0}
    state = SINGLE * count + course.save.get("optimizer", 0)
    return {"gradients": gradients, "optimizer": -(-state // ranks)}


def _copied(candidate: Candidate, course: Course) -> dict[str, int]:
    """Gradients made one flat piece and scaled, and the updated weights when ranks exchange them;
    stage 3 keeps its buffer for sums, which are float32."""
    exchanged = _bucket(course) * _size(candidate)
    if candidate.sharing.stage == 3:
        exchanged += REDUCED * SINGLE
    if candidate.sharing.offload_optimizer:
        return {"sums over devices": exchanged}
    part = -(-sum(_sizes(course)) // candidate.ranks)
    return {"sums over devices": 2 * SINGLE * part + exchanged}


def _sums(candidate: Candidate, course: Course) -> dict[str, int]:
    """Gradients that wait to be summed: by themselves, in a buffer that is always whole, and twice
    while they are float32."""
    size = _size(candidate)
    return {"sums over devices": REDUCED * size + _bucket(course) * (2 * size + SINGLE)}


def _gathered(candidate: Candidate, course: Course) -> dict[str, int]:
    if candidate.sharing.stage < 3:
        return {"gathered": 0}
    ahead = min(2 * REDUCED, course.parameters)
    return {"gathered": (course.block_numbers["largest"] + ahead) * _size(candidate)}


def _bucket(course: Course) -> int:
    sizes = _sizes(course)
    return max(min(sum(sizes), REDUCED), *sizes)


def _sizes(course: Course) -> list[int]:
    return [torch.Size(shape).numel() for _, shape, _ in course.forms]


def _size(candidate: Candidate) -> int:
    return DTYPES[candidate.precision.compute].itemsize
