"""The frozen base under an adapter, asked for its own prediction.

DreamBooth keeps what the base knows of a class by training on pictures that the base has drawn
(Ruiz et al., 2022, arXiv 2208.12242, section 3.2). Here the target is its prediction itself, for
the same noisy latents and text: its own deviation from the pictures is not learned too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes as the base alone does. Raises ValueError without an adapter.

    peft's own `disable_adapters` also changes which parameters require gradients, and the way back
    makes all of them do; the layers' switch alone is what a forward pass reads.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if not layers:
        raise ValueError("there is no adapter to switch off: all of the model is trained")
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
