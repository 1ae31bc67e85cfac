"""What a step with each kind of adapter allocates: simulated on meta tensors, and measured."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from compiler.adapters import ADAPTERS, LAYERED, AdapterKind
from compiler.plan import Component
from tests.runtime.memory_cases import small
from tests.runtime.test_memory_exact import check

CHANGES: dict[str, dict[str, Any]] = {
    "lora": {"init": "orthogonal"},
    "dora": {"dropout": 0.2},
    "dylora": {"dropout": 0.2, "block_size": 2},
    "lokr": {"rank_dropout": 0.2, "init": "", "decompose_both": True},
    "loha": {"rank_dropout": 0.2, "init": ""},
    "glora": {"init": ""},
    "ia3": {"rank": 0, "alpha": 0.0, "init": ""},
    "full": {"rank": 0, "alpha": 0.0, "init": ""},
    "oft": {"rank": 0, "alpha": 0.0, "init": "", "block_size": 8, "dropout": 0.5},
    "boft": {"rank": 0, "alpha": 0.0, "init": "", "block_size": 8, "butterfly_factors": 2},
}


@pytest.mark.parametrize("kind", LAYERED)
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_steps(kind: AdapterKind, checkpointing: int) -> None:
    case = small("sana", rank=4, checkpointing=checkpointing)
    assert case.adapter is not None
    check(evolve(case, adapter=evolve(case.adapter, kind=kind, **CHANGES[kind])))


@pytest.mark.parametrize("kind", ["lokr", "loha"])
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_with_lengths_of_rows_apart(kind: AdapterKind, checkpointing: int) -> None:
    case = small("sana", rank=4, checkpointing=checkpointing)
    assert case.adapter is not None
    changes = {**CHANGES[kind], "weight_decompose": True}
    check(evolve(case, adapter=evolve(case.adapter, kind=kind, **changes)))


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_with_a_rank_that_depends_on_the_noise(checkpointing: int) -> None:
    case = small("sana", rank=4, checkpointing=checkpointing)
    assert case.adapter is not None
    check(evolve(case, adapter=evolve(case.adapter, min_rank=1)))


@pytest.mark.parametrize("kind", ["glora", "full"])
def test_with_norms(kind: AdapterKind) -> None:
    case = small("sd", rank=4)
    assert case.adapter is not None
    check(evolve(case, adapter=evolve(case.adapter, kind=kind, train_norm=True, **CHANGES[kind])))


@pytest.mark.parametrize(
    ("kind", "more"),
    [*((kind, {}) for kind in LAYERED), ("lokr", {"weight_decompose": True})],
)
def test_on_a_quantised_base(kind: AdapterKind, more: dict[str, Any]) -> None:
    case = small("sd3", rank=4)
    assert case.adapter is not None

    def quantised(part: Component) -> Component:
        return evolve(part, quantize="int8") if part.name == "transformer" else part

    model = evolve(case.model, components=tuple(map(quantised, case.model.components)))
    changes = {**CHANGES[kind], **more, "init": "gaussian" if ADAPTERS[kind].inits else ""}
    check(evolve(case, model=model, adapter=evolve(case.adapter, kind=kind, **changes)))
