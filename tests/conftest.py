"""What all tests share."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny models are about ten times faster so on a busy machine


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
