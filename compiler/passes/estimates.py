"""What each combination of settings needs, and how long it takes, told from a few simulations.

A phase is the sum of its parts, and each setting has its say in one part or two: so the parts of a
few simulated rungs, the anchors, tell those of all. What is recomputed, or is left on the device,
counts in proportion. Anchors do not depend on the budget; nor, therefore, does any estimate, and
what is chosen by them never gets slower with a larger budget. An anchor's own estimate is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property

from attrs import evolve

from compiler import plan
from compiler.memory import Simulation
from compiler.passes.ladder import Choices, Rung, possible
from compiler.passes.modelled_time import Clock

OF_A_BATCH = ("activations", "batch")  # parts of `train` that grow with what is in a batch
OF_THE_OPTIMIZER = ("optimizer", "workspace")
HEAVY = 0.05  # of a step's bytes

Look = Callable[[Rung], Simulation]


class Estimates:
    """Bytes and seconds of any rung of `choices`. Making it simulates the anchors: up to seven."""

    def __init__(
        self, choices: Choices, look: Look, clock: Callable[[int], Clock], room: float
    ) -> None:
        """`room`: bytes on the host for what waits there."""
        first = choices.first
        self.choices, self.start, self._look = choices, first, look
        self.deep = evolve(
            first,
            checkpointing=choices.checkpointing[-1],
            optimizer=choices.optimizer[-1],
            quantize=choices.quantize[:2][-1],
        )
        self.aside = evolve(
            first,
            fused_backward=choices.fused_backward[-1],
            quantize=choices.quantize[-1],
            activations=choices.activations[-1],
        )
        self.ends = choices.thriftiest()
        if host_bytes(look(self.ends[0])) > room:  # what saves all that can be saved without
            light = evolve(self.ends[0], activations=first.activations, blocks=first.blocks)
            self.ends = tuple(dict.fromkeys([*self.ends, light]))
        self.fused = self._without_gradients()
        anchors = [first, self.deep, self.aside, *([self.fused] if self.fused else []), *self.ends]
        self.anchors = dict.fromkeys(anchors)
        for rung in self.anchors:
            look(rung)
        self.clock = clock(look(first).parameters)
        self.largest = self.clock.largest
        self._rest = cache(self._rest_of)
        self._batch = cache(self._batch_bytes)
        self._weights = cache(self._weights_saved)

    def _without_gradients(self) -> Rung | None:
        """The first rung with updates in the backward pass, where gradients weigh enough to have
        the peak come at another moment without them."""
        rung = evolve(self.start, fused_backward=self.choices.fused_backward[-1])
        train = self._train(self.start)
        heavy = train.parts.get("gradients", 0) > HEAVY * train.device_bytes
        return rung if rung != self.start and heavy and possible(rung) else None

    def peak(self, rung: Rung, apart: frozenset[str]) -> float:
        """Bytes of the phase that needs most, of all but those named `apart`."""
        if rung in self.anchors:
            found = self._look(rung).phases
            return max(phase.device_bytes for phase in found if phase.name not in apart)
        saved = self._weights(rung.quantize, rung.blocks)
        others = self._rest(rung.quantize, rung.optimizer, rung.fused_backward)
        fused = rung.fused_backward
        train = self._batch(rung.checkpointing, rung.activations, rung.micro_batch, fused)
        sums = (
            others[name] - saved + (train + self._gradients(rung) if name == "train" else 0)
            for name in others
            if name not in apart
        )
        return max(sums)

    def seconds(self, rung: Rung) -> float:
        """Modelled time of a step; of an anchor by what was simulated of it."""
        if rung in self.anchors:
            return self.clock.taken(rung, self._look(rung))
        none, every = self._look(self.start), self._look(self.deep)
        flops = self._between(rung.checkpointing, none.flops, every.flops)
        kernels = self._between(rung.checkpointing, none.kernels, every.kernels)
        blocks = self._waiting_blocks(rung.quantize, rung.blocks)
        return self.clock.seconds(rung, flops, blocks + self._waiting_activations(rung), kernels)

    def host(self, rung: Rung) -> float:
        """Bytes on the host in a step."""
        if rung in self.anchors:
            return host_bytes(self._look(rung))
        like = self._look(self._of("optimizer", rung.optimizer))  # its state is copied there, too
        blocks = self._waiting_blocks(rung.quantize, rung.blocks) - like.blocks_waiting
        more = self._waiting_activations(rung) - like.activations_waiting
        return host_bytes(like) + blocks + more * self._pinned

    @cached_property
    def _pinned(self) -> float:
        """Bytes on the host for each of an activation's that waits there."""
        start, aside = self._look(self.start), self._look(self.aside)
        waiting = aside.activations_waiting - start.activations_waiting
        return max((host_bytes(aside) - host_bytes(start)) / waiting, 1.0) if waiting else 1.0

    def _waiting_blocks(self, quantize: plan.Quantisation, blocks: int) -> float:
        """Bytes of `blocks` blocks with weights in `quantize`."""
        known = next((r for r in (self.ends[0], self.start) if r.blocks), None)
        if known is None or not blocks:
            return 0.0
        # The blocks' weights are all that has other sizes in other quantisations.
        other = self._all_weights(quantize) - self._all_weights(known.quantize)
        every = self._depth / known.blocks * self._look(known).blocks_waiting + other
        return every * blocks / self._depth

    @property
    def _depth(self) -> int:
        """How many blocks may wait; those that do, where nothing else is open."""
        return max(self.choices.blocks)

    def _all_weights(self, quantize: plan.Quantisation) -> int:
        """Bytes of weights, wherever they wait, but for a few blocks that are on their way."""
        found = self._look(self._of("quantize", quantize))
        train = next(phase for phase in found.phases if phase.name == "train")
        return train.parts.get("weights", 0) + found.blocks_waiting

    def _waiting_activations(self, rung: Rung) -> float:
        """Bytes of activations that go to the host in each part of a batch."""
        if not rung.activations:
            return 0.0
        if self.start.activations:
            none, every = (self._look(r).activations_waiting for r in (self.start, self.deep))
        else:
            end = self.ends[0]
            none = self._look(self.aside).activations_waiting
            least = self._look(end).activations_waiting / self._share(end.micro_batch)
            every = (
                round(min(least, none)) if end.checkpointing == self.deep.checkpointing else none
            )
        return self._between(rung.checkpointing, none, every) * self._share(rung.micro_batch)

    def _between(self, interval: int, none: float, every: float) -> float:
        """In proportion to the blocks that are recomputed; `none` of those of the first rung."""
        start, end, here = (
            1 / each if each else 0.0
            for each in (self.start.checkpointing, self.deep.checkpointing, interval)
        )
        return none + (every - none) * (here - start) / (end - start) if end > start else none

    def _share(self, micro_batch: int) -> float:
        return (micro_batch or self.largest) / (self.start.micro_batch or self.largest)

    def _batch_bytes(self, interval: int, aside: bool, micro_batch: int, fused: bool) -> float:
        """Of `train`: what grows with the batch."""
        none, every = self._batch_of(self.start), self._batch_of(self.deep)
        if fused and self.fused is not None:
            none = self._batch_of(self.fused)
        if aside == self.start.activations:
            return self._between(interval, none, every) * self._share(micro_batch)
        end, none = self.ends[0], min(none, self._batch_of(self.aside))
        if interval != self.start.checkpointing:
            # A block that is recomputed has its own there, however few such blocks there are.
            every = self._batch_of(end) / self._share(end.micro_batch)
            none = max(self._between(interval, none, every), every)
        return none * self._share(micro_batch)

    def _batch_of(self, anchor: Rung) -> float:
        return _parts(self._train(anchor), OF_A_BATCH)

    def _weights_saved(self, quantize: plan.Quantisation, blocks: int) -> float:
        """Bytes that `blocks` more on the host take off the device, of weights in `quantize`: all
        of theirs but for those that are on their way, which are equally many however many wait."""
        end = self.ends[0]
        if end.blocks == self.start.blocks or blocks == self.start.blocks:
            return 0.0
        every = self._waiting_blocks(end.quantize, end.blocks)
        if not every:  # a model without weights in its blocks
            return 0.0
        like = self._train(self._of("quantize", end.quantize)).parts.get("weights", 0)
        saved = like - self._train(end).parts.get("weights", 0)
        mine = self._waiting_blocks(quantize, blocks)
        there = max(every - saved, 0) * self._waiting_blocks(quantize, end.blocks) / every
        return max(mine - there, 0)

    def _rest_of(self, quantize: str, optimizer: str, fused: bool) -> Mapping[str, float]:
        """Of each phase: all that neither the batch nor blocks on the host have a say in."""
        kind, state = self._of("quantize", quantize), self._of("optimizer", optimizer)
        update = self._of("fused_backward", fused)
        found = {}
        for phase in self._look(self.start).phases:
            elsewhere = (*OF_A_BATCH, "gradients") if phase.name == "train" else ()
            known = {*OF_THE_OPTIMIZER, "gradients", *elsewhere}
            other = self._phase(kind, phase.name)
            sums = _parts(other, [name for name in other.parts if name not in known])
            sums += _parts(self._phase(state, phase.name), OF_THE_OPTIMIZER)
            if "gradients" not in elsewhere:
                sums += _parts(self._phase(update, phase.name), ["gradients"])
            found[phase.name] = sums
        return found

    def _gradients(self, rung: Rung) -> float:
        """Of `train`, at its peak: between the parts of a batch all of them are there."""
        if rung.fused_backward:
            return self._train(self._of("fused_backward", True)).parts.get("gradients", 0)
        if rung.micro_batch:
            return max(p.parts.get("gradients", 0) for p in self._look(self.start).phases)
        none, every = (self._train(r).parts.get("gradients", 0) for r in (self.start, self.deep))
        return self._between(rung.checkpointing, none, every)

    def _of(self, name: str, value: object) -> Rung:
        """An anchor with this setting; the first that has it, of those without blocks aside."""
        return next(
            rung
            for rung in sorted(self.anchors, key=lambda each: each.blocks != self.start.blocks)
            if getattr(rung, name) == value
        )

    def _phase(self, rung: Rung, name: str) -> plan.Phase:
        return next(phase for phase in self._look(rung).phases if phase.name == name)

    def _train(self, rung: Rung) -> plan.Phase:
        return self._phase(rung, "train")


def ordered(
    estimates: Estimates, apart: frozenset[str], room: float, finest: float, step: float
) -> Iterator[Rung]:
    """Rungs worth a look, the quickest first: each needs less than all before it, by `step` of it
    at least, and takes longer, or alters more. Those that save all they can are among them; of
    others none that needs more than `room` bytes on the host.

    Times that differ by less than `finest` of the first rung's are the same. Of those alike, what
    alters the result comes last, weights in fewer bits last of all; then what saves later.
    """
    choices = estimates.choices
    fastest = estimates.seconds(choices.first)

    def key(rung: Rung) -> tuple[object, ...]:
        return rank(choices, rung, estimates.seconds(rung) / fastest, finest)

    least = float("inf")
    for rung in sorted(choices.every(), key=key):
        if rung not in estimates.ends and rung != choices.first and estimates.host(rung) > room:
            continue
        needed = estimates.peak(rung, apart)
        if needed < least * (1 - step) or rung in estimates.ends:
            yield rung
            least = min(least, needed)


def rank(choices: Choices, rung: Rung, time: float, finest: float) -> tuple[object, ...]:
    """By which a rung is better than others: its `time`, as a share of the first one's, then how
    little it alters."""
    time = max(time, 1.0)
    return (round(time / finest), *altered(choices, rung), time, choices.place(rung))


def altered(choices: Choices, rung: Rung) -> tuple[int, int, bool]:
    """How much the result is altered: by the base's bits, the optimizer's, the order of sums."""
    return (
        choices.quantize.index(rung.quantize),
        choices.optimizer.index(rung.optimizer),
        rung.micro_batch != choices.micro_batch[0],
    )


def host_bytes(found: Simulation) -> int:
    """Bytes on the host in a step."""
    return next((p.host_bytes for p in found.phases if p.name == "train"), 0)


def _parts(phase: plan.Phase, names: Iterable[str]) -> int:
    return sum(phase.parts.get(name, 0) for name in names)
