"""LoHa with the lengths of rows apart, exported: ComfyUI and LyCORIS each come to the merged
weights by their own formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors import safe_open
from safetensors.torch import load_file

from compiler.families import FAMILIES
from runtime.export.export import export
from runtime.export.request import chosen, requested
from runtime.methods.adapter_files import COMFYUI_LENGTHS
from tests.runtime.export.runs import pipeline_of
from tests.runtime.plans import LORA

ADAPTER = evolve(
    LORA,
    kind="loha",
    rank=2,
    alpha=3.0,
    init="",
    targets=FAMILIES["sd"].target_sets["attention"],
    weight_decompose=True,
    train_norm=True,
)


@pytest.mark.parametrize("format", ["comfyui", "kohya", "lycoris"])
def test_programs_come_to_the_merged_weights(runs: Any, format: str, tmp_path: Path) -> None:
    """ComfyUI (comfy/weight_adapter/base.py) multiplies the rows of V = W + alpha / rank * D by
    `dora_scale` over the lengths of W's, LyCORIS (functional/general.py) over those of V's."""
    plan = runs("sd", adapter=ADAPTER)
    weights = chosen(Path(plan.run_folder))
    merged = export(requested(weights, merge=True, out=tmp_path / "merged"))
    expected = pipeline_of(plan, merged).unet.state_dict()
    base = pipeline_of(plan).unet.state_dict()
    file = export(requested(weights, format=format, out=tmp_path / "x.safetensors"))
    with safe_open(file, "pt") as opened:
        assert (COMFYUI_LENGTHS in opened.metadata()) == (format == "comfyui")
    root = "lora_unet_" if format == "kohya" else "lycoris_"
    names = {root + k.rpartition(".")[0].replace(".", "_"): k.rpartition(".")[0] for k in base}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(file).items():
        layer, _, part = key.partition(".")
        layers.setdefault(names[layer], {})[part] = tensor.double()
    changed = {k.rpartition(".")[0] for k, v in expected.items() if not torch.equal(v, base[k])}
    assert changed == layers.keys()
    for name, parts in layers.items():
        weight = base[f"{name}.weight"].double()
        if "w_norm" in parts:
            found = weight + parts["w_norm"]
            bias = base[f"{name}.bias"].double() + parts["b_norm"]
            torch.testing.assert_close(bias, expected[f"{name}.bias"].double(), rtol=0, atol=1e-6)
        else:
            scale = float(parts["alpha"]) / parts["hada_w1_b"].shape[0]
            one, other = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
            v = weight + scale * (one * other).view(weight.shape)
            by = (weight if format == "comfyui" else v).flatten(1).norm(dim=1)
            shape = (-1, *[1] * (weight.ndim - 1))
            found = v * (parts["dora_scale"].flatten() / by).view(shape)
        torch.testing.assert_close(found, expected[f"{name}.weight"].double(), rtol=0, atol=1e-6)
