"""One photograph, learnt by heart: the loss falls, and the sample becomes the photograph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from attrs import evolve
from numpy.typing import NDArray
from PIL import Image

from runtime.data.pixels import decode, to_tensor
from runtime.events import Silent
from runtime.execute import execute
from tests.runtime.plans import PICTURES, manifest_of, source_of, tiny_plan
from tests.runtime.tiny import make_tiny

STEPS = {"sana": 150, "sd3": 300}
BATCH = 4  # the photograph, at four noise levels
WIDER: dict[str, dict[str, Any]] = {
    "sana": {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 64,
    },
    "sd3": {"num_attention_heads": 4, "attention_head_dim": 16, "caption_projection_dim": 64},
}


def normalise(family: str, folder: Path, pixels: torch.Tensor) -> NDArray[np.float64]:
    """Make the random VAE what a trained one is: unit normal latents, a narrow posterior.

    Returns its own reconstruction of the picture, (H, W, 3) in [0, 1].
    """
    cls = diffusers.AutoencoderDC if family == "sana" else diffusers.AutoencoderKL
    vae: Any = cls.from_pretrained(folder)
    with torch.no_grad():
        if family == "sd3":
            out = vae.encoder.conv_out  # channels of the mean, then of the log variance
            out.weight[out.out_channels // 2 :] = 0
            out.bias[out.out_channels // 2 :] = -12
        encoded = vae.encode(pixels)
        latents = encoded.latent if family == "sana" else encoded.latent_dist.mean
        picture = vae.decode(latents).sample.clamp(-1, 1)[0].permute(1, 2, 0).double().numpy()
    scales = {"scaling_factor": 1 / latents.std().item()}
    if family == "sd3":
        scales["shift_factor"] = latents.mean().item()
    vae.register_to_config(**scales)
    vae.save_pretrained(folder)
    return np.asarray((picture + 1) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_one_photograph(family, tmp_path, data_root):
    """The measure: Pearson's correlation of all pixel values of the sample with those of the VAE's
    reconstruction of the photograph (what a perfect model would draw)."""
    base = make_tiny(family, tmp_path / "base", **WIDER[family])
    (tmp_path / "dog").mkdir()
    shutil.copy(data_root / "dreambooth" / "dog" / "00.jpg", tmp_path / "dog")
    source = source_of(tmp_path / "dog", repeats=str(BATCH))
    (sample,) = manifest_of((source,))
    size = (sample.placement.width, sample.placement.height)
    data = (tmp_path / "dog" / sample.key).read_bytes()
    pixels = to_tensor(decode(data, sample.placement, (sample.width, sample.height)))[None]
    wanted = normalise(family, base / "vae", pixels)

    plan, manifest = tiny_plan(
        family,
        base,
        (source,),
        tmp_path / "run",
        steps=STEPS[family],
        batch_size=BATCH,
        lr=5e-3,
        adapter=None,
        ema=None,
        validation=evolve(PICTURES, every=0, sizes=(size,), guidance=1.0, steps=20),
    )
    plan = evolve(plan, schedule=evolve(plan.schedule, warmup=20, end=0.05))
    assert execute(plan, manifest, Silent()).status == "finished"

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert fmean(losses[:20]) >= 5 * fmean(losses[-20:])

    def likeness(step: int) -> float:
        (path,) = (tmp_path / "run" / "samples" / f"step-{step:06d}").glob("*.png")
        with Image.open(path) as image:
            drawn = np.asarray(image, dtype=np.float64) / 255
        return float(np.corrcoef(drawn.ravel(), wanted.ravel())[0, 1])

    before, after = likeness(0), likeness(STEPS[family])
    assert after > before + 0.3
    assert after > 0.8
