"""LoRAs of a rank that changes, DyLoRA and T-LoRA: compiled, and on weights that are dealt out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from compiler.adapters import AdapterKind
from compiler.plan import Sharing
from runtime.events import Silent
from runtime.execute import execute
from tests.runtime.methods.test_kinds import adapter_of
from tests.runtime.test_ranks_run import make, place, start
from tests.runtime.test_speed import KINDS, REGIONAL, alike, counted, fresh, graphs, state
from tests.runtime.test_speed import made as built_on
from tests.runtime.test_speed import train as trained
from tests.runtime.test_zero import HERE, assert_as_alone, loaded, shared, stage
from tests.runtime.whole_runs import wait

__all__ = ["counted", "fresh", "loaded", "make", "place", "shared"]


CHANGES: list[tuple[AdapterKind, dict[str, Any]]] = [("dylora", {}), ("lora", {"min_rank": 1})]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "kind", "changes"), [("sana", *CHANGES[0]), ("sd3", *CHANGES[1])])
def test_all_ranks_are_one_graph(
    base: str,
    counted: None,
    kind: AdapterKind,
    changes: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    """And it moves the weights as the layers without a compiler do."""
    folder: Path = request.getfixturevalue(f"tiny_{base}")
    own = adapter_of(kind, folder.name, **changes)
    family, plain = built_on(folder, own)
    _, quick = built_on(folder, own, REGIONAL)
    begun = {name: each.clone() for name, each in state(plain).items()}
    drawn = 0.0
    for seed in range(4):
        for built in (plain, quick):
            trained(family, built, (1,), seed=seed)
        for nested in quick.nested:
            (level,) = nested._levels.values()
            assert level.shares is not None
            drawn += float(level.shares[0])
    assert not plain.nested or 4 < drawn < 8, "both ranks were drawn"
    assert graphs() == KINDS[folder.name]
    alike(plain, quick, begun, 1e-4)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "changes"), CHANGES)
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_ranks_that_share_weights_train_as_one_process_does(
    shared: Any, strategy: Any, kind: AdapterKind, changes: dict[str, Any]
) -> None:
    if strategy == "deepspeed" and not HERE:
        pytest.skip("needs deepspeed")
    sharing = stage(3) if strategy == "deepspeed" else Sharing(strategy=strategy)
    together, alone, manifest = shared("sd3", "lora", 2, 2, sharing=sharing, optimizer="sgd")
    own = adapter_of(kind, "sd3", **changes)
    together, alone = (evolve(plan, adapter=own) for plan in (together, alone))
    assert [wait(pid) for pid in start([(together, manifest)], 2)] == [0, 0]
    execute(alone, manifest, Silent())
    assert_as_alone(together, alone, 1e-5)
