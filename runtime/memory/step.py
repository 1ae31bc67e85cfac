"""Runs one training step under a tracker: on meta tensors to simulate it, or on real ones.

What runs is the runtime's own: `build`, `make_optimizer`, `micro_step`, `update`, `Ema`. The step
that is counted is one in the middle of a run, when the optimizer's state exists.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compiler import plan
from compiler.memory import Candidate
from runtime import examples
from runtime.build import Built, build
from runtime.collector import collector_off
from runtime.ema import Ema
from runtime.families import family_of
from runtime.families.base import Family
from runtime.families.common import DTYPES, component_of
from runtime.fused_backward import FusedBackward
from runtime.memory import phases
from runtime.memory.again import Again
from runtime.memory.buckets import of_batch, parts_run, runs_of, worst_of
from runtime.memory.curve import Curve, NotAlike, highest, lowered
from runtime.memory.grown import Growth
from runtime.memory.primed import average, give_gradients, prime
from runtime.memory.shares import (
    Form,
    Share,
    Weights,
    forms_of,
    mark_blocks,
    shares_of,
    weights_of,
)
from runtime.memory.tracker import Tracker
from runtime.memory.waiting import Rehearsal
from runtime.methods.sprint import Distillation
from runtime.modules import blocks_of
from runtime.offload.host import counted, giving
from runtime.scaler import Scaler, scaler_for
from runtime.step import gradient_norm, method_step, micro_step, update

META = torch.device("meta")

Aside = Callable[[Callable[[], Any]], AbstractContextManager[Callable[[], Any]]]
"""Does work beside that in the context that it makes; see `runtime.memory.beside.beside`."""


@contextmanager
def here(work: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """`Aside` in name only: the work is done when its result is asked for."""
    yield work


@frozen(kw_only=True, eq=False)
class Course:
    """One bucket's step and what comes after it. Bytes by category, or their course in time."""

    load: Mapping[str, int]  # once the model is there
    quantising: int  # beside its weights, while it is loaded
    window: Sequence[Curve]  # the passes of one accumulation window
    after: Mapping[str, int]  # when its gradients are complete
    update: Sequence[Curve]  # clipping, optimizer, average
    save: Mapping[str, int]  # what lies on the device between two steps
    evaluate: Sequence[Curve]  # none without held-out pictures
    validate: Sequence[Curve]  # none without pictures
    flops: int  # of one batch's passes, recomputation included, the base's not; 0: not counted
    largest: int  # bytes of the largest tensor, which the host holds while loading
    parameters: int  # of the trained component, without adapter
    adapted_modules: int
    forms: Sequence[Form]  # of what the optimizer updates
    idle: Sequence[Form]  # of them, those that get no gradient
    block_numbers: Mapping[str, int]
    """Parameters, adapter included: of the "largest" block, of "all" blocks, "apart" from them,
    "trained" ones of a block and "trained apart"; and "buffer bytes", which no rank shares."""
    primed: Mapping[str, int] = field(factory=dict)
    """Before the window, once the optimizer has its state and the average is there."""
    spent: int = 0  # operations of the passes that were run
    stands_for: int = 1
    """Passes of the window for which each that was run stands. 2: its first part, which finds no
    gradients and is as large as the later one, was left out; it never needs more."""
    runs: int = 1  # parts that were run, or as many times one as rivals take turns
    filled: float = 1.0  # of the host memory of activations that wait, what they take of it
    parked: int = 0  # bytes on the host of what belongs on the device, between two steps
    shares: Mapping[int, Share] = field(factory=dict)  # of blocks that were asked for
    weights: Sequence[Weights] = ()  # of each block, if it was rehearsed that they wait

    @property
    def kernels(self) -> int:
        """Of one part's passes: as many as made a new tensor."""
        return sum(len(curve.sizes) for curve in self.window) // self.runs

    @property
    def host(self) -> int:
        """Bytes on the host of what belongs on the device, at most in the passes."""
        return max((int(c.hosts[:, 1].max()) for c in self.window if c.hosts.size), default=0)

    @property
    def train_peak(self) -> dict[str, int]:
        """Bytes by category at the worst moment of the passes."""
        return highest(self.window)

    @property
    def update_peak(self) -> dict[str, int]:
        """Bytes by category at the worst moment of what follows the passes."""
        return highest(self.update)

    @property
    def evaluate_peak(self) -> dict[str, int]:
        """Bytes by category at the worst moment of measuring the loss of held-out pictures."""
        return highest(self.evaluate) if self.evaluate else {}

    @property
    def validate_peak(self) -> dict[str, int]:
        """Bytes by category at the worst moment of drawing; empty without pictures."""
        return highest(self.validate) if self.validate else {}

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of a step."""
        return max(curve.peak for curve in (*self.window, *self.update))

    @property
    def trainable(self) -> int:
        """Parameters that the optimizer updates."""
        return sum(torch.Size(shape).numel() for _, shape, _ in self.forms)

    @property
    def trained_bytes(self) -> int:
        """Bytes of them."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in self.forms)


def run_step(
    candidate: Candidate,
    shape: tuple[int, int, int],
    device: torch.device,
    tracker: Tracker,
    flops: Callable[[], int] = lambda: 0,
    asked_for: Collection[int] | None = None,
    rehearsed: bool = False,
    aside: Aside | None = None,
    grow: Growth | None = None,
) -> Course:
    """Build, prime and run one window of the bucket `shape` (width, height, batch) under `tracker`.

    `device` is "meta", or a real one for tests. `flops` reads a counter. With `asked_for` the
    blocks' passes are told apart, and the blocks of these numbers have their shares; with
    `rehearsed`, too, when each of them would be needed if it waited. `aside` does work beside
    other work, as `runtime.memory.beside`; `grow` is how the model is built.
    Raises NotAlike if blocks have no shares or gradients do not add up, and CantGrow.
    """
    aside = aside or here
    family = family_of(candidate.model.family)
    with tracker, collector_off(), counted(tracker.elsewhere), giving() as given:
        built = _build(candidate, family, device, grow)
        _name_model(tracker, built, candidate.adapter is not None)
        load, parked = tracker.categories(), tracker.host
        optimizer = prime(candidate, built.trainable, tracker)
        ema = average(candidate, built.trainable, tracker)
        primed = tracker.categories()
        rivals = _rivals(candidate, built, tracker)
        asked: list[int] = []
        marked = _marks_of_passes(built.model, tracker, flops, asked)
        shares: Mapping[int, Share] = {}
        weights: Sequence[Weights] = ()
        if asked_for is not None:
            blocks = blocks_of(built.model, family.card.blocks)
            shares = shares_of(built, blocks, asked_for, tracker)
            marked += mark_blocks(blocks, tracker, flops)
            if rehearsed:
                weights = [weights_of(block, tracker) for block in blocks]
                Rehearsal(blocks, tracker)
        # What is live between two steps is what is live before the first one, as a rule: then what
        # is done there needs no step before it, and can be done beside it.
        between = partial(_between, candidate, family, built, device, tracker)
        with aside(between) as looked:
            told = asked_for is not None
            run = _window(
                candidate, family, built, optimizer, ema, shape, tracker, flops, told=told
            )
            window, updating = run.passes, run.update
            spent, runs = run.spent, runs_of(candidate, shape) // run.stands_for
            if rivals is not None and built.rival is not None:  # its updates take turns
                other = evolve(built, trainable=built.rival.trainable)
                more = _window(
                    candidate, family, other, rivals, None, shape, tracker, flops, step=1
                )
                window, updating = [*window, *more.passes], [*updating, *more.update]
                spent, runs = (spent + more.spent) // 2, runs * 2
            if built.method is None:
                spent -= sum(asked)
            save = tracker.categories()
            between_steps, judged, drawn = looked()
            if save != between_steps:
                _, judged, drawn = between()
        for handle in marked:
            handle.remove()
    stated = component_of(candidate.model, candidate.model.trained_component)
    plain = DTYPES[candidate.precision.weights]
    there = not candidate.layout.offload_blocks  # else it is loaded on the host
    return Course(
        load=load,
        quantising=phases.while_quantised(stated, built.model, plain) if there else 0,
        window=window,
        after=run.after,
        update=updating,
        save=save,
        evaluate=judged,
        validate=drawn,
        flops=of_batch(candidate, shape, spent * run.stands_for),
        spent=spent,
        stands_for=run.stands_for,
        runs=runs,
        filled=given.share,
        parked=parked,
        largest=max(p.nbytes for p in built.model.parameters()),
        parameters=built.parameters,
        adapted_modules=built.adapted_modules,
        forms=forms_of(built.trainable),
        idle=run.idle,
        block_numbers=_block_numbers(built.model, family),
        primed=primed,
        shares=shares,
        weights=weights,
    )


def _between(
    candidate: Candidate, family: Family, built: Built, device: torch.device, tracker: Tracker
) -> tuple[Mapping[str, int], Sequence[Curve], Sequence[Curve]]:
    """What is done between two steps, the courses of it: measuring the loss of held-out pictures,
    and drawing; and what lies on the device there."""
    if built.waiting is not None:
        built.waiting.settle()
    there = tracker.categories()
    judged: list[Curve] = []
    for shape in worst_of(candidate, evaluated=True) if candidate.evaluated else ():
        phases.run_evaluation(candidate, family, built.model, shape, device, tracker, built.text)
        judged += tracker.curves()
    drawn: Sequence[Curve] = ()
    if candidate.pictures:
        again = Again()
        # Which blocks are there depends on the pass before where the model has some that wait.
        alike = device == META and built.waiting is None
        with again.left_out(built.model, tracker) if alike else nullcontext():
            phases.run_pictures(candidate, family, built.model, device, tracker, built.text)
        drawn = again.complete(tracker.curves())
    return there, judged, drawn


def _block_numbers(model: nn.Module, family: Family) -> dict[str, int]:
    """See `Course.block_numbers`."""

    def count(parameters: Iterable[nn.Parameter], trained: bool = False) -> int:
        return sum(p.numel() for p in parameters if p.requires_grad or not trained)

    blocks = [list(block.parameters()) for block in blocks_of(model, family.card.blocks)]
    inside = {id(p) for block in blocks for p in block}
    apart = [p for p in model.parameters() if id(p) not in inside]
    return {
        "largest": max(map(count, blocks), default=0),
        "all": sum(map(count, blocks)),
        "apart": count(apart),
        "trained": max((count(block, trained=True) for block in blocks), default=0),
        "trained apart": count(apart, trained=True),
        "buffer bytes": sum(b.nbytes for b in model.buffers()),
    }


def _rivals(candidate: Candidate, built: Built, tracker: Tracker) -> torch.optim.Optimizer | None:
    """The optimizer of what is trained in turns with the model."""
    if candidate.sprint is None or built.rival is None:
        return None
    theirs = evolve(candidate, optimizer=candidate.sprint.discriminator)
    return prime(theirs, built.rival.trainable, tracker)


def _build(
    candidate: Candidate, family: Family, device: torch.device, grow: Growth | None
) -> Built:
    # For what is made on the CPU first.
    more = candidate.sprint or candidate.text_training or candidate.embeddings
    with device if more else nullcontext():
        return build(
            grow.least if grow is not None else candidate.model,
            candidate.adapter,
            candidate.precision,
            candidate.layout,
            family,
            device,
            empty=True,
            seed=0,
            speed=plan.Speed(
                attention=candidate.attention,
                channels_last=candidate.channels_last,
                fused_projections=candidate.fused_projections,
            ),
            sprint=candidate.sprint,
            text_training=candidate.text_training,
            embeddings=candidate.embeddings,
            grow=grow,
        )


def _name_model(tracker: Tracker, built: Built, adapted: bool) -> None:
    """The model's tensors and the optimizer's masters are weights, the adapter's by that name."""
    parameters = list(built.model.parameters())
    if isinstance(built.method, Distillation):
        for other in built.method.others:
            tracker.register([*other.parameters(), *other.buffers()], "weights")
    for encoder in built.text.encoders.values() if built.text else ():
        parameters += encoder.parameters()
        tracker.register(encoder.buffers(), "weights")
    trained = [*built.trainable.values(), *(p for p in parameters if p.requires_grad)]
    tracker.register([*parameters, *built.model.buffers()], "weights")
    tracker.register(trained, "adapter" if adapted else "weights")


def _marks_of_passes(
    model: nn.Module, tracker: Tracker, flops: Callable[[], int], asked: list[int]
) -> list[RemovableHandle]:
    """Mark where the model's forward passes begin and end. Operations of those that record no
    gradients, which ask for what the base predicts, are added to `asked`."""

    def begin(*_: object) -> None:
        tracker.mark()
        if not torch.is_grad_enabled():
            asked.append(-flops())

    def end(*_: object) -> None:
        tracker.mark()
        if not torch.is_grad_enabled():
            asked.append(flops())

    return [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]


@frozen(kw_only=True, eq=False)
class _Window:
    """See `Course`."""

    passes: Sequence[Curve]
    after: Mapping[str, int]
    update: Sequence[Curve]
    idle: Sequence[Form]
    spent: int
    stands_for: int


def _window(
    candidate: Candidate,
    family: Family,
    built: Built,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    shape: tuple[int, int, int],
    tracker: Tracker,
    flops: Callable[[], int],
    step: int = 0,
    told: bool = False,
) -> _Window:
    """One optimizer update over batches of `shape`, all on the device from the start, as in the
    loop. Of the parts that the batches are cut in, only those are run that tell its peak; where
    the blocks' passes are `told` apart, the later one alone of two that are equally large."""
    fused = None
    if candidate.layout.fused_backward:
        fused = FusedBackward(built.model, built.trainable, optimizer, built.copies())
    device = next(iter(built.model.parameters())).device
    scaler = scaler_for(candidate.precision, device)
    tracker.category = "batch"
    contents = examples.of_candidate(candidate)
    batches = [
        examples.trained(contents, family, shape, step, device) for _ in range(candidate.accumulate)
    ]
    samples = sum(batch.latents.shape[0] for batch in batches)
    parts = [part for batch in batches for part in batch.parts(candidate.micro_batch)]
    sizes = [part.latents.shape[0] for part in parts]
    asked, found = parts_run(sizes), None
    if told and fused is None and len({sizes[number] for number in asked}) < len(asked):
        asked, found = asked[1:], _Found(built.trainable, tracker)
        tracker.category = "batch"
    tracker.reset_peak()
    start = flops()
    losses: list[object] = []
    if built.method is not None:
        built.method.begin(step)
    for nested in built.nested:
        nested.begin(0, step)
    for number, part in enumerate(parts):
        tracker.category = "activations"
        if number not in asked:  # its loss alone stays
            losses.append(part.latents.new_zeros(part.latents.shape[0]))
            continue
        if built.method is not None:
            losses.append(method_step(built.method, part, step, samples))
            tracker.register(_gradients(built), "gradients")
            continue
        losses.append(
            micro_step(
                family,
                built.model,
                part,
                candidate.objective,
                candidate.precision,
                samples,
                fused.begin if fused else None,
                scaler.scale if scaler else None,
                words=built.text,
            )
        )
        tracker.register(_gradients(built), "gradients")
    passes, spent = tracker.curves(), flops() - start
    if found is not None:
        unused = found.unused()
        passes = [lowered(curve, unused) for curve in passes]
    after = tracker.categories()
    without = fused.idle() if fused else [p.grad is None for p in built.trainable.values()]
    idle = [form for form, none in zip(forms_of(built.trainable), without, strict=True) if none]
    complete(
        candidate, built.trainable, optimizer, ema, fused.finish if fused else None, tracker, scaler
    )
    return _Window(
        passes=passes,
        after=after,
        update=tracker.curves(),
        idle=idle,
        spent=spent,
        stands_for=2 if found is not None else 1,
    )


class _Found:
    """Gradients as an earlier part's passes leave them: those of all parameters, until it is known
    which get none."""

    def __init__(self, trainable: Mapping[str, nn.Parameter], tracker: Tracker) -> None:
        self._parameters, self._tracker = list(trainable.values()), tracker
        tracker.category = "gradients"
        give_gradients(self._parameters, tracker)
        self._made = [parameter.grad for parameter in self._parameters]

    def unused(self) -> dict[str, int]:
        """Bytes by category of those that nothing was added to. They are gone afterwards."""
        unused = []
        for parameter, gradient in zip(self._parameters, self._made, strict=True):
            if gradient is None or parameter.grad is not gradient:
                raise NotAlike("gradients that are exchanged, not added up")
            if gradient._version == 0:
                unused.append(gradient)
                parameter.grad = None
        self._made = []
        return self._tracker.held(unused)


def complete(
    candidate: Candidate,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    finish: Callable[[], Tensor] | None,
    tracker: Tracker,
    scaler: Scaler | None = None,
) -> None:
    """What follows the passes: clipping, the optimizer's update, the average's."""
    tracker.category = "workspace"
    tracker.reset_peak()
    if scaler:
        scaler.unscale(trainable.values())
    if finish:
        finish()
    else:
        norm = gradient_norm(trainable.values())
        update(optimizer, norm, candidate.max_grad_norm)
    if ema is not None:
        ema.update(1)


def _gradients(built: Built) -> Iterator[Tensor]:
    for parameter in (*built.copies().values(), *built.trainable.values()):
        if parameter.grad is not None:
            yield parameter.grad
