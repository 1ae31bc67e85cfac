"""UNets that are told sizes and cuts, and a pooled embedding of the prompt (SDXL and its kin)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compiler.plan import Model, Text
from runtime.batch import Batch
from runtime.families import common
from runtime.families.base import Framed, TextEmbedding
from runtime.families.unet import UNetFamily

STATES, POOLED, TIME_IDS = "encoder_hidden_states", "text_embeds", "time_ids"


class SizedUNet(UNetFamily):
    """Everything but the prompts' encoding and how the picture is drawn."""

    def join_text(self, shares: Mapping[str, TextEmbedding]) -> TextEmbedding:
        """See `Family.join_text`: states (tokens, channels) of all encoders, channels side by
        side, and the last encoder's pooled (channels,)."""
        ordered = [shares[name] for name in self.card.text_encoders]
        return {
            STATES: torch.cat([share[STATES] for share in ordered], dim=-1),
            POOLED: ordered[-1][POOLED],
        }

    def collate_text(self, embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
        """See `Family.collate_text`. All prompts are of one length."""
        return {key: torch.stack([each[key] for each in embeddings]) for key in (STATES, POOLED)}

    def size_conditions(self, frames: Sequence[Framed]) -> dict[str, Tensor]:
        """See `Family.size_conditions`: `time_ids` (B, numbers) int64, so that they stay exact
        where the model computes in few bits."""
        return {TIME_IDS: torch.tensor([self.numbers(frame) for frame in frames])}

    def numbers(self, frame: Framed) -> list[int]:
        """What the model is told of one picture (arXiv 2307.01952, section 2.2), as the pipeline
        orders it: height and width before scaling, top and left of the cut, and its size."""
        return [*frame.original, *frame.crop, *frame.target]

    def example_batch(
        self,
        model: Model,
        width: int,
        height: int,
        batch_size: int,
        text: Text,
        device: torch.device,
    ) -> Batch:
        """See `Family.example_batch`."""
        configs = {name: common.config_of(model, name) for name in model.configs}
        shapes = self.card.embedding_shapes(configs, text.max_length)
        beside = {
            name: torch.zeros(batch_size, *shape, device=device) for name, shape in shapes.items()
        }
        frame = Framed(original=(height, width), crop=(0, 0), target=(height, width))
        told = self.size_conditions([frame] * batch_size)
        beside |= {name: tensor.to(device) for name, tensor in told.items()}
        return self._example(model, width, height, batch_size, beside, device)

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
        """See `Family.denoise`. Bit-equal to `pipeline(prompt, ...)`."""
        pipeline = common.stock_pipeline(self.card, parts)
        with common.inference(parts["unet"]):
            latents: Tensor = pipeline(
                width=width,
                height=height,
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=common.cpu_generator(seed),
                output_type="latent",
                **prompt_options(positive, negative, pipeline.unet),
            ).images
        return latents


def prompt_options(
    positive: TextEmbedding, negative: TextEmbedding, unet: Any
) -> dict[str, Tensor]:
    """The pipelines' arguments for embeddings that are there already."""

    def batched(embedding: TextEmbedding, key: str) -> Tensor:
        return embedding[key][None].to(unet.device, unet.dtype)

    return {
        "prompt_embeds": batched(positive, STATES),
        "pooled_prompt_embeds": batched(positive, POOLED),
        "negative_prompt_embeds": batched(negative, STATES),
        "negative_pooled_prompt_embeds": batched(negative, POOLED),
    }


def emptied(
    shares: list[TextEmbedding], prompts: Sequence[str], text: Text, negative: bool
) -> list[TextEmbedding]:
    """Zeros for empty negative prompts, where the plan says that they are."""
    if not (negative and text.zeros_for_empty):
        return shares
    return [
        share if prompt else {name: torch.zeros_like(tensor) for name, tensor in share.items()}
        for share, prompt in zip(shares, prompts, strict=True)
    ]
