"""DoRA and what LyCORIS adds in other programs' keys, applied as these do: the trained weights.

LyCORIS, which sd-scripts load, is asked itself; ComfyUI's formula is written down here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from compiler.adapters import AdapterKind
from compiler.families import FAMILIES
from compiler.plan import Plan
from runtime.export.conventions import FUSED, LORA, refusal
from runtime.export.export import export, in_kohya
from runtime.export.lazy import held
from runtime.export.request import Refused, chosen, requested
from runtime.methods import adapter_files, lora
from runtime.methods.kinds import parts_of
from runtime.methods.updates import adapted_weight
from tests.runtime.export.runs import pipeline_of
from tests.runtime.methods.test_kinds import adapter_of, made, plain, shake
from tests.runtime.plans import LORA as SMALL
from tests.runtime.tiny import make_tiny

ADAPTER = evolve(
    SMALL,
    kind="dora",
    rank=2,
    alpha=3.0,
    targets=(*FAMILIES["sd"].target_sets["all-linear"], r"down_blocks\.0\.resnets\.0\.conv1"),
)


@pytest.fixture(scope="module")
def plan(runs: Any) -> Plan:
    found: Plan = runs("sd", adapter=ADAPTER)
    return found


@pytest.fixture(scope="module")
def expected(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights with the adapter in them, of the layers that have one; names as sd-scripts'."""
    out = tmp_path_factory.mktemp("dora") / "merged"
    export(requested(chosen(Path(plan.run_folder)), merge=True, out=out))
    after = pipeline_of(plan, out).unet.state_dict()
    before = pipeline_of(plan).unet.state_dict()
    return {
        "lora_unet_" + name.removesuffix(".weight").replace(".", "_"): tensor
        for name, tensor in after.items()
        if not torch.equal(tensor, before[name])
    }


def read(plan: Plan, format: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """By layer, the tensors of the exported file."""
    file = export(
        requested(chosen(Path(plan.run_folder)), format=format, out=folder / "x.safetensors")
    )
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        layer, _, part = key.partition(".")
        found.setdefault(layer, {})[part] = tensor
    return found


def test_lycoris_reads_the_keys_of_sd_scripts(
    plan: Plan, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    modules = pytest.importorskip("lycoris.modules")
    layers = {
        f"lora_unet_{name.replace('.', '_')}": module
        for name, module in pipeline_of(plan).unet.named_modules()
    }
    found = read(plan, "kohya", tmp_path)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, parts in found.items():
        state = {f"{name}.{part}": tensor for part, tensor in parts.items()}
        kind, arguments = modules.get_module(state, name)
        with torch.no_grad():
            made = modules.make_module(kind, arguments, name, layers[name])
            weight = made.get_merged_weight()[0]
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


def test_comfyui_s_formula_gives_the_weights(
    plan: Plan, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    """comfy/weight_adapter/base.py: rows of W + alpha / rank * up down, times `dora_scale` over the
    lengths of W's rows, where it has a number for each."""
    base = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": tensor
        for name, tensor in pipeline_of(plan).unet.state_dict().items()
    }
    found = read(plan, "comfyui", tmp_path)
    assert found.keys() == expected.keys()
    for name, parts in found.items():
        weight = base[name].double().flatten(1)
        up, down = (parts[f"lora_{way}.weight"].double().flatten(1) for way in ("up", "down"))
        whole = weight + parts["alpha"].item() / down.shape[0] * (up @ down)
        assert parts["dora_scale"].shape[0] == whole.shape[0]
        assert parts["dora_scale"].ndim == base[name].ndim
        rows = parts["dora_scale"].double().view(-1, 1) / weight.norm(dim=1, keepdim=True)
        wanted = expected[name].double().flatten(1)
        torch.testing.assert_close(whole * rows, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lokr", "loha", "glora", "full"])
def test_lycoris_reads_its_own_kinds_under_the_keys_of_sd_scripts(
    kind: AdapterKind, tmp_path_factory: pytest.TempPathFactory
) -> None:
    modules = pytest.importorskip("lycoris.modules")
    folder = make_tiny("sdxl", tmp_path_factory.mktemp("kinds") / "sdxl")
    adapter = adapter_of(kind, "sdxl")
    _, _, built = made(folder, adapter)
    shake(built)
    merged = dict(lora.merged(built))
    values = {name: tensor.detach() for name, tensor in built.trainable.items()}
    config = dict(UNet2DConditionModel.load_config(folder / "unet"))
    laid_out = held(adapter_files.laid_out(values, adapter))
    there = in_kohya("sdxl", laid_out, list(parts_of(list(values))), config)
    file = {key: lazy.read() for key, lazy in there.items()}
    names = dict(
        zip(*([key.partition(".")[0] for key in each] for each in (laid_out, file)), strict=True)
    )
    assert all(re.match("lora_unet_(input|middle|output)_block", key) for key in file)
    layers = dict(plain(folder).named_modules())
    for module in parts_of(list(values)):
        key = names[f"lycoris_{module.replace('.', '_')}"]
        found, arguments = modules.get_module(file, key)
        with torch.no_grad():
            one = modules.make_module(found, arguments, key, layers[module])
            weight = (
                layers[module].weight + one.get_diff_weight()[0]
                if kind != "full"
                else (layers[module].weight + file[f"{key}.diff"])
            )
        torch.testing.assert_close(
            weight.view_as(merged[f"{module}.weight"]),
            merged[f"{module}.weight"],
            rtol=0,
            atol=1e-5,
        )


@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_lycoris_turns_outputs_where_peft_turns_inputs(kind: AdapterKind) -> None:
    """Which is why there are no keys of the one for the other: a rotation of the outputs keeps
    W^T W, one of the inputs W W^T."""
    lycoris = pytest.importorskip("lycoris.modules")
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 16, bias=False)
    cls = {"oft": lycoris.diag_oft.DiagOFTModule, "boft": lycoris.boft.ButterflyOFTModule}[kind]
    theirs = cls("x", layer, lora_dim=4)
    torch.nn.init.normal_(theirs.oft_blocks, std=0.3)
    part = {"oft": torch.randn(2, 6) * 0.01, "boft": torch.randn(1, 2, 4, 4)}[kind]
    parts = {f"{kind}_R": part, "boft_s": torch.ones(16, 1)}
    with torch.no_grad():
        weight, turned = layer.weight, theirs.get_merged_weight()[0]
        ours = adapted_weight(weight, parts, adapter_of(kind, "sd"), "x")
    torch.testing.assert_close(turned.T @ turned, weight.T @ weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours @ ours.T, weight @ weight.T, rtol=0, atol=1e-4)
    for one in (turned @ turned.T - weight @ weight.T, ours.T @ ours - weight.T @ weight):
        assert one.abs().max() > 1e-3
    for format in ("kohya", "comfyui"):
        assert "turns a layer's inputs" in refusal(format, "sd", kind)  # type: ignore[arg-type]


def test_layers_that_are_one_there_are_refused(plan: Plan, tmp_path: Path) -> None:
    for format in FUSED:
        for family in FUSED[format]:
            assert "one layer there" in refusal(format, family, "dora")
        for family in LORA[format].keys() - FUSED[format]:
            assert not refusal(format, family, "dora")
    assert "one layer there" in refusal("kohya", "flux", "lokr")
    assert not any(refusal("kohya", family, "full") for family in LORA["kohya"])
    assert "Sana" in refusal("kohya", "sana", "lokr")
    with pytest.raises(Refused, match="only a LoRA can be resized"):
        requested(chosen(Path(plan.run_folder)), format="kohya", resize="1", out=tmp_path / "x")
