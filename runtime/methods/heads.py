"""The discriminator's heads, on features of the frozen teacher.

One head per chosen block, on its output as a sequence of tokens: Sauer et al., "StyleGAN-T" (2023,
arXiv 2301.09515), without its text conditioning, as SANA-Sprint uses it (arXiv 2503.09641,
section 3.2). Spectral normalisation: Miyato et al. (2018, arXiv 1802.05957).

The power iteration behind it runs once per update of the heads (`iterate`), not in every pass: the
heads are then a function of what is saved, however an update is cut into passes and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 8  # samples at most that share the statistics of a norm
SLOPE = 0.2
EPS = 1e-12  # of a vector's length
FIRST = 15  # iterations for fresh weights


class Convolution(nn.Module):
    """A convolution over tokens, circular, its weight divided by its largest singular value."""

    def __init__(self, channels: int, out: int, width: int) -> None:
        super().__init__()
        plain = nn.Conv1d(channels, out, width)
        self.weight, self.bias = plain.weight, plain.bias
        self.register_buffer("left", F.normalize(torch.randn(out), dim=0, eps=EPS))
        self.register_buffer("right", F.normalize(torch.randn(channels * width), dim=0, eps=EPS))
        self.iterate(FIRST)

    @torch.no_grad()
    def iterate(self, times: int = 1) -> None:
        """Power iterations towards the first singular vectors."""
        flat = self.weight.flatten(1)
        left, right = cast(Tensor, self.left), cast(Tensor, self.right)
        for _ in range(times):
            left.copy_(F.normalize(flat @ right, dim=0, eps=EPS))
            right.copy_(F.normalize(flat.T @ left, dim=0, eps=EPS))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, channels, N) -> (B, out, N)."""
        left, right = cast(Tensor, self.left).clone(), cast(Tensor, self.right).clone()
        largest = left @ (self.weight.flatten(1) @ right)
        padding = self.weight.shape[2] // 2
        if padding:
            # Written out: with fewer tokens than padding, torch's own circular padding refuses.
            count = tokens.shape[2]
            places = torch.arange(-padding, count + padding, device=tokens.device) % count
            tokens = tokens[:, :, places]
        return F.conv1d(tokens, self.weight / largest, self.bias)


class LocalNorm(nn.Module):
    """Batch norm over at most `GROUP` samples and their tokens; it keeps no running statistics.

    Groups are as equal as can be, so that any batch may be given.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, channels, N) -> the same."""
        groups = tokens.tensor_split(math.ceil(tokens.shape[0] / GROUP))
        normed = []
        for group in groups:
            variance, mean = torch.var_mean(group, dim=(0, 2), keepdim=True, correction=0)
            normed.append((group - mean) * torch.rsqrt(variance + 1e-5))
        return torch.cat(normed) * self.weight[:, None] + self.bias[:, None]


class Block(nn.Module):
    """Convolution, norm, leaky ReLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.convolution = Convolution(channels, channels, width)
        self.norm = LocalNorm(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, channels, N) -> the same."""
        return F.leaky_relu(self.norm(self.convolution(tokens)), SLOPE)


class Head(nn.Module):
    """Logits of one block's output."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Block(channels, 1)
        self.second = Block(channels, 9)
        self.last = Convolution(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, channels) -> (B, N)."""
        tokens = self.first(features.transpose(1, 2))
        tokens = (self.second(tokens) + tokens) / math.sqrt(2)
        logits: Tensor = self.last(tokens)
        return logits[:, 0]


class Heads(nn.Module):
    """All heads, in the order of their blocks."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(channels) for _ in range(count))

    def iterate(self) -> None:
        """See the module: to be called once before each update of the heads."""
        for module in self.modules():
            if isinstance(module, Convolution):
                module.iterate()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Outputs of the blocks, (B, N, channels) each -> logits (B, heads * N) float32."""
        dtype = next(self.parameters()).dtype
        logits = [head(each.to(dtype)) for head, each in zip(self.heads, features, strict=True)]
        return torch.cat(logits, 1).float()
