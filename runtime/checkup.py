"""What `tuner doctor` looks at besides `runtime.machine`: tools, limits, disk, hub. No torch.

Nothing here raises on what a machine lacks, and nothing goes to the network unless asked.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from compiler.optimizers import packages
from runtime.machine import version
from runtime.site import existing

EXTRAS = ("tensorboard", "torchao", "triton", "accelerate", "sentencepiece", *packages())
PROBE_BYTES = 64 * 2**20
BLOCK = 2**20
HUB_SECONDS = 5.0
FEW_FILES = 1024  # open files that data loading, shards and libraries get by with
FEATURES = {"bf16": 8.0, "flash attention": 8.0, "fp8": 8.9}
"""CUDA compute capability from which on a feature is there (NVIDIA's CUDA programming guide; for
attention, FlashAttention-2 in PyTorch's scaled_dot_product_attention)."""

# (package, versions that are known to be bad, what they do). Tried in November 2026.
BAD_VERSIONS = (
    ("typer", ">=0.29", "imports pydantic for every command, which doubles the start-up time"),
    ("torch", "<2.9", "is older than what the memory model was written for"),
    ("torch", ">=2.14", "is newer than what was tried"),
    ("diffusers", "<0.40", "lacks pipelines and loaders that recipes need"),
    ("transformers", "<5.0", "loads encoders by other names and types"),
    ("peft", "<0.18", "lacks adapter kinds and metadata that results need"),
    ("accelerate", "<1.10", "is older than what was tried"),
    ("torchao", "<0.15", "is older than what this torch loads"),
)


def features(capability: str) -> dict[str, bool]:
    """What a CUDA device of a compute capability ("8.9") can do."""
    try:
        number = float(capability)
    except ValueError:
        return {}
    return {name: number >= least for name, least in FEATURES.items()}


def extras() -> dict[str, str]:
    """Versions of optional packages; "" for one that is not installed."""
    return {name: version(name) for name in EXTRAS}


def bad_versions(installed: dict[str, str]) -> list[str]:
    """A sentence on each installed package of a version that is known to be bad."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    lines = []
    for name, bad, what in BAD_VERSIONS:
        try:
            number = Version(installed.get(name) or version(name)).base_version
        except InvalidVersion:  # not installed, or a build of its own
            continue
        if number in SpecifierSet(bad):
            lines.append(f"{name} {number} {what}")
    return lines


def open_files() -> int | None:
    """How many files a process may have open; None where there is no such limit to ask for."""
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def disk_speed(folder: Path, num_bytes: int = PROBE_BYTES) -> dict[str, Any]:
    """Bytes a second to write and to read a file in `folder` or the nearest one above it.

    The file is removed; reading asks the system to forget its pages first, where it can. "error"
    says why there are no figures.
    """
    block = os.urandom(BLOCK)
    try:
        place = existing(folder)
        if shutil.disk_usage(place).free < 4 * num_bytes:
            return {"error": "too little is free to try"}
        with tempfile.TemporaryFile(dir=place, prefix=".tuner-probe-") as file:
            start = time.perf_counter()
            for _ in range(num_bytes // BLOCK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            _forget(file.fileno())
            file.seek(0)
            before = time.perf_counter()
            while file.read(BLOCK):
                pass
            read = time.perf_counter() - before
    except OSError as error:
        return {"error": error.strerror or str(error)}
    return {
        "write_bytes_per_second": round(num_bytes / max(written - start, 1e-6)),
        "read_bytes_per_second": round(num_bytes / max(read, 1e-6)),
    }


def _forget(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def has_token() -> bool:
    """Whether a token for the hub is set; it is neither shown nor sent."""
    try:
        from huggingface_hub import get_token

        return bool(get_token())
    except (ImportError, OSError, ValueError):
        return False


def hub_answers(seconds: float = HUB_SECONDS) -> str:
    """ "" if the hub answers in time, else why it does not."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        with urllib.request.urlopen(f"{endpoint}/api/models?limit=1", timeout=seconds) as answer:
            return "" if answer.status < 400 else f"status {answer.status}"
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return f"{endpoint} does not answer: {reason}"


def distributed() -> dict[str, bool]:
    """Which back ends torch was built with; imports torch. Empty where it can't be imported."""
    try:
        from torch import distributed as dist
    except (ImportError, OSError):
        return {}
    if not dist.is_available():
        return {"nccl": False, "gloo": False}
    return {"nccl": dist.is_nccl_available(), "gloo": dist.is_gloo_available()}
