"""Looks at this machine. Imports no torch unless asked to look deep."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from attrs import frozen

from compiler.attention import packages as attention_packages
from compiler.hub import home
from compiler.machine import COMPILER, DEEPSPEED, HUB_TOKEN, OPENCV, TRITON, Machine
from compiler.optimizers import packages
from compiler.plan import Device
from compiler.trackers import TRACKERS, TrackerFacts
from runtime.parts import ON, PREFIX, Part, parts_of
from runtime.segments import setting

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "torchao",
    "safetensors",
    "tensorboard",
    "bitsandbytes",
    "deepspeed",
    "triton",
)
COMPILERS = ("c++", "g++", "clang++", "cl")
BF16_CAPABILITY = 8.0  # Ampere
SMI_SECONDS = 10.0
FIELDS = (
    "index",
    "uuid",
    "name",
    "memory.total",
    "memory.free",
    "compute_cap",
    "driver_version",
    "mig.mode.current",
)
"""What nvidia-smi is asked of each device."""
UNSEEN = ["", "", "CUDA device", "", "", "", ""]  # where nvidia-smi does not answer
NOT_LISTED = Part(
    card="", uuid="", profile="part that nvidia-smi does not list", total_bytes=0, free_bytes=0
)


@frozen(kw_only=True)
class Gpu:
    """One CUDA device as the driver reports it."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: str
    driver: str


def look() -> Machine:
    """The first accelerator that the installed torch can use, else the processor."""
    total, free = host_memory()
    gpus = cuda_devices() if torch_may_use("cuda") else []
    if gpus:
        gpu = gpus[0]
        device: Device = "cuda"
        facts = (gpu.name, gpu.total_bytes, gpu.free_bytes, gpu.capability)
        bf16 = float(gpu.capability or 0) >= BF16_CAPABILITY
    elif sys.platform == "darwin" and platform.machine() == "arm64":
        # Apple's devices share the host's memory.
        device, facts, bf16 = "mps", (processor_name(), total, free, ""), True
    else:
        device, facts, bf16 = "cpu", (processor_name(), total, free, ""), processor_has_bf16()
    return Machine(
        device=device,
        device_name=facts[0],
        device_total_bytes=facts[1],
        device_free_bytes=facts[2],
        host_total_bytes=total,
        host_free_bytes=free,
        cores=cores(),
        bf16=bf16,
        capability=facts[3],
        processor_flops=processor_flops(),
        missing=tuple(_missing()),
    )


def compiler() -> str:
    """Path of the C++ compiler that torch.compile would take; "" if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else []
    found = (shutil.which(name) for name in (*names, *COMPILERS))
    return next((path for path in found if path), "")


def _missing() -> Iterator[str]:
    kernels = attention_packages()
    yield from (name for name in (*packages(), *kernels, TRITON, DEEPSPEED) if not version(name))
    yield from (facts.package for facts in TRACKERS.values() if not tracker_is_here(facts))
    if not hub_token_is_there():
        yield HUB_TOKEN
    if importlib.util.find_spec("cv2") is None:  # several packages carry it
        yield OPENCV
    if not compiler():
        yield COMPILER


def tracker_is_here(facts: TrackerFacts) -> bool:
    """Whether its package is installed; MLflow comes as two."""
    return any(map(version, (facts.package, facts.package.removesuffix("-skinny"))))


def hub_token_is_there() -> bool:
    """Whether the hub's library would find a token, by its own rules; it is not read."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    return os.path.exists(os.environ.get("HF_TOKEN_PATH") or home() / "token")


@cache
def version(package: str) -> str:
    """Installed version of a package; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def torch_may_use(device: str) -> bool:
    """Whether the installed torch is built for `device`, by its version's local label.

    Wheels without a label come from PyPI: with CUDA on Linux, without it elsewhere.
    """
    label = version("torch").partition("+")[2]
    if label:
        return device == "cuda" and label.startswith("cu")
    return device == "cuda" and sys.platform == "linux"


def cuda_devices() -> list[Gpu]:
    """The CUDA devices this process may use, in its own order; empty without a driver."""
    answer = _smi(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    rows = [row for row in rows if len(row) >= len(FIELDS) - 1]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if PREFIX in (chosen or "") or any(map(_divided, rows)):
        return visible(rows, chosen, parts_of(_smi("-L"), _smi("-q", "-x")))
    return visible(rows, chosen)


def _smi(*options: str) -> str:
    """What nvidia-smi answers; "" if it does not."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return ""
    try:
        return subprocess.run(
            [smi, *options], capture_output=True, text=True, timeout=SMI_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def visible(rows: list[list[str]], chosen: str | None, parts: Sequence[Part] = ()) -> list[Gpu]:
    """Rows of nvidia-smi (`FIELDS`) as `Gpu`, filtered and ordered by CUDA_VISIBLE_DEVICES.

    As CUDA does, the list ends at the first entry that names no device. `parts` are those of
    divided devices (MIG): CUDA takes one alone, and no whole device beside it. A part that is not
    listed has no memory here; with no device at all, the processor would train unasked.
    """
    whole: list[Gpu] = []
    divided: list[Gpu] = []
    lost: list[Gpu] = []
    cards = {row[1]: row for row in rows}
    entries = [row[0] for row in rows] if chosen is None else chosen.split(",")
    for entry in map(str.strip, entries):
        row = next((r for r in rows if entry and (r[0] == entry or r[1].startswith(entry))), None)
        if row is not None and not _divided(row):
            whole.append(_gpu(row))
            continue
        if row is None and not entry.startswith(PREFIX):
            break
        own = [each for each in parts if _names(entry, each, row)]
        divided += [_gpu(cards.get(part.card, UNSEEN), part) for part in own]
        if not own:
            lost.append(_gpu(row or (rows or [UNSEEN])[0], NOT_LISTED))
            if row is None:  # whether it is there, CUDA alone knows: it takes it, or ends here
                break
    return divided[:1] or whole or lost[:1]


def _names(entry: str, part: Part, row: Sequence[str] | None) -> bool:
    """Whether the entry names `part`, or the device of `row`, which the part is of."""
    return part.uuid.startswith(entry) if row is None else part.card == row[1]


def _divided(row: Sequence[str]) -> bool:
    return ON in row[len(FIELDS) - 1 :]


def _gpu(row: Sequence[str], part: Part | None = None) -> Gpu:
    """The device of a row, or a part of it."""
    _, _, name, total, free, capability, driver = row[:7]
    return Gpu(
        name=f"{name} MIG {part.profile}" if part else name,  # as CUDA calls it
        total_bytes=part.total_bytes if part else _whole(total) << 20,
        free_bytes=part.free_bytes if part else _whole(free) << 20,
        capability=capability,
        driver=driver,
    )


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0  # "[N/A]" where a device does not tell


def host_memory() -> tuple[int, int]:
    """(total, free) bytes that this process may use: the machine's, or its container's if less."""
    total, free = _machine_memory()
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit = _read_number(Path("/sys/fs/cgroup") / limit_file)
        used = _read_number(Path("/sys/fs/cgroup") / used_file)
        if limit is not None and used is not None and limit < total:
            return limit, min(free, max(limit - used, 0))
    return total, free


def _machine_memory() -> tuple[int, int]:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        rows = (line.split(":") for line in meminfo.read_text().splitlines())
        kib = {name: int(value.split()[0]) for name, value in rows}
        return kib["MemTotal"] * 1024, kib.get("MemAvailable", kib["MemFree"]) * 1024
    if not hasattr(os, "sysconf"):
        return _windows_memory()
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    return total, _mac_free(page) or total


def _mac_free(page: int) -> int:
    """Bytes that macOS calls free, inactive or speculative; 0 if it does not tell."""
    try:
        text = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    kinds = ("Pages free", "Pages inactive", "Pages speculative")
    return page * sum(_whole(rows.get(kind, "0").strip().rstrip(".")) for kind in kinds)


def _windows_memory() -> tuple[int, int]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((f"n{i}", ctypes.c_ulonglong) for i in range(7)),
        )

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.n0), int(status.n1)


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None  # absent, or "max"


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The processor's model name."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def processor_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (else it is emulated, slowly)."""
    flags = next((line for line in _cpuinfo() if line.startswith(("flags", "Features"))), "")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))


def processor_flops() -> float:
    """float32 operations a second that one core does at most, nominally; 0 where it is not told.

    Two fused multiply-adds (two operations each) a cycle over the widest vectors: 16 numbers with
    AVX-512, 8 with AVX2, 4 with NEON, at the clock that the system tells of.
    """
    lines = _cpuinfo()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    clock = next((line for line in lines if line.startswith("cpu MHz")), "").partition(":")[2]
    widths = {"avx512f": 16, "avx2": 8, "asimd": 4}
    width = next((wide for name, wide in widths.items() if name in flags), 0)
    try:
        return 2 * 2 * width * float(clock) * 1e6
    except ValueError:
        return 0.0


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def versions() -> dict[str, str]:
    """Python's and the installed packages' versions."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{k: v for k, v in found.items() if v}}


def facts(folder: Path, *, deep: bool = False) -> dict[str, Any]:
    """What `tuner doctor` shows: machine, versions, and the disk that holds `folder`.

    `deep` imports torch and tries the device; what fails stands in "torch" as a sentence.
    """
    from attrs import asdict

    disk = shutil.disk_usage(_existing(folder))
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "versions": versions(),
        "machine": asdict(look()),
        "cuda": [asdict(gpu) for gpu in cuda_devices()],
        "allocator": setting(),
        "disk": {"folder": str(folder), "total_bytes": disk.total, "free_bytes": disk.free},
    }
    if deep:
        found["torch"] = _try_torch()
    return found


def _existing(folder: Path) -> Path:
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def _try_torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"error": f"torch can't be imported: {error}"}
    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda or "",
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "threads": torch.get_num_threads(),
    }
    if found["cuda"]:
        from runtime.device import claimed

        try:
            claimed(torch.device("cuda"))  # as runs do
            ones = torch.ones(8, 8, device="cuda", dtype=torch.bfloat16)
            found["cuda_bf16"] = bool((ones @ ones == 8).all())
        except RuntimeError as error:
            found["error"] = f"CUDA is there but does not compute: {error}"
    return found
