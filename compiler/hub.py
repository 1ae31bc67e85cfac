"""Where Hugging Face's library keeps what it copied, by its own rules, without importing it."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Its folder (environment variables of huggingface_hub, documentation)."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface").expanduser()


def model_folder(name: str) -> Path:
    """The folder of model `owner/name`, which is there if anything of it was copied."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(cache or home() / "hub").expanduser() / f"models--{name.replace('/', '--')}"
