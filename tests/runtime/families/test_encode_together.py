"""Every family's autoencoder takes several pictures, and each gets what it gets alone."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from torch import nn

from compiler.families import FAMILIES
from runtime.families import family_of
from tests.runtime.memory_cases import small

CPU = torch.device("cpu")


def codec(name: str, *, tiled: bool) -> nn.Module:
    """A small autoencoder of the family `name`, with random weights."""
    model = small(name).model
    parts = tuple(evolve(p, tiling=tiled and p.name == "vae") for p in model.components)
    vae = family_of(name).empty(evolve(model, components=parts), "vae", torch.float32, CPU).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in vae.parameters():
            scale = 1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for tensor in vae.buffers():  # statistics of a norm
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return vae


KINDS = {card.components["vae"]: name for name, card in sorted(FAMILIES.items(), reverse=True)}


@pytest.mark.parametrize(
    ("name", "tiled"),
    [(n, False) for n in sorted(FAMILIES)] + [(n, True) for n in sorted(KINDS.values())],
)
def test_each_gets_what_it_gets_alone(name: str, tiled: bool) -> None:
    """In tiles too, one family for each kind of autoencoder."""
    family, vae = family_of(name), codec(name, tiled=tiled)
    size = (64, 576) if tiled else (64, 128)  # tiles are of 512 pixels
    generator = torch.Generator().manual_seed(4)
    pixels = torch.rand(3, 3, *size, generator=generator) * 2 - 1
    pixels[1] *= 0.1
    together = family.encode_pixels(vae, pixels)
    alone = [family.encode_pixels(vae, each[None]) for each in pixels]
    assert together.keys() == alone[0].keys() and set(together) in ({"mean"}, {"mean", "std"})
    for key, tensor in together.items():
        expected = torch.cat([each[key] for each in alone])
        assert tensor.shape == expected.shape and expected.isfinite().all()
        torch.testing.assert_close(
            tensor, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
        )
        assert not torch.allclose(tensor[0], tensor[1], rtol=0.01)
