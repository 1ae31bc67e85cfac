"""How few blocks tell what a deep model needs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from attrs import evolve, frozen

from compiler.families import FAMILIES
from compiler.memory import Candidate
from runtime.offload.activations import AHEAD

PERIODS = 4
"""Of the shallowest model. The first blocks' passes differ (nothing asks for the gradient of what
they are given), and so do the last ones' (no gradient is there yet to be added to); two periods
between them are like all others. Activations that come back from the host ahead of time make as
many more at the end differ."""


@frozen(kw_only=True)
class Shallow:
    """A shallow model's candidate; others with one period of blocks more in one run of equal
    blocks, and how many periods the deep model has there more than the shallow one."""

    base: Candidate
    longer: Sequence[tuple[Candidate, int]]


def shallow(candidate: Candidate) -> Shallow | None:
    """Candidates from which `candidate` follows; None where it is to be simulated whole.

    A period is as many blocks as activation checkpointing takes to repeat itself. Where some blocks
    wait on the host they are spread over the depth and have no period; weights that are updated
    in the backward pass leave a number each, whose bytes are rounded together.
    """
    card = FAMILIES[candidate.model.family]
    layout = candidate.layout
    if card.runs is None or layout.fused_backward:
        return None
    config = json.loads(candidate.model.configs[card.trained_component])
    blocks = sum(int(config.get(key) or 0) for key in card.depth_keys)
    if 0 < layout.offload_blocks < blocks:
        return None
    deep = card.runs(config)
    if deep is None:
        return None
    period = max(1, layout.activation_checkpointing)
    periods = PERIODS + (AHEAD if layout.offload_activations else 0) + bool(layout.offload_blocks)
    few = [min(count, count % period + periods * period) for count in deep]
    more = [index for index, count in enumerate(deep) if count > few[index]]
    if not more or sum(few) * (1 + len(more)) + period * len(more) >= sum(deep):
        return None

    def of(counts: Sequence[int]) -> Candidate:
        configs = dict(candidate.model.configs)
        configs[card.trained_component] = json.dumps(card.shortened(config, counts))
        return evolve(candidate, model=evolve(candidate.model, configs=configs))

    longer = []
    for index in more:
        counts = [count + period * (place == index) for place, count in enumerate(few)]
        longer.append((of(counts), (deep[index] - few[index]) // period))
    return Shallow(base=of(few), longer=longer)
