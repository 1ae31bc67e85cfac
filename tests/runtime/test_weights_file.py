"""Weights of what is trained from one file: Diffusers' names, the publisher's, and neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file

from compiler.plan import Model, Quantisation
from runtime.errors import RunFailed
from runtime.export import mmdit
from runtime.export.base import base_tensors
from runtime.export.lazy import held
from runtime.families import family_of
from tests.compiler.recipes import compiled, make_pictures
from tests.runtime.tiny import make_tiny, tiny_model

CPU = torch.device("cpu")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and another one whose weights are to be taken."""
    root = tmp_path_factory.mktemp("file")
    for seed, name in enumerate(("base", "other")):
        make_tiny("sd3", root / name, seed=seed)
    return root / "base", root / "other"


def with_file(folder: Path, file: Path, quantize: Quantisation = "none") -> Model:
    model = tiny_model("sd3", folder)
    parts = tuple(
        evolve(part, file=str(file), quantize=quantize) if part.name == "transformer" else part
        for part in model.components
    )
    return evolve(model, components=parts)


def published(other: Path, place: Path) -> Path:
    """The other's transformer in the names that Stability AI published."""
    tensors = load_file(other / TRANSFORMER)
    laid = {k: lazy.read() for k, lazy in mmdit.laid_out(held(tensors), 3).items()}
    save_file({k: v.contiguous() for k, v in laid.items()}, place)
    return place


@pytest.mark.parametrize("names", ["diffusers", "published"])
def test_the_file_s_weights_are_loaded(
    folders: tuple[Path, Path], names: str, tmp_path: Path
) -> None:
    base, other = folders
    file = other / TRANSFORMER
    if names == "published":
        file = published(other, tmp_path / "one.safetensors")
    model, family = with_file(base, file), family_of("sd3")
    wanted = load_file(other / TRANSFORMER)
    loaded = family.load(model, "transformer", torch.float32, CPU).state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    exported = base_tensors(model, seed=0)  # what an adapter is merged into
    assert all(torch.equal(exported[name].read(), tensor) for name, tensor in wanted.items())
    vae = family.load(model, "vae", torch.float32, CPU).state_dict()
    assert torch.equal(
        vae["encoder.conv_in.weight"],
        load_file(base / "vae/diffusion_pytorch_model.safetensors")["encoder.conv_in.weight"],
    )


FLUX2 = (  # black-forest-labs/flux2, src/flux2/model.py
    ("single_transformer_blocks.", "single_blocks."),
    ("transformer_blocks.", "double_blocks."),
    ("attn.to_qkv_mlp_proj", "linear1"),
    ("attn.to_out.0", "img_attn.proj"),
    ("attn.to_out.weight", "linear2.weight"),
    ("attn.to_add_out", "txt_attn.proj"),
    ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
    ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
    ("ff_context.linear_in", "txt_mlp.0"),
    ("ff_context.linear_out", "txt_mlp.2"),
    ("ff.linear_in", "img_mlp.0"),
    ("ff.linear_out", "img_mlp.2"),
    ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    ("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    ("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    ("modulation_img.linear", "modulation_img.lin"),
    ("modulation_txt.linear", "modulation_txt.lin"),
    ("single_stream_modulation.linear", "single_stream_modulation.lin"),
    ("x_embedder", "img_in"),
    ("context_embedder", "txt_in"),
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    ("proj_out", "final_layer.linear"),
)
Z_IMAGE = (  # Tongyi-MAI/Z-Image, src/zimage/transformer.py, as ComfyUI has it
    ("all_final_layer.2-1.", "final_layer."),
    ("all_x_embedder.2-1.", "x_embedder."),
    ("attention.to_out.0.", "attention.out."),
    ("attention.norm_k.", "attention.k_norm."),
    ("attention.norm_q.", "attention.q_norm."),
)


def flux2_published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Query, key and value of double blocks are one layer; the last norm has its halves turned."""
    found = joined(tensors, "attn.to_{}", "img_attn.qkv")
    found = joined(found, "attn.add_{}_proj", "txt_attn.qkv")
    shift_last = "norm_out.linear.weight"
    scale, shift = found[shift_last].chunk(2)
    named = renamed(found | {shift_last: torch.cat([shift, scale])}, FLUX2)
    for one in ("query", "key"):  # of single blocks, whose names begin the double ones'
        old, new = f"attn.norm_{one[0]}.weight", f"norm.{one}_norm.scale"
        for key in [key for key in named if key.endswith(old)]:
            side = "" if key.startswith("single") else "img_attn."
            named[key.removesuffix(old) + side + new] = named.pop(key)
    return named


def z_image_published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = renamed(joined(tensors, "attention.to_{}", "attention.qkv"), Z_IMAGE)
    return {f"model.diffusion_model.{key}": value for key, value in named.items()}


def joined(tensors: dict[str, torch.Tensor], three: str, one: str) -> dict[str, torch.Tensor]:
    """Layers of queries, keys and values as one."""
    found, (q, k, v) = dict(tensors), (f"{three.format(name)}.weight" for name in "qkv")
    for start in [key.removesuffix(q) for key in tensors if key.endswith(q)]:
        rows = [found.pop(start + name) for name in (q, k, v)]
        found[f"{start}{one}.weight"] = torch.cat(rows)
    return found


def renamed(
    tensors: dict[str, torch.Tensor], names: tuple[tuple[str, str], ...]
) -> dict[str, torch.Tensor]:
    found = {}
    for key, tensor in tensors.items():
        for old, new in names:
            key = key.replace(old, new)
        found[key] = tensor
    return found


@pytest.mark.parametrize("family", ["flux2", "flux2_dev", "z_image", "qwen_image", "pixart"])
def test_files_of_later_families(family: str, tmp_path: Path) -> None:
    """As published, and in the names of Diffusers, which those of the last two are."""
    for seed, name in enumerate(("base", "other")):
        make_tiny(family, tmp_path / name, seed=seed)
    wanted = load_file(tmp_path / "other" / TRANSFORMER)
    layouts = {"flux2": flux2_published, "flux2_dev": flux2_published, "z_image": z_image_published}
    laid = layouts.get(family, dict)(wanted)
    assert (laid.keys() == wanted.keys()) == (family not in layouts)
    save_file({k: v.contiguous() for k, v in laid.items()}, tmp_path / "one.safetensors")
    model = tiny_model(family, tmp_path / "base")
    parts = tuple(
        evolve(part, file=str(tmp_path / "one.safetensors")) if part.trained else part
        for part in model.components
    )
    model = evolve(model, components=parts)
    loaded = family_of(family).load(model, "transformer", torch.float32, CPU).state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


def test_quantised_as_the_base_would_be(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = folders
    family, place = family_of("sd3"), published(other, tmp_path / "one.safetensors")
    one, two = (
        family.load(with_file(base, file, "int8"), "transformer", torch.float32, CPU).state_dict()
        for file in (other / TRANSFORMER, place)
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_file_of_something_else_is_said(folders: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(8)}, tmp_path / "x.safetensors")
    model = with_file(folders[0], tmp_path / "x.safetensors")
    with pytest.raises(RunFailed, match="can't be read as a SD3Transformer2DModel") as caught:
        family_of("sd3").load(model, "transformer", torch.float32, CPU)
    help = caught.value.help  # a base in one file has no key `file` that could be left out
    assert "leave out" not in help and "[model.transformer] file" in help and "folder" in help


RECIPE = """\
name = "x"
output = "runs"
[model]
family = "sd3"
base = "{base}"
{table}
[adapter]
kind = "lora"
[data]
resolution = 64
[[data.source]]
path = "pictures"
captions = {{ from = "instance", prompt = "a photo of sks dog" }}
[train]
steps = 1
optimizer = {{ name = "adamw", lr = 1e-3 }}
"""


@pytest.mark.parametrize(
    ("table", "code", "words"),
    [
        ('transformer = { file = "good.safetensors" }', "", ""),
        ('transformer = { file = "gone.safetensors" }', "missing-path", "there is no file"),
        ('transformer = { file = "lora.safetensors" }', "not-a-pipeline", "holds 8 numbers"),
        ('transformer = { file = "fp8.safetensors" }', "not-a-pipeline", "are quantised"),
        ('transformer = { file = "x.toml" }', "not-a-pipeline", "is no safetensors file"),
        ('vae = { file = "good.safetensors" }', "conflict", "only the weights of the transformer"),
    ],
)
def test_plans(
    folders: tuple[Path, Path], tmp_path: Path, table: str, code: str, words: str
) -> None:
    make_pictures(tmp_path / "pictures", [(64, 64)])
    save_file({"weight": torch.zeros(8)}, tmp_path / "lora.safetensors")
    save_file({"a.scale_weight": torch.zeros(8)}, tmp_path / "fp8.safetensors")
    (tmp_path / "good.safetensors").symlink_to(folders[1] / TRANSFORMER)
    (tmp_path / "x.toml").write_text(RECIPE.format(base=folders[0], table=table))
    result = compiled(tmp_path / "x.toml")
    found = [d for d in result.diagnostics if d.severity == "error"]
    if not code:
        assert result.plan is not None, found
        files = {part.name: part.file for part in result.plan.model.components}
        assert files.pop("transformer") == str((folders[1] / TRANSFORMER).resolve())
        assert set(files.values()) == {None}
        return
    (fault,) = found
    assert fault.code == code and words in fault.message
    assert fault.help
