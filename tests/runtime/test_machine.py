"""What is seen of a machine, from recorded answers of the tools it asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import machine
from runtime.parts import parts_of

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


CARDS = [[*row, mode] for row, mode in zip(ROWS, ("Enabled", "[N/A]"), strict=True)]
LISTED = """\
GPU 0: NVIDIA H200 (UUID: GPU-aaaa)
  MIG 3g.71gb     Device  0: (UUID: MIG-1111-2222)
  MIG 1c.2g.35gb  Device  1: (UUID: MIG-3333-4444)
GPU 1: NVIDIA RTX A2000 (UUID: GPU-bbbb)
"""
TOLD = """\
<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <driver_version>580.65</driver_version>
  <gpu id="00000000:15:00.0">
    <mig_mode><current_mig>Enabled</current_mig></mig_mode>
    <mig_devices>
      <mig_device>
        <index>0</index>
        <gpu_instance_id>1</gpu_instance_id>
        <fb_memory_usage>
          <total>71424 MiB</total><reserved>0 MiB</reserved>
          <used>298 MiB</used><free>71126 MiB</free>
        </fb_memory_usage>
      </mig_device>
      <mig_device>
        <index>1</index>
        <fb_memory_usage><total>N/A</total><free>N/A</free></fb_memory_usage>
      </mig_device>
    </mig_devices>
    <uuid>GPU-aaaa</uuid>
  </gpu>
  <gpu id="00000000:16:00.0"><mig_devices>None</mig_devices><uuid>GPU-bbbb</uuid></gpu>
</nvidia_smi_log>
"""
FIRST, SECOND = "NVIDIA H200 MIG 3g.71gb", "NVIDIA H200 MIG 1c.2g.35gb"
NOT_LISTED = "NVIDIA H200 MIG part that nvidia-smi does not list"


def test_parts_of_a_device_by_name_and_memory():
    first, second = parts_of(LISTED, TOLD)
    assert (first.card, first.uuid, first.profile) == ("GPU-aaaa", "MIG-1111-2222", "3g.71gb")
    assert (first.total_bytes, first.free_bytes) == (71424 << 20, 71126 << 20)
    assert (second.uuid, second.total_bytes) == ("MIG-3333-4444", 0)
    assert [part.total_bytes for part in parts_of(LISTED, "")] == [0, 0]
    old = "GPU 0: A100 (UUID: GPU-9d)\n  MIG 4g.20gb Device 0: (UUID: MIG-GPU-9d/2/0)\n"
    assert [(p.card, p.uuid) for p in parts_of(old, TOLD)] == [("GPU-9d", "MIG-GPU-9d/2/0")]


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (None, [FIRST]),  # CUDA takes one part alone, and no whole device beside it
        ("1,0", [FIRST]),
        ("GPU-aaaa", [FIRST]),
        ("1", ["NVIDIA RTX A2000"]),
        ("MIG-1111-2222", [FIRST]),
        ("MIG-3333", [SECOND]),
        ("MIG-3333-4444,MIG-1111-2222", [SECOND]),
        ("MIG-9999", [NOT_LISTED]),
        ("MIG-9999,0", [NOT_LISTED]),
        ("MIG-9999,MIG-1111", [NOT_LISTED]),
        ("", []),
        ("-1,MIG-1111-2222", []),
    ],
)
def test_parts_of_devices_as_cuda_takes_them(chosen, names):
    seen = machine.visible(CARDS, chosen, parts_of(LISTED, TOLD))
    assert [gpu.name for gpu in seen] == names
    assert all(gpu.total_bytes < 143771 << 20 for gpu in seen)  # none is the whole device


@pytest.mark.parametrize(
    ("rows", "chosen", "names"),
    [
        (CARDS, None, ["NVIDIA RTX A2000"]),  # nothing of the first can be used
        (CARDS[:1], None, [NOT_LISTED]),
        (CARDS, "0", [NOT_LISTED]),
        ([], "MIG-1111", ["CUDA device MIG part that nvidia-smi does not list"]),
        ([], None, []),
    ],
)
def test_parts_that_are_not_listed_are_no_processor(rows, chosen, names):
    seen = machine.visible(rows, chosen)
    assert [gpu.name for gpu in seen] == names
    assert all((gpu.total_bytes, gpu.free_bytes) == (0, 0) for gpu in seen if "MIG" in gpu.name)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands for the tool")
def test_a_part_is_the_machine_s_device(smi, monkeypatch):
    rows = "\n".join(", ".join(row) for row in CARDS)
    answers = {"-L": LISTED, "-q": TOLD, "--query-gpu*": rows}
    cases = [f"{name}) cat <<'END'\n{answer}\nEND\n;;" for name, answer in answers.items()]
    smi.write_text("\n".join(["#!/bin/sh", "case $1 in", *cases, "esac\n"]))
    seen = machine.look()
    assert (seen.device, seen.device_name, seen.capability) == ("cuda", FIRST, "9.0")
    assert (seen.device_total_bytes, seen.device_free_bytes) == (71424 << 20, 71126 << 20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-3333-4444")
    assert machine.look().device_name == SECOND
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert machine.look().device == "cuda"  # which `tuner run` refuses where torch has none


def test_computing_is_tried_as_runs_do(monkeypatch):
    """Where a driver can't map memory by pages, the allocator does without."""
    import torch

    from runtime import device

    claimed, ones = [], torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "claimed", claimed.append)

    def on_the_device(*shape, device, dtype):
        if not claimed:
            raise RuntimeError("CUDA driver error: operation not supported")
        return ones(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "ones", on_the_device)
    found = machine._try_torch()
    assert found["cuda_bf16"] and "error" not in found
    assert claimed == [torch.device("cuda")]


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
