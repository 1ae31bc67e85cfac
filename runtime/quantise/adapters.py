"""peft's LoRA layers for quantised weights: as on plain ones, but for merging.

peft merges by adding to `base_layer.weight` in place, which would change a copy here. So merging
puts a plain layer in the quantised one's place first; taking it apart again leaves a plain one.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Conv2d, Linear
from torch import nn

from runtime.quantise.layers import Quantised, QuantisedConv2d, QuantisedLinear, plain


class LoraLinear(Linear):  # type: ignore[misc]
    """LoRA on a quantised linear layer."""

    base_layer: nn.Module

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """See peft: the weight becomes that of the quantised layer plus the adapter's."""
        self.base_layer = _plain(self.base_layer)
        super().merge(*args, **kwargs)


class LoraConv2d(Conv2d):  # type: ignore[misc]
    """LoRA on a quantised 1x1 convolution."""

    base_layer: nn.Module

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """See `LoraLinear.merge`."""
        self.base_layer = _plain(self.base_layer)
        super().merge(*args, **kwargs)


LORA_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    QuantisedLinear: LoraLinear,
    QuantisedConv2d: LoraConv2d,
}


def _plain(layer: nn.Module) -> nn.Module:
    return plain(layer) if isinstance(layer, Quantised) else layer
