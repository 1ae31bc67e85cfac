"""What each combination of settings needs, and how long it takes, told from a few simulations.

A phase is the sum of its parts, and each setting has its say in one part or two: so the parts of a
few simulated rungs, the anchors, tell those of all. What is recomputed, or is left on the device,
counts in proportion. Anchors do not depend on the budget; nor, therefore, does any estimate, and
what is chosen by them never gets slower with a larger budget. An anchor's own estimate is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache

from attrs import evolve

from compiler import plan
from compiler.memory import Simulation
from compiler.passes.ladder import Choices, Rung
from compiler.passes.modelled_time import Clock

OF_A_BATCH = ("activations", "batch")  # parts of `train` that grow with what is in a batch
OF_THE_OPTIMIZER = ("optimizer", "workspace")

Look = Callable[[Rung], Simulation]


class Estimates:
    """Bytes and seconds of any rung of `choices`. Making it simulates the anchors: up to five."""

    def __init__(self, choices: Choices, look: Look, clock: Callable[[int], Clock]) -> None:
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
        self.anchors = dict.fromkeys([first, self.deep, self.aside, *self.ends])
        for rung in self.anchors:
            look(rung)
        self.clock = clock(look(first).parameters)
        self.largest = self.clock.largest
        self._rest = cache(self._rest_of)
        self._batch = cache(self._batch_bytes)
        self._weights = cache(self._weights_saved)

    def peak(self, rung: Rung, apart: frozenset[str]) -> float:
        """Bytes of the phase that needs most, of all but those named `apart`."""
        if rung in self.anchors:
            found = self._look(rung).phases
            return max(phase.device_bytes for phase in found if phase.name not in apart)
        saved = self._weights(rung.quantize, rung.blocks)
        others = self._rest(rung.quantize, rung.optimizer, rung.fused_backward)
        train = self._batch(rung.checkpointing, rung.activations, rung.micro_batch)
        sums = (
            others[name] - saved + (train + self._gradients(rung) if name == "train" else 0)
            for name in others
            if name not in apart
        )
        return max(sums)

    def seconds(self, rung: Rung) -> float:
        """Modelled time of a step."""
        flops = self._between(rung.checkpointing, self._flops(self.start), self._flops(self.deep))
        return self.clock.seconds(rung, flops, self.waiting(rung))

    def waiting(self, rung: Rung) -> float:
        """Bytes on the host in a step, beyond those of the first rung."""
        if rung in self.anchors:
            return self._host(rung) - self._host(self.start)
        blocks = self._weights(rung.quantize, rung.blocks)
        if rung.activations == self.start.activations:
            return blocks
        whole = self._host(self.aside) - self._host(self.start)
        end = self.ends[0]
        kept = self._weights(end.quantize, end.blocks)
        least = (self._host(end) - self._host(self.start) - kept) / self._share(end.micro_batch)
        least = min(max(least, 0), whole)
        crossing = self._between(rung.checkpointing, whole, least)
        return blocks + crossing * self._share(rung.micro_batch)

    def _between(self, interval: int, none: float, every: float) -> float:
        """In proportion to the blocks that are recomputed; `none` of those of the first rung."""
        start, end, here = (
            1 / each if each else 0.0
            for each in (self.start.checkpointing, self.deep.checkpointing, interval)
        )
        return none + (every - none) * (here - start) / (end - start) if end > start else none

    def _share(self, micro_batch: int) -> float:
        return (micro_batch or self.largest) / (self.start.micro_batch or self.largest)

    def _batch_bytes(self, interval: int, aside: bool, micro_batch: int) -> float:
        """Of `train`: what grows with the batch."""
        none, every = self._batch_of(self.start), self._batch_of(self.deep)
        if aside != self.start.activations:
            end = self.ends[0]
            none = min(none, self._batch_of(self.aside))
            least = self._batch_of(end) / self._share(end.micro_batch)
            every = min(none, every, least)
        return self._between(interval, none, every) * self._share(micro_batch)

    def _batch_of(self, anchor: Rung) -> float:
        return _parts(self._train(anchor), OF_A_BATCH)

    def _weights_saved(self, quantize: plan.Quantisation, blocks: int) -> float:
        """Bytes that `blocks` more on the host take off the device, of weights in `quantize`."""
        end = self.ends[0]
        more = end.blocks - self.start.blocks
        if not more:
            return 0.0
        like = self._of("quantize", end.quantize)
        whole = self._train(like).parts.get("weights", 0)
        saved = whole - self._train(end).parts.get("weights", 0)
        mine = self._train(self._of("quantize", quantize)).parts.get("weights", 0)
        share = (blocks - self.start.blocks) / more
        return saved * share * (mine / whole if whole else 1.0)

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

    def _host(self, rung: Rung) -> int:
        return waiting_bytes(self._look(rung))

    def _flops(self, rung: Rung) -> int:
        return self._look(rung).flops


def ordered(
    estimates: Estimates, apart: frozenset[str], finest: float, step: float
) -> Iterator[Rung]:
    """Rungs worth a look, the quickest first: each needs less than all before it, by `step` of it
    at least, and takes longer, or alters more. Those that save all they can are among them.

    Times that differ by less than `finest` of the first rung's are the same. Of those alike, what
    alters the result comes last, weights in fewer bits last of all; then what saves later.
    """
    choices = estimates.choices
    fastest = estimates.seconds(choices.first)

    def key(rung: Rung) -> tuple[object, ...]:
        time = max(estimates.seconds(rung) / fastest, 1.0)
        return (round(time / finest), *altered(choices, rung), time, choices.place(rung))

    least = float("inf")
    for rung in sorted(choices.every(), key=key):
        needed = estimates.peak(rung, apart)
        if needed < least * (1 - step) or rung in estimates.ends:
            yield rung
            least = min(least, needed)


def altered(choices: Choices, rung: Rung) -> tuple[int, int, bool]:
    """How much the result is altered: by the base's bits, the optimizer's, the order of sums."""
    return (
        choices.quantize.index(rung.quantize),
        choices.optimizer.index(rung.optimizer),
        rung.micro_batch != choices.micro_batch[0],
    )


def waiting_bytes(found: Simulation) -> int:
    """Bytes on the host in a step."""
    return next((p.host_bytes for p in found.phases if p.name == "train"), 0)


def _parts(phase: plan.Phase, names: Iterable[str]) -> int:
    return sum(phase.parts.get(name, 0) for name in names)
