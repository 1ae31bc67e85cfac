"""Transformers in files of their own, as ComfyUI's and publishers' are, with and without a prefix.

Read: what an inverse of Diffusers' readers makes. Written: what Diffusers' readers make of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file
from torch import Tensor

from compiler.families import FAMILIES
from compiler.families.whole_file import MODEL
from compiler.plan import Model, Plan
from runtime.errors import RunFailed
from runtime.events import Silent
from runtime.execute import execute
from runtime.export import nextdit
from runtime.export.base import base_tensors
from runtime.export.export import export
from runtime.export.lazy import held, write
from runtime.export.request import Refused, chosen, requested
from runtime.export.whole import laid_out
from runtime.families import family_of
from runtime.families.single_file import stored_dtype, translated
from tests.compiler.recipes import compiled, make_pictures
from tests.runtime.export.test_whole import RECIPE
from tests.runtime.test_weights_file import (
    TRANSFORMER,
    flux2_published,
    joined,
    renamed,
    z_image_published,
)
from tests.runtime.tiny import make_tiny, tiny_model

CPU = torch.device("cpu")
TEXT = "text_encoders.x.transformer.model.norm.weight"  # of an encoder that no layout is known of
LUMINA2 = (  # Alpha-VLLM/Lumina-Image-2.0, models/model.py
    ("time_caption_embed.caption_embedder", "cap_embedder"),
    ("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
    ("norm_out.linear_2", "final_layer.linear"),
    ("norm1.linear", "adaLN_modulation.1"),
    ("norm1.norm", "attention_norm1"),
    ("refiner.0.norm1", "refiner.0.attention_norm1"),
    (".norm2", ".attention_norm2"),
    ("attn.norm_q", "attn.q_norm"),
    ("attn.norm_k", "attn.k_norm"),
    ("attn.to_out.0", "attn.out"),
    ("attn.", "attention."),
    ("feed_forward.linear_", "feed_forward.w"),
)


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(tensors)


def z_image_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the last norm that these files hold and nobody uses."""
    named = {k.removeprefix(MODEL): v for k, v in z_image_published(tensors).items()}
    return {**named, "norm_final.weight": torch.ones(4)}


PUBLISHED: Mapping[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "flux2": flux2_published,
    "flux2_dev": flux2_published,
    "qwen_image": plain,
    "z_image": z_image_alone,
}


def with_file(model: Model, file: Path) -> Model:
    parts = tuple(evolve(p, file=str(file)) if p.trained else p for p in model.components)
    return evolve(model, components=parts)


@pytest.mark.parametrize("prefix", ["", MODEL])
@pytest.mark.parametrize("family", PUBLISHED)
def test_the_file_is_loaded_and_written_as_the_folder(
    family: str, prefix: str, tmp_path: Path
) -> None:
    folder = make_tiny(family, tmp_path / "base")
    wanted, model = load_file(folder / TRANSFORMER), tiny_model(family, folder)
    laid = {prefix + name: t.contiguous() for name, t in PUBLISHED[family](wanted).items()}
    file = tmp_path / "one.safetensors"
    save_file({**laid, **({TEXT: torch.ones(4)} if prefix else {})}, file)
    of_file = with_file(model, file)
    loaded = family_of(family).load(of_file, "transformer", torch.float32, CPU).state_dict()
    exported = {name: lazy.read() for name, lazy in base_tensors(of_file, seed=0).items()}
    for found in (loaded, exported):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    if prefix:
        return
    written = laid_out(model, held(wanted), everything=False, dtype=None)
    assert written.keys() == laid.keys() - {"norm_final.weight"}
    assert all(torch.equal(lazy.read(), laid[name]) for name, lazy in written.items())
    write(tmp_path / "written.safetensors", written, {})
    cls: Any = getattr(diffusers, FAMILIES[family].components["transformer"])
    place: dict[str, Any] = {"config": str(folder), "subfolder": "transformer"}
    read = cls.from_single_file(str(tmp_path / "written.safetensors"), **place).state_dict()
    assert read.keys() == wanted.keys() and all(torch.equal(read[k], wanted[k]) for k in read)


@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
def test_numbers_of_eight_bits_are_read_as_what_holds_them(family: str, tmp_path: Path) -> None:
    """Files without scales, one in Diffusers' names and one in others."""
    folder = make_tiny(family, tmp_path / "base")
    wanted = load_file(folder / TRANSFORMER)
    small = {k: t.to(torch.float8_e4m3fn) for k, t in PUBLISHED[family](wanted).items()}
    save_file({k: t.contiguous() for k, t in small.items()}, tmp_path / "one.safetensors")
    model = with_file(tiny_model(family, folder), tmp_path / "one.safetensors")
    loaded = family_of(family).load(model, "transformer", torch.bfloat16, CPU).state_dict()
    exported = base_tensors(model, seed=0)
    assert loaded.keys() == wanted.keys() == exported.keys()
    for name, tensor in wanted.items():
        value = tensor.to(torch.float8_e4m3fn).float()
        assert torch.equal(loaded[name].float(), value), name
        read = exported[name].read()
        assert torch.equal(read.float(), value) and read.dtype == exported[name].dtype
        assert read.dtype in (torch.bfloat16, torch.float32)
    file = tmp_path / "one.safetensors"
    assert stored_dtype(FAMILIES[family], "transformer", file) == torch.bfloat16


def thin() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A Lumina 2 of the published width, which Diffusers' reader knows alone, little else."""
    config = {
        **FAMILIES["lumina2"].known[0].configs["transformer"],
        "num_layers": 1,
        "num_refiner_layers": 1,
        "cap_feat_dim": 16,
        "multiple_of": 8,
        "ffn_dim_multiplier": 0.001,
    }
    with torch.device("meta"):
        model: Any = diffusers.Lumina2Transformer2DModel.from_config(config)
    made = {
        name: torch.arange(tensor.numel()).remainder(127 + number).bfloat16().reshape(tensor.shape)
        for number, (name, tensor) in enumerate(model.state_dict().items())
    }
    return config, made


def test_lumina_s_layers_of_unequal_rows(tmp_path: Path) -> None:
    config, wanted = thin()
    laid = renamed(joined(wanted, "attn.to_{}", "attn.qkv"), LUMINA2)
    written = {k: lazy.read() for k, lazy in nextdit.laid_out(held(wanted), config).items()}
    assert written.keys() == laid.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in laid.items())
    card, cls = FAMILIES["lumina2"], diffusers.Lumina2Transformer2DModel
    file = tmp_path / "one.safetensors"
    more = {f"{MODEL}norm_final.weight": torch.ones(4)}
    save_file({MODEL + name: tensor for name, tensor in written.items()} | more, file)
    given = ("transformer", cls, "diffusers", file, config, torch.bfloat16)
    read = translated(card, *given).state_dict()
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in wanted.items())


def trained(place: Path, base: Path, rest: str) -> Plan:
    make_pictures(place / "pictures", [(64, 64)] * 2)
    (place / "recipe.toml").write_text(RECIPE.format(family="z_image", base=base, more=rest))
    result = compiled(place / "recipe.toml")
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    assert execute(result.plan, result.manifest, Silent()).status == "finished"
    return result.plan


def test_a_run_on_the_file_is_the_run_on_the_folder(tmp_path: Path) -> None:
    """From the recipe to the merged model, which is written under the file's names again."""
    folder = make_tiny("z_image", tmp_path / "base")
    bare = tmp_path / "bare"  # all but the transformer's weights
    shutil.copytree(folder, bare)
    (bare / TRANSFORMER).unlink()
    laid = {k: v.contiguous() for k, v in z_image_alone(load_file(folder / TRANSFORMER)).items()}
    save_file(laid, tmp_path / "one.safetensors")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one = trained(tmp_path / "a", folder, "")
    other = trained(tmp_path / "b", tmp_path / "one.safetensors", f'rest = "{bare}"')
    assert {p.name for p in other.model.components if p.file} == {"transformer"}
    name = "lora/pytorch_lora_weights.safetensors"
    loras = [load_file(Path(plan.run_folder) / name) for plan in (one, other)]
    assert loras[0].keys() == loras[1].keys() and loras[0]
    assert all(torch.equal(tensor, loras[1][key]) for key, tensor in loras[0].items())
    weights = chosen(Path(other.run_folder))
    options: dict[str, Any] = {"merge": True, "single_file": True}
    out = tmp_path / "merged.safetensors"
    merged = load_file(export(requested(weights, out=out, **options)))
    assert merged.keys() == laid.keys() - {"norm_final.weight"}
    changed = {key for key in merged if not torch.equal(merged[key], laid[key])}
    assert changed and all("attention.qkv" in k or "attention.out" in k for k in changed)
    with pytest.raises(Refused, match="from a file of its own"):
        requested(weights, everything=True, **options)


def test_another_width_of_lumina_is_said(tmp_path: Path) -> None:
    folder = make_tiny("lumina2", tmp_path / "base")
    model = tiny_model("lumina2", folder)
    laid = laid_out(model, base_tensors(model, 0), everything=False, dtype=None)
    write(tmp_path / "one.safetensors", laid, {})
    with pytest.raises(RunFailed, match="can't be read as a Lumina2Transformer2DModel"):
        family_of("lumina2").load(
            with_file(model, tmp_path / "one.safetensors"), "transformer", torch.float32, CPU
        )
