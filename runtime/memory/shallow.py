"""How few blocks tell what a deep model needs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from attrs import evolve, frozen

from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from compiler.memory import Candidate
from compiler.plan import Adapter, Model
from runtime.build import recomputed
from runtime.memory.grown import Growth, growth
from runtime.memory.repeat import Run
from runtime.offload.activations import AHEAD
from runtime.offload.blocks import chosen

BEFORE, AFTER = 2, 2
"""Blocks on either side of one that what its passes do may depend on. The first block's passes
differ (nothing asks for the gradient of what it is given), so does what the second one's free, and
the last one's (no gradient is there yet to be added to). With one more behind, the shallow model
has two blocks of a kind somewhere, which are compared."""
SAME = re.compile(
    r"(?:[A-Za-z_]+[0-9]*|\[[A-Za-z]+\]|(?:to_out|net)\\?\.[0-9]|\\\.|\.\*|\\d\+(?!\\d)|[|()])*"
)
"""Patterns of module names that can't tell one number of a block from another."""
WORTH = 0.9  # of the deep model's blocks: with more in the shallow one, it is no quicker


@frozen(kw_only=True)
class Shallow:
    """A model in which each block of the deep one has its like: a block of the same kind between
    blocks of the same kinds. None of them waits on the host."""

    base: Candidate
    recomputed: Sequence[int]  # numbers of its blocks
    runs: Sequence[Run]
    growth: Growth | None  # how it is built, if not as any other
    waiting: Mapping[int, int]
    """The deep model's blocks that wait, in order, and which one here each of them is like."""

    @property
    def further(self) -> Mapping[int, int]:
        """How many more blocks of the deep model each of its blocks stands for."""
        found = Counter(number for run in self.runs for number in run.order)
        return {number: count - 1 for number, count in found.items() if count > 1}


def shallow(candidate: Candidate) -> Shallow | None:
    """What the course of `candidate` follows from; None where it is to be simulated whole."""
    card = FAMILIES[candidate.model.family]
    layout = candidate.layout
    if card.runs is None or candidate.sprint is not None:  # heads are on single blocks
        return None
    if candidate.adapter is not None and not _alike(candidate.adapter, card):
        return None
    precision = candidate.precision
    if (
        candidate.fused_projections
        and candidate.adapter is None
        and precision.compute == precision.trained
    ):
        return None  # gradients of one projection's parts lie in one storage
    config = json.loads(candidate.model.configs[card.trained_component])
    counts, depth = card.runs(config), card.depth(config)
    if counts is None:
        return None
    again = set(recomputed(depth, layout.activation_checkpointing))
    waits = chosen(depth, layout.offload_blocks) if layout.offload_blocks else []
    before, after = BEFORE, AFTER
    if layout.offload_activations:  # they come back ahead of time, one a block at least
        before, after = before + AHEAD - 1, after + AHEAD - 1
    places = _places(card, config, counts)
    word = _word(places, again)
    wide = _contexts(word, before, after)
    kept = _kept(word, wide, before, after)
    if len(kept) > WORTH * depth:
        return None
    few = [len({word[n].inside for n in kept if word[n].run == run}) for run in range(len(counts))]
    try:
        short = card.shortened(config, few)
    except AssertionError:  # two of its runs can't have other numbers than each other
        return None
    number_of = {number: place for place, number in enumerate(kept)}
    base = evolve(
        candidate,
        model=_with(candidate.model, short),
        layout=evolve(layout, offload_blocks=0),
    )
    like = {wide[n]: number_of[n] for n in kept}
    return Shallow(
        base=base,
        growth=_growth(base, places, few),
        recomputed=[number_of[n] for n in kept if n in again],
        runs=list(_runs(word, wide, _contexts(word, before, after - 1), number_of)),
        waiting={number: like[wide[number]] for number in waits},
    )


def _growth(
    base: Candidate, places: Sequence[tuple[int | None, int]], few: Sequence[int]
) -> Growth | None:
    """From one block in each place of a run to so `few`."""
    if base.adapter is None or base.adapter.train_norm or max(few) == 1:
        return None  # most of what is built is the blocks' adapters
    card, ones = FAMILIES[base.model.family], [min(count, 1) for count in few]
    try:
        least = card.shortened(json.loads(base.model.configs[card.trained_component]), ones)
    except AssertionError:
        return None
    counts: list[int] = []
    for run, count in places:
        counts += [1] * count if run is None else [few[run]] * ones[run]
    return growth(_with(base.model, least), counts, card.blocks, base.model)


def _with(model: Model, config: Mapping[str, Any]) -> Model:
    """With another configuration of what is trained."""
    return evolve(model, configs={**model.configs, model.trained_component: json.dumps(config)})


@frozen
class _Letter:
    """A block of the deep model."""

    run: int | None
    place: int  # number of the place where its run is
    inside: int  # its number there
    kind: Hashable  # what it is like, without its number


def _places(
    card: FamilyCard, config: Mapping[str, Any], counts: Sequence[int]
) -> Sequence[tuple[int | None, int]]:
    """See `FamilyCard.places`."""
    if card.places is not None:
        return card.places(config)
    return [*enumerate(counts), (None, card.depth(config) - sum(counts))]


def _word(places: Sequence[tuple[int | None, int]], again: set[int]) -> list[_Letter]:
    """The blocks of the deep model, of which those with numbers in `again` are recomputed."""
    word: list[_Letter] = []
    for place, (run, count) in enumerate(places):
        for inside in range(count):
            number = len(word)
            kind = (place, number in again)
            word.append(_Letter(run, place, inside, kind if run is not None else (number, kind)))
    return word


def _contexts(word: Sequence[_Letter], before: int, after: int) -> list[int]:
    """Of each block, what it is like and what so many on either side of it are like: equal numbers
    for equal ones."""
    kinds: list[Hashable] = [None] * before + [each.kind for each in word] + [None] * after
    known: dict[Hashable, int] = {}
    return [
        known.setdefault(tuple(kinds[n : n + before + 1 + after]), len(known))
        for n in range(len(word))
    ]


def _kept(word: Sequence[_Letter], wide: Sequence[int], before: int, after: int) -> list[int]:
    """The numbers of the blocks in the shallow model: as many as can be are left out, so that the
    rest have all contexts of the deep one, and no others."""
    kept = list(range(len(word)))
    runs = sorted({each.run for each in word if each.run is not None})
    for run in runs:
        while (cut := _cut(word, kept, wide, run, before, after)) is not None:
            kept = cut
    return kept


def _cut(
    word: Sequence[_Letter],
    kept: Sequence[int],
    wide: Sequence[int],
    run: int,
    before: int,
    after: int,
) -> list[int] | None:
    """`kept` with fewer blocks in each place of `run`, the same ones in each; None if none can be
    left out."""
    places: dict[int, list[int]] = {}
    for index, number in enumerate(kept):
        if word[number].run == run:
            places.setdefault(word[number].place, []).append(index)
    count = min(map(len, places.values()), default=0)
    # What follows a place where blocks are left out has to be what follows the last of them.
    padded = [None] * before + [word[n].kind for n in kept] + [None] * after
    keys = [tuple(padded[n : n + before + after]) for n in range(len(kept) + 1)]
    every = {wide[number] for number in kept}
    for length in range(count - 1, 0, -1):
        for start in range(count - length + 1):
            spans = [(at[0] + start, at[0] + start + length) for at in places.values()]
            if any(keys[a] != keys[b] for a, b in spans):
                continue
            out = {kept[n] for a, b in spans for n in range(a, b)}
            left = [number for number in kept if number not in out]
            if {wide[number] for number in left} == every:
                return left
    return None


def _runs(
    word: Sequence[_Letter],
    wide: Sequence[int],
    narrow: Sequence[int],
    number_of: Mapping[int, int],
) -> Iterator[Run]:
    """Each place of a run that is shorter in the shallow model. `number_of` its blocks there."""
    counts = Counter(each.place for each in word)
    ends = list(accumulate(counts[place] for place in sorted(counts)))
    for place, end in zip(sorted(counts), ends, strict=True):
        numbers = range(end - counts[place], end)
        kept = [n for n in numbers if n in number_of]
        if len(kept) == len(numbers):
            continue
        like = {wide[n]: n for n in kept}
        yield Run(
            kinds={number_of[n]: narrow[n] for n in kept},
            order=tuple(number_of[n if n in number_of else like[wide[n]]] for n in numbers),
        )


def _alike(adapter: Adapter, card: FamilyCard) -> bool:
    """Whether every block is certain to be adapted as the others are."""
    own = {pattern for patterns in card.target_sets.values() for pattern in patterns}
    given = (*adapter.targets, *adapter.exclude, *(ranked.pattern for ranked in adapter.ranks))
    return all(pattern in own or SAME.fullmatch(pattern) for pattern in given)
