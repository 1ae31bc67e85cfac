"""Sampling steps that are not simulated, against the same ones simulated."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compiler.families import FAMILIES
from runtime.memory.again import Again
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.tracker import Tracker
from tests.runtime.memory_cases import small

RUN = ("z_image",)  # answers with a list


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"sana_sprint"}))  # that draws in one
def test_left_out_steps_have_the_course_of_those_that_are_run(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ((128, 192), (192, 128))  # as many places, and other shapes
    step = small(family, rank=4, compute="bfloat16", pictures=sizes, guidance=4.5)
    shape = step.shapes[0]
    left: list[Any] = []
    complete = Again.complete

    def counted(self: Again, curves: Any) -> Any:
        left.extend(self._like)
        return complete(self, curves)

    monkeypatch.setattr(Again, "complete", counted)
    monkeypatch.setattr("runtime.memory.beside.possible", lambda: False)
    short = RuntimeMemoryModel().course(step, shape)
    assert bool(left) == (family not in RUN)
    monkeypatch.setattr(Again, "_learn", lambda *_: None)
    whole = RuntimeMemoryModel().course(step, shape)
    assert len(short.validate) == len(whole.validate)
    for one, other in zip(short.validate, whole.validate, strict=True):
        assert one.categories == other.categories
        for name in ("sizes", "live", "hosts", "turns"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


class Odd(nn.Module):
    """What it leaves, and how it answers, is not always the same."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.kept: list[torch.Tensor] = []

    def forward(self, given: torch.Tensor, how: Hashable = None, **more: Any) -> Any:
        self.runs += 1
        if how == "keeps":
            self.kept.append(given + 1)
        if how == "a view":
            return (given[:1],)
        return given * 2 if how == "bare" else (given * 2,)


@pytest.mark.parametrize(
    ("first", "second", "runs"),
    [
        (("x", {}), ("x", {}), 1),
        (("x", {"of": {"a": "x"}}), ("x", {"of": {"a": "x"}}), 1),
        (("x", {"of": {"a": "x"}}), ("x", {"of": {"a": "y"}}), 2),
        (("x", {"of": [1, 2]}), ("x", {"of": [1, 3]}), 2),
        (("x", {"of": "step 1"}), ("x", {"of": "step 2"}), 1),
        (("x", {"of": "values"}), ("x", {"of": "values"}), 2),
        (("x", {"of": {1}}), ("x", {"of": {1}}), 2),
        (("x", {}), ("y", {}), 2),
        (("x", {"how": "keeps"}), ("x", {"how": "keeps"}), 2),
        (("x", {"how": "a view"}), ("x", {"how": "a view"}), 2),
        (("x", {"how": "bare"}), ("x", {"how": "bare"}), 2),
    ],
)
def test_only_passes_known_to_be_alike_are_left_out(first: Any, second: Any, runs: int) -> None:
    tensors = {"x": torch.empty(4, 8, device="meta"), "y": torch.empty(2, 8, device="meta")}
    tensors |= {"step 1": torch.tensor(1), "step 2": torch.tensor(2), "values": torch.ones(2)}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(each) for name, each in value.items()}
        return tensors.get(value, value) if isinstance(value, str) else value

    model, again, tracker = Odd(), Again(), Tracker({"meta"})
    with tracker:
        tracker.register(tensors.values(), "given")
        with again.left_out(model, tracker):
            for name, options in (first, second):
                tracker.mark()
                out = model(filled(name), **filled(options))
                out = out if isinstance(out, torch.Tensor) else out[0]
                assert out.shape[1] == 8
                del out
                tracker.mark()
    assert model.runs == runs and "forward" not in vars(model)
    one, other = again.complete(tracker.curves())[1:4:2]
    if runs == 1:
        assert np.array_equal(one.live, other.live) and one.peak == other.peak > 0
