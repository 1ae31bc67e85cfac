"""Qwen-Image at run time. See `compiler.families.qwen_image` for the facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor, nn

from compiler.families import qwen_image
from compiler.plan import Model, Text
from runtime.batch import Batch
from runtime.families import common
from runtime.families.base import TextEmbedding
from runtime.families.flux import packed, unpacked
from runtime.families.masked_text import OneEncoder

STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"


class QwenImage(OneEncoder, common.Stock):
    """QwenImagePipeline, QwenImageTransformer2DModel, AutoencoderKLQwenImage and Qwen2.5-VL.

    Latents are (B, 16, h, w) everywhere but in the model, which takes them packed as Flux does, and
    in the autoencoder, for which a picture is a video of one frame.
    """

    card = qwen_image.CARD

    def empty(self, model: Model, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """See `Family.empty`. The tables of places are neither parameters nor buffers, and would be
        left without data."""
        part: Any = common.empty_component(model, name, dtype, device)
        if name == model.trained_component:
            with torch.device(device):
                axes = list(part.config.axes_dims_rope)
                part.pos_embed = QwenEmbedRope(theta=10000, axes_dim=axes, scale_rope=True)
        module: nn.Module = part
        return module

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
        """See `Family.encode_with`: {"encoder_hidden_states": (tokens, channels)} each.

        As the pipeline does, but one prompt at a time: it pads to the longest, on which the last
        bits of the shorter ones would depend. Negative prompts are encoded like positive ones.
        """
        pipeline = common.stock_pipeline(self.card, parts)
        model, begin = parts[encoder], pipeline.prompt_template_encode_start_idx
        found: list[TextEmbedding] = []
        for prompt in prompts:
            tokens = pipeline.tokenizer(
                [pipeline.prompt_template_encode.format(prompt)],
                max_length=pipeline.tokenizer_max_length + begin,
                padding=True,
                truncation=True,
                return_tensors="pt",
            ).to(model.device)
            states = model(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                output_hidden_states=True,
            ).hidden_states[-1]
            found.append({STATES: states[0, begin : begin + text.max_length].clone()})
        return found

    def collate_text(self, embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
        """See `Family.collate_text`: states (B, tokens, channels), and where prompts differ in
        length a mask (B, tokens) of 0 and 1. Without one, as in the pipeline, attention has more
        kernels to choose from."""
        found = common.padded(embeddings, STATES, MASK)
        if len({embedding[STATES].shape[0] for embedding in embeddings}) == 1:
            del found[MASK]
        return found

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        """See `Family.encode_pixels`: mean and standard deviation of the posterior."""
        codec: Any = vae
        with torch.no_grad():
            posterior = codec.encode(pixels[:, :, None].to(codec.dtype)).latent_dist
        return {"mean": posterior.mean[:, :, 0].float(), "std": posterior.std[:, :, 0].float()}

    def latents(
        self, cached: Mapping[str, Tensor], vae_config: Mapping[str, Any], noise: Tensor | None
    ) -> Tensor:
        """See `Family.latents`. Without `noise`, the posterior's mean. Each channel has its own
        mean and deviation."""
        drawn = cached["mean"].float()
        if noise is not None:
            drawn = drawn + cached["std"].float() * noise
        mean, inverse = _statistics(vae_config, drawn)
        return (drawn - mean) * inverse

    def predict(
        self, model: nn.Module, noisy: Tensor, sigmas: Tensor, text: Mapping[str, Tensor]
    ) -> Tensor:
        """See `Family.predict`. The time is sigma."""
        height, width = noisy.shape[-2:]
        prediction: Tensor = model(
            hidden_states=packed(noisy),
            timestep=sigmas,
            encoder_hidden_states=text[STATES],
            encoder_hidden_states_mask=text.get(MASK),
            img_shapes=[[(1, height // 2, width // 2)]] * noisy.shape[0],
            return_dict=False,
        )[0]
        return unpacked(prediction, height, width)

    def example_batch(
        self,
        model: Model,
        width: int,
        height: int,
        batch_size: int,
        text: Text,
        device: torch.device,
    ) -> Batch:
        """See `Family.example_batch`. Several prompts are taken to differ in length."""
        config = common.config_of(model, "transformer")
        factor = self.card.vae_factor(common.config_of(model, "vae"))
        shape = (batch_size, config["in_channels"] // 4, height // factor, width // factor)
        tokens = (batch_size, text.max_length)
        told = {STATES: torch.zeros(*tokens, config["joint_attention_dim"], device=device)}
        if batch_size > 1:
            told[MASK] = torch.ones(tokens, dtype=torch.int64, device=device)
        return Batch(
            latents=torch.zeros(shape, device=device),
            noise=torch.zeros(shape, device=device),
            sigmas=torch.full((batch_size,), 0.5, device=device),
            text=told,
        )

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
        """See `Family.denoise`. Bit-equal to `pipeline(prompt, negative_prompt, ...)`."""
        pipeline = common.stock_pipeline(self.card, parts)
        transformer = pipeline.transformer
        given = {"prompt_embeds": positive}
        if guidance > 1:
            given["negative_prompt_embeds"] = negative
        embeds = {
            name: each[STATES][None].to(transformer.device, transformer.dtype)
            for name, each in given.items()
        }
        with common.inference(transformer):
            latents: Tensor = pipeline(
                **embeds,
                width=width,
                height=height,
                true_cfg_scale=guidance,
                num_inference_steps=steps,
                generator=common.cpu_generator(seed),
                output_type="latent",
            ).images
        factor = pipeline.vae_scale_factor
        return unpacked(latents, height // factor, width // factor)

    def decode(self, parts: Mapping[str, Any], latents: Tensor) -> Tensor:
        """See `Family.decode`."""
        vae = parts["vae"]
        given = latents.to(vae.dtype)
        mean, inverse = _statistics(vae.config, given)
        pixels: Tensor = vae.decode((given / inverse + mean)[:, :, None], return_dict=False)[0]
        return pixels[:, :, 0]


def _statistics(vae_config: Mapping[str, Any], latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of each channel, (1, C, 1, 1), rounded as in the pipeline."""
    mean, deviation = (
        torch.tensor(vae_config[f"latents_{name}"], device="cpu").view(1, -1, 1, 1)
        for name in ("mean", "std")
    )
    inverse = 1.0 / deviation
    return mean.to(latents.device, latents.dtype), inverse.to(latents.device, latents.dtype)


FAMILY = QwenImage()
