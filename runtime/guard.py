"""What watches the training: bad numbers stop it or are passed over, odd ones are pointed out.

Bad: a loss or a gradient that is not finite. Such a step never changes a weight. The plan says how
many of them are passed over; the next one ends the run.

Odd, and only flagged: a spike is a value of the loss or of the gradient norm above `TIMES` times
the running median of the last `SPAN` good steps, and above the median by `SPREADS` standard
deviations, as the median absolute deviation tells of them (times 1.4826 for normal noise: Rousseeuw
and Croux, "Alternatives to the median absolute deviation", 1993). The second part leaves alone what
varies much by nature, as the loss of small batches does.

A gradient that overflows under a loss scale (training in float16) is neither: the update is left
out, the scale falls, and it is only counted. At the lowest scale it is as bad as any.

Nothing is carried over that the metrics do not hold: a run that goes on reads them again.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from compiler.families import FAMILIES
from compiler.keeping import proven
from compiler.optimizers import OPTIMIZERS
from compiler.plan import Plan
from runtime.errors import RunFailed
from runtime.saved import complete, folder_of, step_of
from runtime.scaler import FLOOR
from runtime.track.lines import METRICS, rows

if TYPE_CHECKING:
    from runtime.data.feed import Window
    from runtime.loop import Row

SPAN = 128  # steps that a running median looks back
LEAST = 20  # of them before anything is judged
TIMES = 3.0
SPREADS = 8.0
NORMAL = 1.4826  # standard deviations of normal noise in one median absolute deviation
WATCHED = ("loss", "grad_norm")
SKIPPED = "skipped"  # key of a step that was passed over: how many were, up to and with this one
OVERFLOWED = "overflowed"  # key of a step that only lowered the loss scale: how many did
SPIKE = "spike"  # key of a step: names of the values that stand out
SAMPLES = "names"  # key of a step that was passed over: the samples of its batches
MOST_NAMES = 12  # samples named in a message


class Running:
    """The last values of one measure."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=SPAN)

    def add(self, value: float) -> bool:
        """Take a value; returns whether it is a spike among those before it."""
        found = self._stands_out(value)
        self._last.append(value)
        return found

    def _stands_out(self, value: float) -> bool:
        if len(self._last) < LEAST:
            return False
        middle = median(self._last)
        spread = NORMAL * median(abs(one - middle) for one in self._last)
        return value > TIMES * middle and value > middle + SPREADS * spread


class Guard:
    """Judges each step by its loss and gradient norm, in the order of the steps."""

    def __init__(self, most: int, history: Iterable[Mapping[str, Any]] = ()) -> None:
        """`most` bad steps are passed over; `history` are the metrics of the steps before."""
        self._most = most
        self.skipped = 0
        self.overflowed = 0
        self._running: dict[str, Running] = defaultdict(Running)
        for row in history:
            if SKIPPED in row:
                self.skipped = int(row[SKIPPED])
            elif OVERFLOWED in row:
                self.overflowed = int(row[OVERFLOWED])
            else:
                self._spikes({name: float(row[name]) for name in row if name.endswith(WATCHED)})

    def judge(self, loss: float, norm: float, scale: float = 0.0, of: str = "") -> dict[str, Any]:
        """What a step's metrics say of it besides its numbers; {} for a step like the others.
        `scale` is the loss scale it ran under, 0 without one. `of` begins the numbers' names."""
        if overflowed(loss, norm, scale):
            self.overflowed += 1
            return {OVERFLOWED: self.overflowed}
        if not finite(loss, norm):
            self.skipped += 1
            return {SKIPPED: self.skipped}
        spikes = self._spikes({f"{of}loss": loss, f"{of}grad_norm": norm})
        return {SPIKE: spikes} if spikes else {}

    @property
    def exhausted(self) -> bool:
        """Whether more steps were bad than may be passed over."""
        return self.skipped > self._most

    def _spikes(self, values: Mapping[str, float]) -> list[str]:
        return [name for name, value in values.items() if self._running[name].add(value)]


def overflowed(loss: float, norm: float, scale: float) -> bool:
    """Whether a gradient is not finite because of the loss scale, which then falls."""
    return scale > FLOOR and math.isfinite(loss) and not math.isfinite(norm)


def finite(loss: float, norm: float) -> bool:
    """Whether both are numbers."""
    return math.isfinite(loss) and math.isfinite(norm)


def what(loss: float, norm: float) -> str:
    """The number that is none, in words."""
    return f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"


def named(names: Sequence[str], losses: Sequence[float]) -> str:
    """The samples with a loss that is no number, or all where each loss is one; not too many."""
    bad = [name for name, loss in zip(names, losses, strict=False) if not math.isfinite(loss)]
    whose = bad if bad and len(losses) == len(names) else list(names)
    shown = ", ".join(whose[:MOST_NAMES])
    return shown if len(whose) <= MOST_NAMES else f"{shown} and {len(whose) - MOST_NAMES} more"


def causes(plan: Plan) -> list[str]:
    """What makes numbers overflow under this plan, the likeliest first."""
    card, found = FAMILIES[plan.model.family], []
    half = [c.name for c in plan.model.components if c.dtype == "float16"]
    if plan.precision.compute == "float16" and card.fp16_overflows:
        found.append(f"{card.title} computed in float16, whose activations overflow: take bf16")
    elif plan.precision.compute == "float16":
        found.append("arithmetic in float16, which overflows above 65504: take bf16")
    encoders = [name for name in half if name != plan.model.trained_component]
    if encoders:
        found.append(
            f"{' and '.join(encoders)} in float16, so that cached latents or embeddings may hold "
            "no numbers: take bf16 or fp32"
        )
    if plan.precision.cache == "float16":
        found.append("a cache in float16, too narrow for large embeddings: take bf16")
    if plan.optimizer.lr > OPTIMIZERS[plan.optimizer.name].usual_lr[1]:
        found.append(f"a learning rate of {plan.optimizer.lr:g}, beyond what the optimizer takes")
    else:
        found.append(f"a learning rate that is too high for this data ({plan.optimizer.lr:g})")
    if plan.max_grad_norm == 0:
        found.append("gradients that are not clipped (max_grad_norm = 0)")
    return [*found, "a damaged picture among the samples named"]


def half_done(row: Row, loss: float) -> bool:
    """Whether a bad step may have changed some weights: they were updated in the backward pass."""
    return row.fused and math.isfinite(loss)


def refusal(
    plan: Plan, row: Row, loss: float, norm: float, *, skipped: int = 0, found: str = ""
) -> RunFailed:
    """The end of a run at the bad step `row`, after `skipped` others that were passed over.

    `found` is what is known of the cause; without it the help says what the plan makes likely.
    """
    weights = f"the weights were not updated and are those of step {row.step - 1}"
    if half_done(row, loss):
        weights = "with fused_backward some weights were updated before it was found"
    before = f"; {skipped} such steps were passed over before" if skipped else ""
    why = found or f"likely causes: {'; '.join(causes(plan))}"
    advice = f"{last_good(plan, row.step)}. {why}."
    if not half_done(row, loss):
        advice += f" To pass over such a step: --set train.guard.skip={skipped + 1}"
    samples = named(row.names, row.losses.tolist())
    return RunFailed(
        f"step {row.step}: {what(loss, norm)}; {weights}{before}. Samples: {samples}", help=advice
    )


def passed_over(metrics: Path, done: int) -> set[int]:
    """The steps up to `done` that were passed over, by the metrics."""
    return {int(row["step"]) for row in rows(metrics, done) if SKIPPED in row}


def last_good(plan: Plan, bad: int) -> str:
    """What of the saved one can go on from, when the step `bad` ends the run."""
    root = Path(plan.run_folder)
    saved = [step_of(folder) for folder in complete(root / "checkpoints")]
    good = proven(saved, passed_over(root / METRICS, bad - 1), bad - 1)
    if not saved:
        return "nothing was saved before"
    if good is None:
        return "what was saved before holds numbers only, but no later step was good with it"
    words = f"the last checkpoint with which a later step was good is {folder_of(root, good).name}"
    if good == saved[-1]:
        return words
    return f"{words}: to go on from there, move the later ones out of {root / 'checkpoints'}"


def unfit_inputs(window: Window) -> str:
    """Samples of `window` whose latents or embeddings hold no numbers, in a sentence; "": none."""
    if not window.batches:  # a rank whose share is empty
        return ""
    flags = [
        torch.stack(
            [
                torch.isfinite(tensor).flatten(1).all(1)
                for tensor in (batch.latents, *batch.text.values())
                if tensor.is_floating_point()
            ]
        ).all(0)
        for batch in window.batches
    ]
    fine = torch.cat(flags).tolist()
    bad = [name for name, good in zip(window.names, fine, strict=True) if not good]
    if not bad:
        return ""
    return (
        f"The cached latents or embeddings of {', '.join(bad[:3])} hold no numbers: the vae or a "
        "text encoder overflowed, or the cache is damaged (`tuner cache verify`)"
    )
