"""What all tests share."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny models are about ten times faster so on a busy machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def libraries_stay() -> None:
    """What the libraries brought is not gone through whenever a run lets its encoders go, a third
    of a second each time. What earlier tests left is collected first."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def data_root() -> Path:
    """The folder of real data, or a skip where there is none."""
    folder = os.environ.get("TUNER_REAL_DATA")
    if not folder:
        pytest.skip("TUNER_REAL_DATA is not set")
    return Path(folder)
