"""What fused projections of queries, keys and values gain, and whether they change predictions.

    python benchmarks/fused_projections.py [REPEATS]

`runtime.fused_projections` and Diffusers' `fuse_qkv_projections` on blocks of four architectures,
narrower and shallower than real ones. Steps (forward and backward pass) of the plain and of the
fused models take turns; the ratio is plain over fused in processor time of one thread, of the
fastest and of the median.
"""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from runtime.fused_projections import fuse

TOKENS, EDGE = 128, 48  # of the prompt; latents a side
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
Case = tuple[nn.Module, dict[str, Any]]


def flux() -> Case:
    """Two blocks of two streams, two of one."""
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=16,
        joint_attention_dim=512,
        pooled_projection_dim=256,
        axes_dims_rope=(16, 24, 24),
    )
    side = EDGE // 2
    rows = torch.arange(side).float()
    places = torch.cartesian_prod(torch.zeros(1), rows, rows)
    return model, {
        "hidden_states": torch.randn(1, side * side, 64),
        "pooled_projections": torch.randn(1, 256),
        "timestep": torch.tensor([0.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(TOKENS, 3),
    }


def sd3(norm: str | None = None) -> Case:
    """Two blocks; version 3.5 has norms of queries and keys."""
    model = SD3Transformer2DModel(
        sample_size=64,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=16,
        joint_attention_dim=512,
        caption_projection_dim=1024,
        pooled_projection_dim=256,
        qk_norm=norm,
    )
    return model, {
        "hidden_states": torch.randn(1, 16, EDGE, EDGE),
        "pooled_projections": torch.randn(1, 256),
        "timestep": torch.tensor([500.0]),
    }


def pixart() -> Case:
    """Two blocks of PixArt-Sigma's width."""
    model = PixArtTransformer2DModel(
        sample_size=64,
        num_layers=2,
        out_channels=8,
        caption_channels=512,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, EDGE, EDGE),
        "timestep": torch.tensor([500.0]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def unet() -> Case:
    """Two resolutions, the first with cross-attention."""
    model = UNet2DConditionModel(
        block_out_channels=(160, 320),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=512,
    )
    return model, {"sample": torch.randn(1, 4, 32, 32), "timestep": torch.tensor([500.0])}


def ours(model: nn.Module) -> Any:
    """A copy that trains the same weights."""
    made: Any = copy.deepcopy(model)
    fuse(made, ("attn2",) if type(made) in (PixArtTransformer2DModel, UNet2DConditionModel) else ())
    return made


def theirs(model: nn.Module) -> Any:
    """A copy that trains fused projections in the place of those that they are made of."""
    made: Any = copy.deepcopy(model)
    made.fuse_qkv_projections()
    for module in made.modules():
        for name, parts in FUSED.items():
            if hasattr(module, name):
                getattr(module, name).requires_grad_(True)
                for part in parts:
                    getattr(module, part).requires_grad_(False)
    return made


def predicted(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """Without gradients."""
    with torch.no_grad():
        found: torch.Tensor = model(**given, return_dict=False)[0]
    return found


def step(model: Any, given: dict[str, Any]) -> float:
    """Seconds of processor time of a forward and backward pass."""
    began = time.process_time()
    model(**given, return_dict=False)[0].square().mean().backward()
    model.zero_grad(set_to_none=True)
    return time.process_time() - began


def main(repeats: int) -> None:
    """Print a row for each architecture."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = {"flux": flux, "sd3": sd3, "sd3.5": lambda: sd3("rms_norm"), "pixart": pixart}
    for name, make in {**cases, "unet": unet}.items():
        model, given = make()
        given["encoder_hidden_states"] = torch.randn(1, TOKENS, 512)
        with torch.no_grad():
            for label, weight in model.named_parameters():
                if "norm_" in label and weight.ndim == 1:
                    weight.normal_(1.0, 0.3)  # as trained ones are: not all 1
        models = (model, ours(model), theirs(model))
        plain, *changed = (predicted(one, given) for one in models)
        times: list[list[float]] = [[] for _ in models]
        for _ in range(repeats + 1):
            for kept, each in zip(times, models, strict=True):
                kept.append(step(each, given))
        first, *others = (sorted(kept[1:]) for kept in times)
        for label, found, taken in zip(("ours", "theirs"), changed, others, strict=True):
            far = float((plain - found).abs().max() / plain.abs().max())
            middle = len(first) // 2
            print(
                f"{name:8} {label:7} differs by {far:.1e}   {first[0]:.2f} s, ratio "
                f"{first[0] / taken[0]:.2f} (fastest), "
                f"{first[middle] / taken[middle]:.2f} (median)",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
