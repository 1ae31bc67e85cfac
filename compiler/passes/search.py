"""Looks for the settings that fit a budget and are the quickest, by simulating few of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import islice

from compiler import plan
from compiler.draft import Draft
from compiler.memory import Candidate, MemoryModel, Simulation, gib
from compiler.passes import ladder
from compiler.passes.estimates import Estimates, host_bytes, ordered, rank
from compiler.passes.ladder import Rung
from compiler.passes.modelled_time import Clock, clock, known_peak

ROOM = 0.7
"""Of a host's memory, what may be taken by what waits there: the system, the libraries and the
data's own buffers need the rest."""
FINEST = 0.01  # of the first rung's time: the plan shows no finer, and the model tells no finer
STEP = 0.02  # of what it needs, by which a rung has to need less to be worth a look
NEIGHBOURS = 3  # simulations at most to show a rung that needs less


class Search:
    """The rungs, the quickest first, and which of them is chosen.

    The order and the estimates are the same for every budget. The search starts at the first rung
    that is estimated to fit, goes on to slower ones until one does fit, or back to quicker ones as
    long as they fit. So whatever it ends at for one budget, it ends there or before for a larger;
    of all that it has looked at by then, the quickest that fits is chosen.
    """

    def __init__(self, *, draft: Draft, model: MemoryModel, base: Candidate, budget: int) -> None:
        self.draft, self.model, self.base, self.budget = draft, model, base, budget
        self.choices = ladder.choices(draft)
        self.first = self.choices.first
        self.found: dict[Rung, Simulation] = {}

    def run(self) -> Rung:
        """The quickest that fits; the thriftiest if none does. Raises ValueError."""
        only = self.choices.thriftiest() == (self.first,)
        if not self.budget or only or self.fits(self.first):
            return self.first
        if not any(map(self.fits, self.choices.thriftiest())):  # answered without the others
            return min(self.choices.thriftiest(), key=self.peak)
        start = self._estimated()
        fitting = (n for n in range(start, len(self.order)) if self._goes(self.order[n]))
        place = next(fitting, None)
        if place is None:
            return min(self.estimates.ends, key=self.peak)
        while place > 1 and self._goes(self.order[place - 1]):
            place -= 1
        self._look_beyond(place)
        return min(filter(self._goes, list(self.found)), key=self._rank)

    def _estimated(self) -> int:
        """The place of the first rung that is estimated to fit; else the last place."""
        for place, rung in enumerate(self.order):
            if self.estimates.peak(rung, self.apart) <= self.below:
                return place
        return len(self.order) - 1

    def _look_beyond(self, place: int) -> None:
        """Where the rung at `place` turned out slower than was estimated: look at some that come
        after it and are estimated to be quicker than it is."""
        taken = self._seconds(self.order[place])
        for rung in self.order[place + 1 :][:NEIGHBOURS]:
            if self.estimates.seconds(rung) + FINEST * self._seconds(self.first) < taken:
                self.look(rung)

    def _goes(self, rung: Rung) -> bool:
        """Whether a rung fits, and what waits on the host finds room there, where that is known."""
        return self.fits(rung) and host_bytes(self.look(rung)) <= self.room

    def _lacks_host(self, rung: Rung) -> bool:
        """Whether a rung would fit, if it were not for the host."""
        return self.fits(rung) and not self._goes(rung)

    @property
    def room(self) -> float:
        """Bytes on the host for each process, all on one machine, where that is known."""
        ranks = self.draft.steps.ranks if self.draft.steps else 1
        return ROOM * (self.draft.machine.host_total_bytes or float("inf")) / ranks

    @cached_property
    def estimates(self) -> Estimates:
        """Of this base; simulates the anchors."""
        return Estimates(self.choices, self.look, self._clock, self.room)

    @cached_property
    def order(self) -> tuple[Rung, ...]:
        """The rungs worth a look, the first rung first, then the quickest."""
        return tuple(ordered(self.estimates, self.apart, self.room, FINEST, STEP))

    def _clock(self, parameters: int) -> Clock:
        return clock(self.draft, parameters)

    def candidate(self, rung: Rung) -> Candidate:
        """What is simulated for `rung`."""
        return ladder.candidate_of(self.draft, self.base, rung)

    def look(self, rung: Rung) -> Simulation:
        """The simulation of `rung`; each is run once."""
        if rung not in self.found:
            self.found[rung] = self.model.simulate(self.candidate(rung))
        return self.found[rung]

    @property
    def below(self) -> int:
        """Bytes for all phases that the ladder has a say in."""
        return self.draft.train_below or self.budget

    def fits(self, rung: Rung) -> bool:
        """Whether no phase that the ladder has a say in exceeds the budget."""
        return not self.budget or self.peak(rung) <= self.below

    def peak(self, rung: Rung) -> int:
        """Bytes of the phase that needs most, of those that the ladder has a say in."""
        return max(p.device_bytes for p in self.look(rung).phases if p.name not in self.apart)

    @property
    def apart(self) -> frozenset[str]:
        """Phases that the ladder has no say in: those of text encoders, and of the latents."""
        assert self.draft.model is not None
        return frozenset({*self.draft.model.family.text_encoders, "latents"})

    def why(self, chosen: Rung) -> str:
        """The reason for `chosen`."""
        if not self.budget:
            return "no budget to fit"
        if not self.fits(chosen):
            return "the least memory there is; it still does not fit"
        if chosen == self.first:
            return f"nothing has to be saved to fit {gib(self.budget)}"
        fastest = f"the fastest tried that fits {gib(self.budget)}"
        if self._host_decides(chosen):
            fastest += f", and {gib(round(self.room))} of host memory"
        return fastest

    def _host_decides(self, chosen: Rung) -> bool:
        """Whether quicker ones are estimated to fit the device, but not the host."""
        taken, told = self._seconds(chosen) - self._noticed, self.estimates
        return any(
            told.seconds(rung) < taken
            and told.peak(rung, self.apart) <= self.below
            and told.host(rung) > self.room
            for rung in self.choices.every()
        )

    def seen(self, chosen: Rung) -> tuple[plan.Rung, ...]:
        """Rungs that were looked at: quicker ones that need more than `chosen`, and slower ones
        that need less, each less than the one before it. None where none fits."""
        if not self.budget or not self.fits(chosen):
            return ()
        rungs = [chosen, *self._single()] if chosen == self.first else self._around(chosen)
        if len(rungs) == 1:
            return ()
        fastest = self._seconds(self.first)
        return tuple(
            plan.Rung(
                settings=ladder.settings(self.draft, rung),
                peak_bytes=self.peak(rung),
                relative_time=round(self._seconds(rung) / fastest, 3),
                alters=ladder.alters(self.first, rung),
                chosen=rung == chosen,
            )
            for rung in rungs
        )

    def _single(self) -> list[Rung]:
        """The first saving alone that needs less than none."""
        for rung in islice(self.choices.in_turn(), NEIGHBOURS):
            if self.peak(rung) < self.peak(self.first):
                return [rung]
        return []

    def overhead(self, rung: Rung) -> float:
        """See `plan.Memory.overhead`."""
        if known_peak(self.draft) is None:
            return 1.0
        found = self.look(rung)
        return round(self._clock(found.parameters).overhead(rung, found), 3)

    def _seconds(self, rung: Rung) -> float:
        """Modelled time of a step of a rung that is looked at."""
        found = self.look(rung)
        return self._clock(found.parameters).taken(rung, found)

    def _rank(self, rung: Rung) -> tuple[object, ...]:
        time = self._seconds(rung) / self._seconds(self.first)
        return rank(self.choices, rung, time, FINEST)

    def _around(self, chosen: Rung) -> list[Rung]:
        needed, taken = self.peak(chosen), self._seconds(chosen)
        place = self.order.index(chosen) if chosen in self.order else -1
        later = (r for r in self.order[place + 1 :] if self._needed(r) < needed)
        for rung in islice(later, NEIGHBOURS):
            if self.peak(rung) < needed:
                break
        looked = sorted(self.found, key=self._rank)
        place = looked.index(chosen)
        quicker = [
            rung
            for rung in looked[:place]
            if rung == self.first
            or (self._seconds(rung) + self._noticed < taken and not self._lacks_host(rung))
        ]
        above = [rung for rung in self._falling(quicker) if self.peak(rung) > needed]
        rest = [rung for rung in looked[place:] if not self._beaten(rung)]
        below = [rung for rung in self._falling(rest) if self.peak(rung) < needed]
        return [*above, chosen, *below]

    def _needed(self, rung: Rung) -> float:
        """Its peak, estimated if it was not looked at."""
        return self.peak(rung) if rung in self.found else self.estimates.peak(rung, self.apart)

    def _beaten(self, rung: Rung) -> bool:
        """Whether another one is estimated to be quicker and to need no more."""
        taken, needed = self._seconds(rung), self.peak(rung)
        return any(
            self.estimates.seconds(other) + self._noticed < taken and self._needed(other) <= needed
            for other in self.order
            if other != rung
        )

    @property
    def _noticed(self) -> float:
        """Seconds by which a step has to differ."""
        return FINEST * self._seconds(self.first)

    def _falling(self, rungs: Sequence[Rung]) -> list[Rung]:
        """Without what needs no less than one before it."""
        found: list[Rung] = []
        for rung in rungs:
            if not found or self.peak(rung) < self.peak(found[-1]):
                found.append(rung)
        return found
