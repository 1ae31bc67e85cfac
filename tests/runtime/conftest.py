"""Tiny pipelines for all runtime tests, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny_sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Sana pipeline. Not to be written into."""
    return make_tiny("sana", tmp_path_factory.mktemp("tiny") / "sana")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 pipeline. Not to be written into."""
    return make_tiny("sd3", tmp_path_factory.mktemp("tiny") / "sd3")
