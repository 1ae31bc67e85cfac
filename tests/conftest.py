"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny models are about ten times faster so on a busy machine


@pytest.fixture
def data_root() -> Path:
    """The folder of real data, or a skip where there is none."""
    folder = os.environ.get("TUNER_REAL_DATA")
    if not folder:
        pytest.skip("TUNER_REAL_DATA is not set")
    return Path(folder)
