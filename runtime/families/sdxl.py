"""Stable Diffusion XL at run time. See `compiler.families.sdxl` for the facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compiler.families import sdxl
from compiler.plan import Text
from runtime.families import common
from runtime.families.base import TextEmbedding
from runtime.families.clip import Configs, Shares, inner_states, replaced
from runtime.families.sized_unet import POOLED, STATES, SizedUNet, emptied

PROJECTED = "text_encoder_2"


class ClipEncoded(SizedUNet):
    """One or two CLIPs, of which the last one pools."""

    @torch.no_grad()
    def encode_with(
        self,
        encoder: str,
        parts: Mapping[str, Any],
        prompts: Sequence[str],
        text: Text,
        *,
        negative: bool = False,
    ) -> list[TextEmbedding]:
        """See `Family.encode_with`: states (77, channels) each, of the last layer but one, padding
        kept as in inference; the second encoder's with pooled (channels,).

        The pipeline runs its second encoder alone where it has no first one; so each is run in the
        second one's place. Only the true second one pools.
        """
        own = {PROJECTED: parts[encoder], "tokenizer_2": parts[_tokenizer(encoder)]}
        pipeline = common.stock_pipeline(self.card, own)
        unpooled = None if encoder == PROJECTED else torch.zeros(len(prompts), 1)
        states, _, pooled, _ = pipeline.encode_prompt(
            list(prompts),
            device=parts[encoder].device,
            do_classifier_free_guidance=False,
            pooled_prompt_embeds=unpooled,
        )
        if unpooled is not None:
            shares: list[TextEmbedding] = [{STATES: each} for each in states]
        else:
            both = zip(states, pooled, strict=True)
            shares = [{STATES: one, POOLED: other} for one, other in both]
        return emptied(shares, prompts, text, negative)

    def encode_tokens(self, encoder: str, module: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
        """See `TrainsText.encode_tokens`: states, and of the last encoder pooled too."""
        states, projected = inner_states(module, tokens)
        return {STATES: states, POOLED: projected} if encoder == PROJECTED else {STATES: states}

    def with_shares(
        self, text: Mapping[str, Tensor], shares: Shares, configs: Configs
    ) -> dict[str, Tensor]:
        """See `TrainsText.with_shares`: each encoder has its own channels of the states."""
        found, start = dict(text), 0
        for name in self.card.text_encoders:
            if name in shares:
                found[STATES] = replaced(found[STATES], shares[name][STATES], start)
                found |= {key: each for key, each in shares[name].items() if key != STATES}
            start += int(configs[name]["hidden_size"])
        return found


class StableDiffusionXL(ClipEncoded):
    """StableDiffusionXLPipeline, UNet2DConditionModel, AutoencoderKL and two CLIPs."""

    card = sdxl.CARD


def _tokenizer(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


FAMILY = StableDiffusionXL()
