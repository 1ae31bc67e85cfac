"""LoRA in other programs' keys, of families that no other file has: read by Diffusers' own readers
of them, which make of the file the updates that were written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_lumina2_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from compiler.families import FAMILIES
from runtime.errors import RunFailed
from runtime.export import lora_keys
from runtime.export.conventions import (
    ARCHITECTURES,
    LORA,
    NETWORK_MODULES,
    NO_KEYS,
    Format,
    refusal,
    unread,
    usual,
)
from runtime.export.export import COMFYUI, KOHYA, check_read, has_place
from runtime.export.lora_keys import Layer
from runtime.methods.lora import matching
from tests.runtime.tiny import make_tiny

READ = ["flux2", "flux2_dev", "kolors", "qwen_image", "sdxl_refiner", "z_image"]
"""Those whose tiny models Diffusers' readers take."""
KOLORS = FAMILIES["kolors"].known[0].configs["unet"]
FORMATS: tuple[Format, ...] = ("kohya", "comfyui")


def layers_of(
    model: nn.Module, targets: tuple[str, ...], columns: int | None = None
) -> dict[str, Layer]:
    """Random ones, ranks by turns 2 and 3 and a scale of three for each, on what `targets` match;
    of so many `columns`, where that is given: layouts only move rows."""
    found = {}
    for number, module in enumerate(matching(model, targets)):
        generator = torch.Generator().manual_seed(number)
        outputs, inputs = model.get_parameter(f"{module}.weight").shape[:2]
        rank, inputs = 2 + number % 2, columns or inputs
        one = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        other = torch.randn(outputs, rank, generator=generator) / 10
        found[module] = Layer(a=one, b=other, scale=(1.5, 0.5, 1.0)[number % 3])
    return found


def written(
    family: str, format: str, layers: Mapping[str, Layer], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    foreign = {"kohya": KOHYA, "comfyui": COMFYUI}[format]
    if family in foreign:
        return foreign[family](layers, config)
    return lora_keys.folded(layers, FAMILIES[family].trained_component)


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("keys")
    return {family: make_tiny(family, root / family) for family in READ}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", READ)
def test_diffusers_reads_the_same_updates(
    family: str, format: Format, tinies: Mapping[str, Path], tmp_path: Path
) -> None:
    targets = FAMILIES[family].target_sets["all-linear"]
    updates_are_read(family, format, tinies[family], targets, tmp_path)


def test_kolors_layers_outside_its_blocks(tinies: Mapping[str, Path], tmp_path: Path) -> None:
    """Diffusers passes over `add_embedding` by its own name, and `encoder_hid_proj` by any."""
    targets = (r"(add|time)_embedding\..*",)
    for format in FORMATS:
        updates_are_read("kolors", format, tinies["kolors"], targets, tmp_path)
        assert not has_place(format, "kolors", "encoder_hid_proj", KOLORS)
    assert has_place("diffusers", "kolors", "encoder_hid_proj", KOLORS)


def updates_are_read(
    family: str, format: Format, folder: Path, targets: tuple[str, ...], place: Path
) -> None:
    card = FAMILIES[family]
    pipeline = getattr(diffusers, card.pipeline).from_pretrained(folder)
    model = getattr(pipeline, card.trained_component)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    layers = layers_of(model, targets)
    file = written(family, format, layers, dict(model.config))
    save_file({key: tensor.contiguous() for key, tensor in file.items()}, place / "x.safetensors")
    pipeline.load_lora_weights(str(place), weight_name="x.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = dict(model.named_parameters())
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {f"{module}.weight" for module in layers}
    for module, layer in layers.items():
        name = f"{module}.weight"
        update = layer.update().view(before[name].shape)
        torch.testing.assert_close(after[name] - before[name], update, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def lumina() -> nn.Module:
    """One block of each kind, as wide as the published model, which Diffusers' readers ask for."""
    known = FAMILIES["lumina2"].known[0].configs["transformer"]
    with torch.device("meta"):
        model: nn.Module = diffusers.Lumina2Transformer2DModel.from_config(
            {**known, "num_layers": 1, "num_refiner_layers": 1}
        )
    return model


def test_lumina_s_keys_for_comfyui_are_read_by_diffusers(lumina: Any) -> None:
    layers = layers_of(lumina, FAMILIES["lumina2"].target_sets["all-linear"], 4)
    file = written("lumina2", "comfyui", layers, dict(lumina.config))
    assert "diffusion_model.layers.0.attention.qkv.lora_A.weight" in file
    found = diffusers.Lumina2Pipeline.lora_state_dict(dict(file))
    for module, layer in layers.items():
        a, b = (found.pop(f"transformer.{module}.lora_{which}.weight") for which in "AB")
        torch.testing.assert_close(b @ a, layer.update(), rtol=1e-4, atol=1e-5)
    assert not found


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_lumina_s_keys_of_sd_scripts_applied_to_the_published_layout(
    lumina: Any, targets: str
) -> None:
    """Diffusers has no reader for them. So they are applied as sd-scripts apply them, and Diffusers
    reads the published layout."""
    layers = layers_of(lumina, FAMILIES["lumina2"].target_sets[targets], 4)
    file = written("lumina2", "kohya", layers, dict(lumina.config))
    names = {key.split(".")[0] for key in file}
    published = {}
    for name in names:
        down, up = file[f"{name}.lora_down.weight"], file[f"{name}.lora_up.weight"]
        scale = file[f"{name}.alpha"].item() / down.shape[0]
        published[f"{dotted(name)}.weight"] = scale * (up @ down)
    found = convert_lumina2_to_diffusers(dict(published))
    assert {f"{module}.weight" for module in layers} == found.keys()
    for module, layer in layers.items():
        torch.testing.assert_close(found[f"{module}.weight"], layer.update(), rtol=1e-4, atol=1e-5)


def dotted(name: str) -> str:
    """The published module that a key of sd-scripts is of."""
    bare = name.removeprefix("lora_unet_")
    for block in ("layers", "noise_refiner", "context_refiner"):
        bare = bare.replace(f"{block}_0_", f"{block}.0.")
    for old, new in (("attention_", "attention."), ("feed_forward_", "feed_forward.")):
        bare = bare.replace(old, new)
    return bare.replace("adaLN_modulation_1", "adaLN_modulation.1")


PUBLISHED: Mapping[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "flux2": convert_flux2_transformer_checkpoint_to_diffusers,
    "flux2_dev": convert_flux2_transformer_checkpoint_to_diffusers,
    "lumina2": convert_lumina2_to_diffusers,
}
DEPTHS = ("num_layers", "num_single_layers", "num_refiner_layers")


@pytest.mark.parametrize("family", PUBLISHED)
def test_every_layer_has_its_published_name(family: str) -> None:
    """A whole fine-tune changes all of them. Both formats are applied to the published layout, as
    their programs do it, and Diffusers reads that: its own reader of these LoRAs knows fewer, and
    does not turn the halves of the last modulation."""
    config = dict(FAMILIES[family].known[0].configs["transformer"])
    config |= {depth: 1 for depth in DEPTHS if depth in config}
    with torch.device("meta"):
        cls = getattr(diffusers, FAMILIES[family].components["transformer"].rpartition(".")[2])
        model: nn.Module = cls.from_config(config)
    layers = layers_of(model, (".*",), 4)
    generic, kohya = (written(family, format, layers, config) for format in ("comfyui", "kohya"))
    sums: dict[str, dict[str, Tensor]] = {"comfyui": {}, "kohya": {}}
    for name in {key.rpartition(".lora_")[0] for key in generic}:
        there = f"{name.removeprefix('diffusion_model.')}.weight"
        a, b = (generic[f"{name}.lora_{which}.weight"].double() for which in "AB")
        sums["comfyui"][there] = b @ a
        own = "lora_unet_" + there.removesuffix(".weight").replace(".", "_")
        down, up = (kohya.pop(f"{own}.lora_{way}.weight").double() for way in ("down", "up"))
        sums["kohya"][there] = kohya.pop(f"{own}.alpha").item() / down.shape[0] * (up @ down)
    assert not kohya
    for tensors in sums.values():
        found = PUBLISHED[family](tensors)
        assert found.keys() == {f"{module}.weight" for module in layers}
        for module, layer in layers.items():
            update = layer.scale * (layer.b.double() @ layer.a.double())
            torch.testing.assert_close(found[f"{module}.weight"], update, rtol=1e-5, atol=1e-6)


def test_modules_without_a_place_are_refused() -> None:
    layer = Layer(a=torch.zeros(1, 4), b=torch.zeros(4, 1), scale=1.0)
    for family in ("flux2", "lumina2"):
        config = FAMILIES[family].known[0].configs["transformer"]
        with pytest.raises(KeyError, match="norm_in"):
            written(family, "kohya", {"norm_in.linear": layer}, config)


def test_lycoris_kinds_where_comfyui_does_not_know_the_layers() -> None:
    """By `model_lora_keys_unet` of its comfy/lora.py, which has `lycoris_` names for UNets, SD3,
    Flux, Qwen-Image, and for Z-Image's names; Lumina-Image 2.0 is the same class under others."""
    known = {family for family in FAMILIES if not refusal("comfyui", family, "lokr")}
    assert FAMILIES.keys() - known == {"lumina2", "pixart", "sana"}
    for family in FAMILIES:
        assert not refusal("lycoris", family, "loha")
        assert usual(family, "loha") == ("comfyui" if family in known else "lycoris")
        assert "no comfyui keys for LoHa" in refusal("comfyui", family, "loha") or family in known
    assert (usual("pixart", "lora"), usual("sd", "lora")) == ("peft", "diffusers")
    names = ["x_embedder", "single_stream_modulation.linear", "double_stream_modulation_img.linear"]
    assert unread("flux2", names) == names[1:] and not unread("sd3", names)
    assert not unread("flux2", ["transformer_blocks.0.attn.to_q"])
    with pytest.raises(RunFailed, match="no place for 'single_stream_modulation") as caught:
        check_read("flux2", {f"{names[1]}.lokr_w1.default": torch.zeros(1)})
    assert "--format lycoris" in caught.value.help


def test_every_family_has_keys_or_a_reason() -> None:
    for format in ("kohya", "comfyui"):
        assert LORA[format].keys() | NO_KEYS[format].keys() == FAMILIES.keys()
        assert not LORA[format].keys() & NO_KEYS[format].keys()
        foreign = KOHYA if format == "kohya" else COMFYUI
        assert foreign.keys() <= LORA[format].keys()
        for family in NO_KEYS[format]:
            assert NO_KEYS[format][family] in refusal(format, family, "lora")
    assert KOHYA.keys() == LORA["kohya"].keys() == NETWORK_MODULES.keys()
    assert ARCHITECTURES.keys() == FAMILIES.keys()
    for name, card in FAMILIES.items():
        said = ARCHITECTURES[name](card.known[0].configs[card.trained_component])
        assert said
