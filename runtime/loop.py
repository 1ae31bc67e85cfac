"""The training loop: one for all families and methods.

Steps are counted as updates done. After update number k (from 1) the order is: average, metrics,
checkpoint, validation, evaluation. Everything random in an update is a function of (seed, step,
sample), so a loop that starts at any step does what an uninterrupted one does from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from attrs import field, frozen, mutable
from torch import Tensor, nn

from compiler.plan import Plan
from compiler.schedules import multiplier
from runtime.ema import Ema
from runtime.errors import RunFailed, first_line
from runtime.events import Events
from runtime.families.base import Family
from runtime.fused_backward import FusedBackward
from runtime.guard import (
    SAMPLES,
    SKIPPED,
    Guard,
    half_done,
    named,
    overflowed,
    refusal,
    unfit_inputs,
    what,
)
from runtime.methods.base import LOSS, Method, is_rivals
from runtime.methods.nested import Nested
from runtime.optimizers import set_lr
from runtime.out_of_memory import is_out_of_memory, is_torn, let_go, updating
from runtime.pace import Pace, used_of
from runtime.ranks import ALONE, Ranks, RanksLost, connected
from runtime.rng import seed_torch
from runtime.scaler import Scaler
from runtime.step import gradient_norm, method_step, micro_step, update
from runtime.stop import Stop
from runtime.text_training import TrainedText
from runtime.track import Tracker

if TYPE_CHECKING:
    from runtime.data.feed import Window
    from runtime.together import Together

LOG_EVERY = 10  # steps between two readings of an accelerator's metrics; reading waits for it


@frozen(kw_only=True)
class Side:
    """What one update changes. `name` begins the names of its metrics."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    buffers: dict[str, Tensor] = field(factory=dict)  # the rest of its state
    lr: float | None = None  # None: the plan's, on its schedule
    name: str = ""

    @property
    def state(self) -> dict[str, Tensor]:
        """Weights and buffers by name: the tensors themselves."""
        return {name: each.detach() for name, each in (self.parameters | self.buffers).items()}


@frozen(kw_only=True)
class Trained:
    """What the loop changes: the model, what of it is trained, and what follows it."""

    family: Family
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    fused: FusedBackward | None = None  # updates weights in the backward pass; None: after it
    shards: Together | None = None  # where each rank holds a part of the model
    scaler: Scaler | None = None  # of the loss, where gradients are float16
    method: Method | None = None  # what an update computes; None: the family's own loss
    rival: Side | None = None  # what is trained in turns with it
    text: TrainedText | None = None  # encoders that are trained too
    nested: tuple[Nested, ...] = ()  # what draws the rank of adapters that have another each step

    def turn(self, step: int) -> Side:
        """What the update after `step` others changes."""
        if self.rival is not None and is_rivals(step):
            return self.rival
        return Side(parameters=self.parameters, optimizer=self.optimizer)


@frozen(kw_only=True)
class Actions:
    """What happens between steps. All are given the updates done.

    `checkpoint` may be called twice for one step and saves once.
    """

    checkpoint: Callable[[int, int], None]  # (done, epoch)
    validate: Callable[[int], None]
    evaluate: Callable[[int], None] = lambda done: None
    check: Callable[[], None] = lambda: None  # raises what went wrong meanwhile


@frozen(kw_only=True)
class Row:
    """One step's metrics before they are read from the device."""

    step: int  # updates done
    epoch: int
    samples: int
    lr: float
    loss: Tensor  # mean over the window's samples
    grad_norm: Tensor  # L2, before clipping
    losses: Tensor  # (samples,), as `names`
    names: Sequence[str]
    by_ranks: bool = False  # made with the norm, see `runtime.together`, unless that is not finite
    fused: bool = False  # weights were updated in the backward pass, before `grad_norm` was known
    scale: Tensor | None = None  # of the loss
    of: str = ""  # begins the names of its numbers
    more: Mapping[str, Tensor] = field(factory=dict)  # other numbers of it

    @property
    def numbers(self) -> Tensor:
        """Loss, gradient norm, scale of the loss (0: not scaled), and the other numbers."""
        scale = torch.zeros_like(self.loss) if self.scale is None else self.scale
        return torch.stack((self.loss, self.grad_norm, scale, *self.more.values()))


@mutable(kw_only=True)
class Ledger:
    """Metrics that are still on the device, and where they go once read."""

    plan: Plan
    guard: Guard
    pace: Pace
    events: Events
    trackers: Sequence[Tracker]
    every: int
    rows: list[Row] = field(factory=list)
    since: float = field(factory=time.perf_counter)  # when the first of `rows` began

    def take(self, row: Row) -> None:
        """Take a step's metrics."""
        self.rows.append(row)

    def look(self) -> None:
        """Read all that wait when their turn has come."""
        if len(self.rows) >= self.every:
            self.flush()

    def add(self, row: Row) -> None:
        """`take` and `look`."""
        self.take(row)
        self.look()

    def flush(self) -> None:
        """Read and report what waits. Raises RunFailed where too many steps were bad."""
        if not self.rows:
            return
        numbers = [row.numbers for row in self.rows]
        flat = torch.cat(numbers).tolist()  # one wait for the device
        ends = accumulate(len(each) for each in numbers)
        values = [flat[end - len(each) : end] for each, end in zip(numbers, ends, strict=True)]
        seconds = (time.perf_counter() - self.since) / len(self.rows)
        rows, self.rows = self.rows, []
        for row, (loss, norm, scale, *more) in zip(rows, values, strict=True):
            verdict = self.guard.judge(loss, norm, scale, row.of)
            if SKIPPED in verdict:
                verdict |= self._passed_over(row, loss, norm)
            shown = dict(zip(row.more, more, strict=True))
            shown |= {f"{row.of}loss": loss, f"{row.of}grad_norm": norm}
            metrics: dict[str, Any] = {
                "epoch": row.epoch,
                **{name: value for name, value in shown.items() if math.isfinite(value)},
                f"{row.of}lr": row.lr,
                "samples": row.samples,
                "seconds": seconds,
                **({"loss_scale": scale} if scale else {}),
                **verdict,
            }
            for tracker in self.trackers:
                tracker.metrics(row.step, metrics)
            self.events.step({"step": row.step, **metrics})
        self.pace.read(rows[-1].step, seconds, len(rows))
        self.since = time.perf_counter()

    def _passed_over(self, row: Row, loss: float, norm: float) -> Mapping[str, Any]:
        """What there is to say of a bad step. Raises RunFailed if it is one too many."""
        if self.guard.exhausted or half_done(row, loss):
            raise refusal(self.plan, row, loss, norm, skipped=self.guard.skipped - 1)
        most = self.plan.guard.skip
        samples = named(row.names, row.losses.tolist())
        self.events.message(
            f"step {row.step}: {what(loss, norm)}; it changed no weight ({self.guard.skipped} of "
            f"at most {most} such steps). Samples: {samples}",
            "warning",
        )
        return {SAMPLES: list(row.names)}

    def resume_clock(self) -> None:
        """Leave out the time since the last flush (a checkpoint or validation took it)."""
        if not self.rows:
            self.since = time.perf_counter()


@mutable
class Reached:
    """How far training has come."""

    done: int  # updates of the weights
    epoch: int = 0  # of the last one's window; 0: this process has made none
    averaged: bool = True  # whether the average has followed the last one


def train(
    plan: Plan,
    trained: Trained,
    windows: Iterable[Window],
    done: int,
    *,
    events: Events,
    trackers: Sequence[Tracker],
    actions: Actions,
    stop: Stop,
    history: Iterable[Mapping[str, Any]] = (),
    ranks: Ranks = ALONE,
) -> int:
    """Train from `done` updates to the plan's total; returns the updates done.

    That is less than the total only if a stop was requested, after a checkpoint. `windows` begins
    at the window of update `done`, `history` are the metrics of those before it. Raises RunFailed
    where training can't go on.
    """
    device = torch.device(plan.device)
    pace = Pace(events, used_of(device))
    ledger = Ledger(
        plan=plan,
        guard=Guard(plan.guard.skip, history),
        pace=pace,
        events=events,
        trackers=trackers,
        every=1 if device.type == "cpu" else LOG_EVERY,
    )
    reached = Reached(done)
    try:
        for window in pace.waited(windows):
            with connected() if trained.shards else nullcontext():
                row = one_update(plan, trained, window, ranks)
            reached.done, reached.epoch, reached.averaged = reached.done + 1, window.epoch, False
            del window  # or it would be there while pictures are drawn, and beside the next one
            ledger.take(row)
            _average(trained, reached)
            ledger.look()
            if _between(plan, ledger, actions, stop, reached):
                break
    except (RuntimeError, MemoryError, OSError, RanksLost) as error:
        if _can_save(trained, ranks) and reached.epoch and _is_whole(error):
            _rescue(trained, ledger, actions, reached, error)
        raise
    return reached.done


def _average(trained: Trained, reached: Reached, *, in_turn: bool = False) -> None:
    """Let the average follow the last update, if it has not."""
    done = reached.done
    if trained.ema is not None and trained.turn(done - 1) is not trained.rival:
        count = done if trained.rival is None else -(-done // 2)
        trained.ema.update(count, in_turn=in_turn)
    reached.averaged = True


def _between(plan: Plan, ledger: Ledger, actions: Actions, stop: Stop, reached: Reached) -> bool:
    """What comes after an update; whether it was the last one."""
    done, epoch = reached.done, reached.epoch
    actions.check()
    ended = done == plan.steps.total
    save = stop.look()
    if save or ended or due(done, plan.checkpoints.every):
        ledger.flush()
        actions.checkpoint(done, epoch)
    if due(done, plan.validation.every) and not (ended or stop.requested):
        ledger.flush()
        actions.validate(done)
    judged = plan.evaluation is not None and due(done, plan.evaluation.every)
    if judged and not (ended or stop.requested):
        ledger.flush()
        actions.evaluate(done)
    if stop.requested:
        ledger.flush()
        actions.checkpoint(done, epoch)
    ledger.resume_clock()
    return ended or stop.requested


def _can_save(trained: Trained, ranks: Ranks) -> bool:
    """Whether this rank may save alone, when another one may be gone."""
    return ranks.leads and trained.shards is None


def _is_whole(error: BaseException) -> bool:
    """Whether `error` has left the weights of a whole step, which is worth saving."""
    return (isinstance(error, RanksLost) or is_out_of_memory(error)) and not is_torn(error)


def _rescue(
    trained: Trained, ledger: Ledger, actions: Actions, reached: Reached, error: BaseException
) -> None:
    """Save what the last whole step made; that this fails too is said, and changes no more."""
    try:
        _let_go(trained, error)
        if not reached.averaged:
            _average(trained, reached, in_turn=True)
        ledger.flush()
        actions.checkpoint(reached.done, reached.epoch)
    except (RuntimeError, MemoryError, OSError, RunFailed) as second:
        why = first_line(second)
        ledger.events.message(f"step {reached.done} could not be saved: {why}", "error")


def _let_go(trained: Trained, error: BaseException) -> None:
    """Drop what the step that failed has left, to have room for saving what the last one made."""
    rivals = trained.rival.parameters.values() if trained.rival else ()
    for parameter in (*trained.model.parameters(), *trained.parameters.values(), *rivals):
        parameter.grad = None
    let_go(error)


def due(done: int, every: int) -> bool:
    """Whether an action that happens `every` steps (0: never) comes after `done` updates."""
    return every > 0 and done % every == 0


def one_update(
    plan: Plan,
    trained: Trained,
    window: Window,
    ranks: Ranks = ALONE,
    passed: Callable[[], None] = lambda: None,
) -> Row:
    """One optimizer update over a window of micro-batches, each weighted by its samples.

    Each rank runs its own; from the sums on, all do and have the same. `passed` is called when the
    passes are over. An exception that comes once weights are being changed is marked so
    (`runtime.out_of_memory.is_torn`).
    """
    with ExitStack() as changing:
        return _updated(plan, trained, window, ranks, passed, changing)


def _updated(
    plan: Plan,
    trained: Trained,
    window: Window,
    ranks: Ranks,
    passed: Callable[[], None],
    changing: ExitStack,
) -> Row:
    """`one_update`, with what is to be entered when weights begin to change."""
    side, method = trained.turn(window.step), trained.method
    lr = side.lr
    if lr is None:
        lr = plan.optimizer.lr * multiplier(plan.schedule, window.step)
    set_lr(side.optimizer, lr)
    fused, scaler, shards = trained.fused, trained.scaler, trained.shards
    begin = _marked(fused.begin, changing) if fused else None
    losses: list[Tensor] = []
    more: list[dict[str, Tensor]] = []
    if method is not None:
        changing.enter_context(_as_it_was(side.buffers))
        method.begin(window.step)
    if trained.text is not None:
        trained.text.begin(window.step)
    for nested in trained.nested:
        nested.begin(plan.seed, window.step)
    size = plan.steps.micro_batch
    parts = list(ranks.parts(window, size))
    behind = shards.behind(len(parts)) if shards else 0  # asked before anything is gathered
    for index, batch in parts:
        seed_torch(plan.seed, "model", window.step, index)
        if method is not None:
            more.append(method_step(method, batch, window.step, window.samples))
            losses.append(more[-1].pop(LOSS))
            continue
        losses.append(
            micro_step(
                trained.family,
                shards.called if shards else trained.model,
                batch,
                plan.objective,
                plan.precision,
                window.samples,
                begin,
                scaler.scale if scaler else None,
                shards.backward if shards else None,
                trained.text,
            )
        )
    passed()
    if shards:
        shards.make_up(behind)
    whole = ranks.losses(window, losses, torch.device(plan.device))
    if shards:
        shards.collect()
    else:
        ranks.sum_gradients(_changing(trained, side))
    if scaler:
        scaler.unscale(trained.parameters.values())
    norm = norm_of(trained, side)
    row = Row(
        step=window.step + 1,
        epoch=window.epoch,
        samples=window.samples,
        lr=lr,
        loss=whole.mean(),
        grad_norm=norm.float(),
        losses=whole,
        names=ranks.names(window),
        by_ranks=shards is not None and shards.updates,
        fused=fused is not None,
        scale=scaler.scale if scaler else None,
        of=side.name,
        more={name: torch.cat([each[name] for each in more]).mean() for name in more[0]}
        if more
        else {},
    )
    good = guard(plan, side.optimizer, row, window, ranks)
    if row.by_ranks:
        pass  # done, or passed over
    elif not good:
        side.optimizer.zero_grad(set_to_none=True)
    elif not fused:
        # Some optimizers round at random: alike in all ranks, whatever batches they had.
        seed_torch(plan.seed, "update", window.step)
        changing.enter_context(updating())
        update(side.optimizer, norm, plan.max_grad_norm)
    if scaler:
        scaler.update(~torch.isfinite(norm))
    return row


@contextmanager
def _as_it_was(buffers: Mapping[str, Tensor]) -> Iterator[None]:
    """What ends this before the weights change leaves the rest of the state, which a method may
    have moved at the beginning of the update, as it was."""
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        yield
    except BaseException as error:
        if not is_torn(error):
            with torch.no_grad(), updating():
                for name, buffer in buffers.items():
                    buffer.copy_(before[name])
        raise


def _marked(begin: Callable[[Tensor], None], changing: ExitStack) -> Callable[[Tensor], None]:
    """`begin` of a fused backward pass, in which weights are changed."""

    def marked(losses: Tensor) -> None:
        changing.enter_context(updating())
        begin(losses)

    return marked


def _changing(trained: Trained, side: Side) -> list[nn.Parameter]:
    """What the update is to change: all, or all but encoders that are trained no more."""
    text = trained.text
    return [p for name, p in side.parameters.items() if text is None or text.trains(name)]


def norm_of(trained: Trained, side: Side) -> Tensor:
    """L2 norm over all of the side's gradients together, float32."""
    if trained.fused:
        return trained.fused.finish()
    if trained.shards:
        return trained.shards.norm()
    return gradient_norm(side.parameters.values())


def guard(
    plan: Plan, optimizer: torch.optim.Optimizer, row: Row, window: Window, ranks: Ranks = ALONE
) -> bool:
    """Whether to update; False where the loss or the gradient is not finite and the plan passes
    over such steps, else RunFailed.

    On the processor the values are at hand. On an accelerator reading them would wait for it in
    every step; there a fused optimizer is told on the device to leave weights and state alone
    (`found_inf`, as a gradient scaler does), and the ledger judges the step when it reads them.
    `runtime.fused_backward` has seen to its own updates.
    """
    good = torch.isfinite(row.loss) & torch.isfinite(row.grad_norm)
    on_device = row.loss.device.type != "cpu" and not row.by_ranks
    if on_device and optimizer.param_groups[0].get("fused"):
        if not row.fused:
            skip_unless(good, optimizer)
        return True
    if good.item():
        return True
    loss, norm, scale, *_ = row.numbers.tolist()
    if overflowed(loss, norm, scale):
        return False
    if plan.guard.skip == 0 or half_done(row, loss):
        found = " ".join(filter(None, ranks.words(unfit_inputs(window))))
        raise refusal(plan, row, loss, norm, found=found)
    return False


def skip_unless(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Make a fused optimizer's next update happen only if `finite` holds, without reading it."""
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
