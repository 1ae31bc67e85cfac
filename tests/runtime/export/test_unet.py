"""LoRA of UNets under sd-scripts' names: Diffusers reads them, and has the same adapter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from compiler.families import FAMILIES, sdxl
from runtime.export.export import export
from runtime.export.request import chosen, requested
from runtime.export.sgm import published
from tests.runtime.export.runs import pipeline_of

FAMILIES_HERE = ["sd", "sdxl"]


def updates(plan, file: Path) -> dict[str, torch.Tensor]:
    """By module, what the file adds to the weights, as Diffusers merges it."""
    pipeline = pipeline_of(plan)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.named_parameters()}
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = dict(pipeline.unet.named_parameters())
    assert after.keys() == before.keys()
    return {n: after[n] - before[n] for n in before if not torch.equal(after[n], before[n])}


@pytest.mark.parametrize("family", FAMILIES_HERE)
@pytest.mark.parametrize("format", ["kohya", "comfyui"])
def test_diffusers_reads_the_same_adapter(runs, family, format, tmp_path) -> None:
    plan = runs(family)
    file = tmp_path / "lora.safetensors"
    export(requested(chosen(Path(plan.run_folder)), format=format, out=file))
    found = updates(plan, file)
    own = updates(plan, Path(plan.run_folder) / "lora/pytorch_lora_weights.safetensors")
    assert found.keys() == own.keys() and len(found) == len(load_file(file)) / 3
    assert any("up_blocks" in name for name in found) and any("mid_block" in n for n in found)
    for name, update in own.items():
        torch.testing.assert_close(found[name], update, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "key", "architecture", "implementation"),
    [
        (
            "sd",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha",
            "stable-diffusion-v1/lora",
            "diffusers",
        ),
        (
            "sdxl",
            "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_out_0.alpha",
            "stable-diffusion-xl-v1-base/lora",
            "https://github.com/Stability-AI/generative-models",
        ),
    ],
)
def test_the_file_says_what_it_is(
    runs, family, key, architecture, implementation, tmp_path
) -> None:
    file = tmp_path / "lora.safetensors"
    plan = runs(family)
    export(requested(chosen(Path(plan.run_folder)), format="kohya", out=file))
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
        assert opened.get_tensor(key).item() == 3.0
    assert said["modelspec.architecture"] == architecture
    assert said["modelspec.implementation"] == implementation
    assert said["ss_network_module"] == "networks.lora"


def test_names_are_those_of_the_published_unet() -> None:
    """Diffusers' own reader of the published file, run backwards over every tensor."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = dict(FAMILIES["sdxl"].known[0].configs["unet"])
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    names = {}
    for name in unet.state_dict():
        module, _, leaf = name.rpartition(".")
        try:
            names[name] = f"{published(module, config)}.{leaf}"
        except KeyError:
            pytest.fail(f"no place for {name}")
    assert len(set(names.values())) == len(names)
    stored = {f"model.diffusion_model.{there}": here for here, there in names.items()}
    read = convert_ldm_unet_checkpoint(dict(stored), dict(unet.config))
    assert read == {name: name for name in names}


def test_what_has_no_place_there() -> None:
    for module in ("conv_in.more", "down_blocks.0.resnets.0.conv9", "down_blocks.0.other.0.x"):
        with pytest.raises(KeyError):
            published(module, sdxl.UNET)
    with pytest.raises(KeyError, match="different depth"):
        published("down_blocks.0.resnets.0.conv1", {**sdxl.UNET, "layers_per_block": [1, 2, 2]})


@pytest.mark.parametrize(("family", "count"), [("sd", 192), ("sdxl", 722)])
def test_all_linear_are_as_many_as_sd_scripts_counts(family: str, count: int) -> None:
    """What it prints of the U-Net when it begins; of each a name of its own."""
    card = FAMILIES[family]
    pattern = re.compile("|".join(card.target_sets["all-linear"]))
    config = dict(card.known[0].configs["unet"])
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    matched = [name for name, _ in unet.named_modules() if pattern.fullmatch(name)]
    assert len({published(name, config) for name in matched}) == len(matched) == count
