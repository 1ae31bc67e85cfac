"""How few blocks tell what a deep model needs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

from attrs import evolve, frozen

from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from compiler.memory import Candidate
from compiler.plan import Adapter
from runtime.offload.activations import AHEAD
from runtime.offload.blocks import spacing

PERIODS = 4
"""Of the shallowest model. The first blocks' passes differ (nothing asks for the gradient of what
they are given), and so do the last ones' (no gradient is there yet to be added to); two periods
between them are like all others, or one of several blocks. Activations that come back from the host
ahead of time, one a block at least, make as many more at the end differ."""
INSIDE = 2  # such periods of runs with other layers before and behind each of them
SAME = re.compile(
    r"(?:[A-Za-z_]+[0-9]*|\[[A-Za-z]+\]|(?:to_out|net)\\?\.[0-9]|\\\.|\.\*|\\d\+|[|()])*"
)
"""Patterns of module names that can't tell one number of a block from another."""
WORTH = 0.75  # of the deep model's blocks: with more in each of the shallow ones, it is no quicker


@frozen(kw_only=True)
class Shallow:
    """A shallow model's candidate; others with one period of blocks more in one run of equal
    blocks, and how many periods the deep model has there more than the shallow one."""

    base: Candidate
    longer: Sequence[tuple[Candidate, int]]
    together: bool  # one period more is one in each of several runs


def shallow(candidate: Candidate) -> Shallow | None:
    """Candidates from which `candidate` follows; None where it is to be simulated whole.

    A period is as many blocks as activation checkpointing, and the choice of blocks that wait on
    the host, take to repeat themselves. A choice that does not repeat itself has none.
    """
    card = FAMILIES[candidate.model.family]
    layout = candidate.layout
    if card.runs is None or candidate.sprint is not None:  # heads are on single blocks
        return None
    if candidate.adapter is not None and not _alike(candidate.adapter, card):
        return None
    config = json.loads(candidate.model.configs[card.trained_component])
    deep, blocks = card.runs(config), card.depth(config)
    apart = spacing(blocks, min(layout.offload_blocks, blocks))
    if deep is None or (layout.offload_blocks and not apart):
        return None
    period = math.lcm(max(1, layout.activation_checkpointing), max(1, apart))
    periods = INSIDE if card.runs_together else PERIODS - (period > 1)
    periods += bool(layout.offload_blocks)
    if layout.offload_activations:
        periods += math.ceil(AHEAD / period)
    few = [min(count, count % period + periods * period) for count in deep]
    more = [index for index, count in enumerate(deep) if count > few[index]]
    if not more or sum(few) + period >= WORTH * sum(deep):
        return None

    def of(counts: Sequence[int]) -> Candidate:
        short = card.shortened(config, counts)
        configs = {**candidate.model.configs, card.trained_component: json.dumps(short)}
        waiting = len(range(apart // 2, card.depth(short), apart)) if apart else 0
        return evolve(
            candidate,
            model=evolve(candidate.model, configs=configs),
            layout=evolve(layout, offload_blocks=waiting),
        )

    longer = []
    for index in more:
        counts = [count + period * (place == index) for place, count in enumerate(few)]
        longer.append((of(counts), (deep[index] - few[index]) // period))
    return Shallow(base=of(few), longer=longer, together=card.runs_together)


def _alike(adapter: Adapter, card: FamilyCard) -> bool:
    """Whether every block is certain to be adapted as the others are."""
    own = {pattern for patterns in card.target_sets.values() for pattern in patterns}
    given = (*adapter.targets, *adapter.exclude, *(ranked.pattern for ranked in adapter.ranks))
    return all(pattern in own or SAME.fullmatch(pattern) for pattern in given)
