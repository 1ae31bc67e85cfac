"""Steps that train text encoders too: simulated as measured, byte for byte."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from attrs import evolve

from compiler.adapters import CLIP_TARGETS, INVERSION
from compiler.families import FAMILIES
from compiler.memory import Candidate
from compiler.plan import Adapter, Embeddings, NewToken, TextTraining
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.step import run_step
from runtime.memory.tracker import Tracker
from tests.runtime.memory_cases import small
from tests.runtime.test_memory_depth import check, deep

MODEL, CPU = RuntimeMemoryModel(), torch.device("cpu")
TRAINING = sorted(name for name, card in FAMILIES.items() if card.trainable_encoders)
CASES = [(4, 1.0, "float32"), (4, 0.5, "bfloat16"), (0, 1.0, "float32")]
QUICK = [(name, *case) for name, case in zip(("sdxl", "sd", "sd3"), CASES, strict=True)]
WHOLE = bool(os.environ.get("TUNER_WHOLE_MATRIX"))  # else each family with one of the cases
OTHERS = TRAINING if WHOLE else sorted(set(TRAINING) - {name for name, *_ in QUICK})
SLOW = [
    (name, *case)
    for number, name in enumerate(OTHERS, 1)
    for case in (CASES if WHOLE else CASES[number % 3 :][:1])
    if (name, *case) not in QUICK
]


def case(family: str, *, rank: int = 4, share: float = 1.0, **settings: Any) -> Candidate:
    """A step with all of the family's CLIPs in it; `share` of the learning rate is theirs."""
    pictures, evaluated = ((128, 128),), ((256, 256, 2),)
    given = {"pictures": pictures, "evaluated": evaluated, "rank": rank, "tokens": 77}
    step = small(family, **{**given, **settings})
    adapter = step.adapter and evolve(step.adapter, targets=CLIP_TARGETS["all-linear"])
    facts = TextTraining(
        encoders=FAMILIES[family].trainable_encoders,
        adapter=adapter,
        lr=share * step.optimizer.lr,
        until=10,
    )
    return evolve(step, text_training=facts)


@pytest.mark.parametrize(
    ("family", "rank", "share", "compute"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_steps(family: str, rank: int, share: float, compute: str) -> None:
    step = case(family, rank=rank, share=share, compute=compute, optimizer="adamw")
    simulated = MODEL.course(step, step.shapes[0])
    measured = run_step(step, step.shapes[0], CPU, Tracker({"cpu"}))
    phases = ("load", "train_peak", "update_peak", "save", "evaluate_peak", "validate_peak")
    for phase in phases:
        assert getattr(simulated, phase) == getattr(measured, phase), phase
    assert simulated.trainable == measured.trainable
    without = MODEL.course(evolve(step, text_training=None), step.shapes[0])
    assert simulated.peak == measured.peak > without.peak
    assert simulated.trainable > without.trainable


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("alone", [True, False])
def test_new_tokens(family: str, alone: bool) -> None:
    step = case(family, rank=4, compute="bfloat16", trained="float32", share=0.5)
    facts = Embeddings(
        encoders=tuple(FAMILIES[family].embedding_keys),
        tokens=(NewToken(token="<x>", vectors=3), NewToken(token="<y>", vectors=1)),
        lr=2 * step.optimizer.lr,
        until=10,
    )
    inversion = Adapter(kind=INVERSION, rank=0, alpha=0.0, dropout=0.0, init="", targets=())
    step = evolve(step, embeddings=facts)
    if alone:
        step = evolve(step, adapter=inversion, text_training=None)
    simulated = MODEL.course(step, step.shapes[0])
    measured = run_step(step, step.shapes[0], CPU, Tracker({"cpu"}))
    for phase in ("load", "train_peak", "update_peak", "save", "evaluate_peak", "validate_peak"):
        assert getattr(simulated, phase) == getattr(measured, phase), phase
    assert simulated.peak == measured.peak
    if alone:
        widths = {"sd": 48, "sdxl": 48 + 32}
        assert simulated.trainable == measured.trainable == 4 * widths[family]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4, "checkpointing": 1},
        {"rank": 4, "optimizer": "radam", "fused": False},
        {"trained": "float32", "checkpointing": 1},
    ],
)
def test_deep_models_follow_from_shallow_ones(options: dict[str, Any]) -> None:
    step = deep("sd3", 20, **options)
    encoders = FAMILIES["sd3"].trainable_encoders
    adapter = step.adapter and evolve(step.adapter, targets=CLIP_TARGETS["all-linear"])
    facts = TextTraining(encoders=encoders, adapter=adapter, lr=1e-5, until=3)
    check(evolve(step, text_training=facts))
