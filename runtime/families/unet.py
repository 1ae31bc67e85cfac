"""What the families with a UNet of Diffusers have in common at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from compiler.plan import Model
from runtime.batch import Batch
from runtime.families import common
from runtime.families.posterior import PosteriorLatents
from runtime.noise_table import timesteps


class UNetFamily(PosteriorLatents):
    """Loading, latents and prediction; what is said to the model beside is each family's own."""

    def predict(
        self, model: nn.Module, noisy: Tensor, sigmas: Tensor, text: Mapping[str, Tensor]
    ) -> Tensor:
        """See `Family.predict`: the noise or v. The time is the table's, from 0 on."""
        beside = {name: t for name, t in text.items() if name != "encoder_hidden_states"}
        prediction: Tensor = model(
            sample=noisy,
            timestep=timesteps(sigmas, self.card.timesteps),
            encoder_hidden_states=text["encoder_hidden_states"],
            added_cond_kwargs=beside or None,
            return_dict=False,
        )[0]
        return prediction

    def decode(self, parts: Mapping[str, Any], latents: Tensor) -> Tensor:
        """See `Family.decode`."""
        vae = parts["vae"]
        unscaled = latents / vae.config.scaling_factor
        pixels: Tensor = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0]
        return pixels

    def _example(
        self,
        model: Model,
        width: int,
        height: int,
        batch_size: int,
        text: Mapping[str, Tensor],
        device: torch.device,
    ) -> Batch:
        """A batch of zeros with this `text`."""
        batch = common.zeros(self.card, model, (width, height), batch_size, text, device)
        return evolve(batch, kept=torch.full((batch_size,), 0.5, device=device))
