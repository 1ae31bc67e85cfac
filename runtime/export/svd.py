"""LoRA layers by singular value decomposition: of a difference of weights, or of a larger LoRA.

The product of the largest singular values is the nearest of its rank (Eckart and Young, 1936).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.adapters import scale_of
from compiler.plan import Adapter
from runtime.export.lora_keys import Layer
from runtime.export.size import Size


def resized(layer: Layer, size: Size) -> Layer:
    """The LoRA of `size` that is nearest to `layer`, at the same strength and in its format.

    B A is decomposed through the triangles of B and A, without the whole matrix.
    """
    b, a = layer.b.double().flatten(1), layer.a.double().flatten(1)
    of_b, of_a = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(of_b.R @ of_a.R.T, full_matrices=False)
    rank = size.of(s.tolist())
    root = s[:rank].sqrt()
    return Layer(
        a=(root[:, None] * (v[:rank] @ of_a.Q.T)).view(rank, *layer.a.shape[1:]).to(layer.a.dtype),
        b=((of_b.Q @ u[:, :rank]) * root).view(-1, rank, *layer.b.shape[2:]).to(layer.b.dtype),
        scale=layer.scale,
    )


def cut(layer: Layer, size: Size, adapter: Adapter, module: str) -> Layer:
    """The first ranks of a layer of DyLoRA, at the strength that they were trained with."""
    rank = min(size.rank, layer.a.shape[0])
    return Layer(
        a=layer.a[:rank].contiguous(),
        b=layer.b[:, :rank].contiguous(),
        scale=scale_of(adapter, module, rank),
    )


def extracted(difference: Tensor, size: Size) -> Layer:
    """The LoRA of `size` that is nearest to `difference`, a weight (outputs, inputs, ...); scale 1,
    float32."""
    u, s, v = torch.linalg.svd(difference.float().flatten(1), full_matrices=False)
    rank = size.of(s.tolist())
    root = s[:rank].sqrt()
    ones = (1,) * (difference.dim() - 2)
    return Layer(
        a=(root[:, None] * v[:rank]).view(rank, *difference.shape[1:]).contiguous(),
        b=(u[:, :rank] * root).view(-1, rank, *ones).contiguous(),
        scale=1.0,
    )
