"""The GPU benchmark of offloading, with the processor in the device's place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attrs import evolve

from benchmarks import gpu_offload as script
from compiler.memory import Candidate
from compiler.plan import Layout
from tests.runtime.memory_cases import small

CPU = torch.device("cpu")


def test_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2_000_000)
    base = small("sd3", rank=4)
    both = Layout(activation_checkpointing=1, offload_blocks=4, offload_activations=True)
    rows = [
        script.measured(base, CPU, 1, "nothing waits"),
        script.measured(evolve(base, layout=both), CPU, 1, "blocks and activations wait"),
    ]
    assert all(row.beside > 0 and row.in_turn > 0 for row in rows)
    slower = [evolve(rows[0], beside=0.5, in_turn=0.5), evolve(rows[1], beside=0.75, in_turn=1.0)]
    text = script.table(slower, ["- device: a fake"])
    assert "| nothing waits | 500.0 | 1.00 | 1.00 | 2.0 |" in text
    assert "| blocks and activations wait | 750.0 | 1.50 | 2.00 | 2.0 |" in text


def test_a_layout_that_fails_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also the first one, to which the others would be compared."""

    def measured(step: Candidate, device: torch.device, steps: int, name: str) -> script.Row:
        if not step.layout.offload_blocks:
            raise torch.OutOfMemoryError("CUDA out of memory | tried\nmore")
        return script.Row(name, 0.5, 0.75, 10**6)

    monkeypatch.setattr(script, "measured", measured)
    monkeypatch.setattr(script, "look", lambda: SimpleNamespace(device_name="A Fake"))
    monkeypatch.setattr(script, "head_of", lambda command: {"device": "a fake"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(script, "as_in_runs", lambda: None)
    monkeypatch.setattr("sys.argv", ["gpu_offload.py", "--out", str(tmp_path)])
    assert script.main() == script.FAILED
    text = (tmp_path / "gpu-offload-a-fake.md").read_text()
    assert "| nothing waits | failed: out of memory: CUDA out of memory / tried | | | |" in text
    assert "| 38 of 38 blocks wait | 500.0 | - | - | 1.0 |" in text


def test_its_layouts_go_from_nothing_to_all() -> None:
    found = dict(script.layouts())
    assert [layout.offload_blocks for layout in found.values()] == [0, 9, 19, 38, 0, 38]
    assert len(found) == 6


def test_it_is_refused_without_a_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_offload.py"])
    assert script.main() == 3
    assert "needs a CUDA device" in capsys.readouterr().err
