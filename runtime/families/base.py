"""What a model family can do at run time: load, encode, predict, sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from attrs import frozen
from torch import Tensor, nn

from compiler.families.card import FamilyCard
from compiler.plan import Model, Text
from runtime.batch import Batch

# One prompt's embedding without padding, by the names that `predict` takes. Sequence tensors are
# (tokens, channels), pooled ones (channels,).
TextEmbedding = Mapping[str, Tensor]


PICTURE = "picture"
"""Among the parts that draw, for a family that refines: the picture, (1, 3, H, W) in [-1, 1]."""


@frozen(kw_only=True)
class Framed:
    """What some models are told of a picture beside its text, in pixels: (height, width) before it
    was resized, (top, left) of the cut in the resized one, and (height, width) of the cut."""

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


class Family(Protocol):
    """One instance per family, without state; models are passed in."""

    card: FamilyCard

    def load(
        self, model: Model, name: str, dtype: torch.dtype, device: torch.device, *, seed: int = 0
    ) -> Any:
        """One component from the base's folder or hub id.

        With `init = "random"` the trained one is built fresh, its weights drawn from `seed`.
        """
        ...

    def empty(self, model: Model, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """One component from its configuration alone, weights unset (for meta tensors)."""
        ...

    def encode_with(
        self,
        encoder: str,
        parts: Mapping[str, Any],
        prompts: Sequence[str],
        text: Text,
        *,
        negative: bool = False,
    ) -> list[TextEmbedding]:
        """One encoder's share of the embeddings, see `join_text`; only that encoder is run.

        `parts` holds the encoder and its tokenizer by component name. `negative` encodes as the
        pipeline encodes negative prompts (Sana: without the instruction); caption dropout uses
        the negative encoding of "".
        """
        ...

    def join_text(self, shares: Mapping[str, TextEmbedding]) -> TextEmbedding:
        """From the shares of all encoders, by component name, an embedding equal to the stock
        pipeline's `encode_prompt`, without padding."""
        ...

    def collate_text(self, embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
        """Stack embeddings, padded to the longest, with a mask where the model takes one."""
        ...

    def size_conditions(self, frames: Sequence[Framed]) -> dict[str, Tensor]:
        """Beside the text of a batch, by the names that `predict` takes: what the model is told of
        each picture's size and cut. Empty where the card says that it is told nothing."""
        ...

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> what is cached per sample: {"mean"} or {"mean", "std"}."""
        ...

    def latents(
        self, cached: Mapping[str, Tensor], vae_config: Mapping[str, Any], noise: Tensor | None
    ) -> Tensor:
        """Scaled latents (B, C, h, w) from cached moments; `noise` ~ N(0, 1) draws from them."""
        ...

    def predict(
        self, model: nn.Module, noisy: Tensor, sigmas: Tensor, text: Mapping[str, Tensor]
    ) -> Tensor:
        """The model's velocity for `noisy` (B, C, h, w) at noise levels `sigmas` (B,)."""
        ...

    def example_batch(
        self,
        model: Model,
        width: int,
        height: int,
        batch_size: int,
        text: Text,
        device: torch.device,
    ) -> Batch:
        """A batch of the right shapes and types (pixels, full prompt length), for simulation."""
        ...

    def denoise(
        self,
        parts: Mapping[str, Any],
        positive: TextEmbedding,
        negative: TextEmbedding,
        *,
        width: int,
        height: int,
        guidance: float,
        steps: int,
        seed: int,
    ) -> Tensor:
        """Latents (1, C, h, w) by the stock pipeline's loop, from embeddings.

        `parts` holds vae, transformer and scheduler; of a family that refines, also `PICTURE`.
        """
        ...

    def decode(self, parts: Mapping[str, Any], latents: Tensor) -> Tensor:
        """Pixels (1, 3, H, W), about in [-1, 1], as the stock pipeline decodes them, but in the
        VAE's own type."""
        ...
