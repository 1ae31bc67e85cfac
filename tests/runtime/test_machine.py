"""What is seen of a machine, from recorded answers of the tools it asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import machine

ROOT = Path(__file__).parents[2]
ROWS = [
    ["0", "GPU-aaaa", "NVIDIA H200", "143771", "143155", "9.0", "580.65"],
    ["1", "GPU-bbbb", "NVIDIA RTX A2000", "12282", "11000", "8.6", "580.65"],
]


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A machine with two CUDA devices and a torch that can use them."""
    tool = tmp_path / "nvidia-smi"
    lines = "\n".join(", ".join(row) for row in ROWS)
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "version", lambda package: "2.13.0+cu130")
    return tool


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands for the tool")
def test_cuda(smi, monkeypatch):
    seen = machine.look()
    assert (seen.device, seen.device_name, seen.capability) == ("cuda", "NVIDIA H200", "9.0")
    assert seen.device_total_bytes == 143771 * 2**20
    assert seen.device_free_bytes == 143155 * 2**20
    assert seen.bf16
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine.look().device_name == "NVIDIA RTX A2000"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.look().device == "cpu"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands for the tool")
def test_a_driver_that_does_not_answer_is_no_device(smi):
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    assert machine.cuda_devices() == []
    assert machine.look().device == "cpu"


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (None, ["NVIDIA H200", "NVIDIA RTX A2000"]),
        ("1,0", ["NVIDIA RTX A2000", "NVIDIA H200"]),
        ("GPU-bb", ["NVIDIA RTX A2000"]),
        ("0,7,1", ["NVIDIA H200"]),
        ("-1", []),
        ("", []),
    ],
)
def test_visible_devices_as_cuda_reads_them(chosen, names):
    assert [gpu.name for gpu in machine.visible(ROWS, chosen)] == names


def test_a_device_that_does_not_tell_its_memory():
    (gpu,) = machine.visible([["0", "u", "GB10", "[N/A]", "[N/A]", "12.1", "580"]], None)
    assert gpu.total_bytes == 0


@pytest.mark.parametrize(
    ("label", "usable"), [("2.13.0+cpu", False), ("2.13.0+cu130", True), ("2.9.1+rocm6.4", False)]
)
def test_a_torch_built_for_the_processor_uses_no_cuda(monkeypatch, label, usable):
    monkeypatch.setattr(machine, "version", lambda package: label)
    assert machine.torch_may_use("cuda") is usable


def test_host_memory_and_cores_are_the_system_s():
    total, free = machine.host_memory()
    assert 0 < free <= total
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)


def test_facts(tmp_path):
    found = machine.facts(tmp_path / "not" / "there", deep=True)
    assert found["versions"]["torch"] == found["torch"]["version"]
    assert found["disk"]["free_bytes"] > 0
    assert found["machine"]["cores"] >= 1


def test_looking_imports_no_torch():
    script = (
        "import sys; from runtime import machine; machine.look(); machine.facts(machine.Path('.'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script + "; print('torch' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["cpu MHz\t\t: 2500.000", "flags\t\t: fpu avx2 avx512f"], 160e9),  # 2 x 2 x 16 x 2.5e9
        (["cpu MHz : 3000.0", "flags : fpu avx2"], 96e9),
        (["cpu MHz : 3000.0", "flags : fpu sse2"], 0.0),
        (["Features : asimd"], 0.0),  # ARM kernels tell no clock
        ([], 0.0),
    ],
)
def test_the_processors_nominal_peak(lines, expected, monkeypatch):
    monkeypatch.setattr(machine, "_cpuinfo", lambda: lines)
    assert machine.processor_flops() == pytest.approx(expected)
