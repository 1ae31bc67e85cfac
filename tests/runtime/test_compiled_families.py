"""Every family's blocks compile, each as a whole, and give what they gave; see `test_speed`."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from attrs import evolve
from torch._dynamo.utils import counters

from compiler.families import FAMILIES
from compiler.plan import Speed
from runtime import speed as speed_module
from runtime.speed import speed_up
from runtime.step import micro_step
from tests.runtime.memory_cases import small
from tests.runtime.replay import FP32
from tests.runtime.test_fused_projections import example, model_of

CONFIG: Any = torch._dynamo.config
COMPILED = [name for name, card in sorted(FAMILIES.items()) if not card.not_compiled]
SOME = ["flux", "lumina2", "pixart"]  # all of them where the whole matrix is asked for
EVERY = COMPILED if os.environ.get("TUNER_WHOLE_MATRIX") else SOME
LONGER = 40  # tokens; the examples have 32


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        ("qwen_image", True),
        ("qwen_image", False),  # as a batch of one is
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in EVERY),
    ],
)
def test_blocks_compile_and_padded_prompts_change_nothing(
    name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(speed_module, "BACKEND", "eager")  # graphs are made and run as they are
    given, objective = example(name), small(name).objective
    if not masked:
        text = {k: tensor for k, tensor in given.text.items() if "mask" not in k}
        assert text.keys() < given.text.keys()
        given = evolve(given, text=text)
    family, plain = model_of(name)
    _, quick = model_of(name)
    expected = micro_step(family, plain.model, given, objective, FP32, 2)
    tokens = LONGER if family.card.unpadded_text else 0
    with CONFIG.patch(recompile_limit=200, accumulated_recompile_limit=1000):
        speed_up(quick.model, family.card, Speed(compile="regional", tokens=tokens))
        found = micro_step(family, quick.model, given, objective, FP32, 2)
    assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
