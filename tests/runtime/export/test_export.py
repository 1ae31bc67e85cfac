"""Exported files, loaded by the programs that they are for, draw what the run's own weights draw.

Pictures are compared in 0 to 1. Where the same numbers are multiplied in the same order they are
equal; where an update is added up in another order (merged, fused query, key and value) they agree
to 1e-4, a fortieth of a step of an 8-bit picture.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from attrs import evolve
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from runtime import checkpoints
from runtime.errors import RunFailed
from runtime.export.export import export
from runtime.export.metadata import described
from runtime.export.request import Refused, chosen, requested
from tests.runtime.export.runs import EVERYTHING, drawn, pipeline_of
from tests.runtime.plans import LORA

CLOSE = 1e-4
LOKR = evolve(LORA, kind="lokr", init="", factor=4, targets=EVERYTHING["sana"])


def exported(plan, out, *, step=None, ema=None, **options) -> Path:
    weights = chosen(Path(plan.run_folder), step=step, ema=ema)
    return export(requested(weights, out=out, **options))


def with_lora(plan, file):
    pipeline = pipeline_of(plan)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return pipeline


def own(plan):
    """By the run's own result, in plain Diffusers."""
    return drawn(with_lora(plan, Path(plan.run_folder) / "lora/pytorch_lora_weights.safetensors"))


def apart(one, other) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("family", ["sd3", "sana"])
def test_diffusers_draws_the_same_with_the_exported_lora(runs, family, tmp_path):
    plan = runs(family)
    file = exported(plan, tmp_path / "lora.safetensors")
    picture = own(plan)
    assert apart(drawn(with_lora(plan, file)), picture) == 0
    assert apart(drawn(pipeline_of(plan)), picture) > 0.02  # the LoRA shows


def test_comfyui_keys_have_the_strength_in_them(runs, tmp_path):
    """ComfyUI asks for `X.alpha` beside each layer, which is not there, so it takes strength 1;
    Diffusers without metadata does likewise."""
    plan = runs("sd3")
    file = exported(plan, tmp_path / "lora.safetensors", format="comfyui")
    with safe_open(file, "pt") as opened:
        assert "lora_adapter_metadata" not in opened.metadata()
    assert all(key.startswith("transformer.") for key in load_file(file))
    assert apart(drawn(with_lora(plan, file)), own(plan)) < CLOSE


def test_pixart_s_keys_for_comfyui_have_the_strength_in_them(runs, tmp_path):
    """Its own result has it beside the file, where ComfyUI does not look."""
    plan = runs("pixart")
    file = exported(plan, tmp_path / "lora.safetensors", format="comfyui")
    merged = pipeline_of(plan, exported(plan, tmp_path / "merged", merge=True)).transformer
    base = pipeline_of(plan).transformer.state_dict()
    found, changed = load_file(file), set()
    for name, tensor in merged.state_dict().items():
        if not torch.equal(tensor, base[name]):
            module = f"transformer.{name.removesuffix('.weight')}"
            a, b = (found.pop(f"{module}.lora_{which}.weight").double() for which in "AB")
            update = tensor.double() - base[name].double()
            torch.testing.assert_close(b @ a, update, rtol=0, atol=1e-6)
            changed.add(name)
    assert not found and any("attn2.to_k" in name for name in changed)
    assert exported(plan, tmp_path / "usual").is_dir()  # peft's: Diffusers loads no LoRA of it


def test_a_lokr_of_sana_is_for_lycoris(runs, tmp_path):
    """ComfyUI has no Sana of its own."""
    plan = runs("sana", adapter=LOKR)
    weights = chosen(Path(plan.run_folder))
    with pytest.raises(Refused, match="no comfyui keys for LoKr of sana: ComfyUI has no") as caught:
        requested(weights, format="comfyui")
    assert "`--format lycoris`" in caught.value.help
    assert requested(weights).out.name.endswith("-lycoris.safetensors")
    found = load_file(exported(plan, tmp_path / "x.safetensors", format="lycoris"))
    result = load_file(Path(plan.run_folder) / "lokr" / "lycoris.safetensors")
    assert found.keys() == result.keys()
    assert all(torch.equal(tensor, result[name]) for name, tensor in found.items())


def test_kohya_keys_applied_to_the_published_layout_draw_the_same(runs, tmp_path):
    """Diffusers has no reader for these keys of this family. So they are applied as sd-scripts and
    ComfyUI apply them, to the base in the published layout, and Diffusers reads that."""
    plan = runs("sd3")
    file = exported(plan, tmp_path / "lora.safetensors", format="kohya")
    published = published_base(plan)
    names = {k.removesuffix(".weight").replace(".", "_"): k for k in published}
    found = load_file(file)
    layers = {key.split(".")[0] for key in found}
    for layer in layers:
        down, up = found[f"{layer}.lora_down.weight"], found[f"{layer}.lora_up.weight"]
        scale = found[f"{layer}.alpha"].item() / down.shape[0]
        published[names[layer.removeprefix("lora_unet_")]] += scale * (up @ down)
    assert len(layers) == len(found) / 3
    assert any("attn2_qkv" in layer for layer in layers)
    save_file(published, tmp_path / "model.safetensors")
    assert apart(drawn(from_single(plan, tmp_path / "model.safetensors")), own(plan)) < CLOSE


def published_base(plan) -> dict[str, torch.Tensor]:
    """The base's transformer under the published names, by the inverse of Diffusers' own map."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    transformer = pipeline_of(plan).transformer
    state = transformer.state_dict()
    # Each element's number goes through Diffusers' map and comes back by its place there.
    probe, position = {}, 0
    for name, shape in published_shapes(transformer).items():
        size = int(np.prod(shape))
        probe[name] = torch.arange(position, position + size, dtype=torch.float64).view(shape)
        position += size
    shapes = {name: tensor.shape for name, tensor in probe.items()}
    flat = torch.full((position,), float("nan"))
    for name, numbers in convert_sd3_transformer_checkpoint_to_diffusers(dict(probe)).items():
        flat[numbers.long().flatten()] = state[name].flatten()
    assert not flat.isnan().any()
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    parts = dict(zip(shapes, flat.split(sizes), strict=True))
    return {name: parts[name].view(shape).clone() for name, shape in shapes.items()}


def published_shapes(transformer) -> dict[str, tuple[int, ...]]:
    """Written down from Stability-AI/sd3-ref, mmdit.py, for a model of this size."""
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    head, last = config.attention_head_dim, config.num_layers - 1
    found: dict[str, tuple[int, ...]] = {"pos_embed": tuple(transformer.pos_embed.pos_embed.shape)}

    def linear(name, outputs, inputs):
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs), (outputs,)

    patch = config.patch_size
    found["x_embedder.proj.weight"] = (width, config.in_channels, patch, patch)
    found["x_embedder.proj.bias"] = (width,)
    linear("t_embedder.mlp.0", width, 256)
    linear("t_embedder.mlp.2", width, width)
    linear("y_embedder.mlp.0", width, config.pooled_projection_dim)
    linear("y_embedder.mlp.2", width, width)
    linear("context_embedder", config.caption_projection_dim, config.joint_attention_dim)
    for number in range(config.num_layers):
        for stream in ("x_block", "context_block"):
            block = f"joint_blocks.{number}.{stream}"
            ends = number == last and stream == "context_block"
            dual = stream == "x_block" and number in config.dual_attention_layers
            linear(f"{block}.adaLN_modulation.1", width * (2 if ends else 9 if dual else 6), width)
            for attention in ("attn", "attn2") if dual else ("attn",):
                linear(f"{block}.{attention}.qkv", 3 * width, width)
                found[f"{block}.{attention}.ln_q.weight"] = (head,)
                found[f"{block}.{attention}.ln_k.weight"] = (head,)
                if not ends:
                    linear(f"{block}.{attention}.proj", width, width)
            if not ends:
                linear(f"{block}.mlp.fc1", 4 * width, width)
                linear(f"{block}.mlp.fc2", width, 4 * width)
    linear("final_layer.linear", patch * patch * config.out_channels, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return found


def from_single(plan, file):
    pipeline = pipeline_of(plan)
    pipeline.transformer = diffusers.SD3Transformer2DModel.from_single_file(
        str(file), config=plan.model.base, subfolder="transformer", local_files_only=True
    )
    return pipeline


@pytest.mark.parametrize("family", ["sd3", "sana"])
def test_a_merged_model_draws_the_same(runs, family, tmp_path):
    plan = runs(family)
    folder = exported(plan, tmp_path / "merged", merge=True)
    assert apart(drawn(pipeline_of(plan, folder)), own(plan)) < CLOSE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]


def test_a_merged_model_in_one_file_draws_the_same(runs, tmp_path):
    plan = runs("sd3")
    file = exported(plan, tmp_path / "one.safetensors", merge=True, single_file=True)
    expected = {f"model.diffusion_model.{name}" for name in published_base(plan)}
    keys = load_file(file).keys()
    assert {key for key in keys if not key.startswith("first_stage_model.")} == expected
    assert apart(drawn(from_single(plan, file)), own(plan)) < CLOSE


def test_a_whole_model_in_one_file_is_the_result(runs, tmp_path):
    plan = runs("sd3", full=True)
    file = exported(plan, tmp_path / "one.safetensors", single_file=True)
    result = drawn(pipeline_of(plan, Path(plan.run_folder) / "model"))
    assert apart(drawn(from_single(plan, file)), result) == 0


def test_a_lora_on_quantised_weights_is_merged_into_plain_ones(runs, tmp_path):
    plan = runs("sd3")
    parts = tuple(
        evolve(part, quantize="nf4") if part.name == "transformer" else part
        for part in plan.model.components
    )
    weights = chosen(Path(plan.run_folder))
    quantised = evolve(plan, model=evolve(plan.model, components=parts))
    request = requested(evolve(weights, plan=quantised), merge=True, out=tmp_path / "merged")
    assert apart(drawn(pipeline_of(plan, export(request))), own(plan)) < CLOSE


@pytest.mark.parametrize("full", [False, True])
def test_checkpoints_and_averages(runs, full, tmp_path):
    """Of step 2: the weights and their average as the checkpoint holds them; at the end the average
    is what the result is."""
    plan = runs("sd3", full=full)
    root = Path(plan.run_folder) / "checkpoints"
    saved = checkpoints.load(checkpoints.folder_of(root, 2))
    assert saved.ema is not None
    for ema, values in ((True, saved.ema), (False, saved.weights)):
        found = tensors_of(
            plan, exported(plan, tmp_path / f"step2-{ema}.safetensors", step=2, ema=ema)
        )
        assert_same(found, values)
    last = tensors_of(plan, exported(plan, tmp_path / "last.safetensors", step=4))
    result = tensors_of(plan, exported(plan, tmp_path / "result.safetensors"))
    assert_same(last, result)


def tensors_of(plan, place):
    """By the names of the model in training, without what is not trained."""
    if plan.adapter is None:
        return load_file(place / "transformer/diffusion_pytorch_model.safetensors")
    return {
        k.removeprefix("transformer.").replace(".weight", ".default.weight"): v
        for k, v in load_file(place).items()
    }


def assert_same(found, values):
    shared = found.keys() & values.keys()
    assert found.keys() - shared <= {"pos_embed.pos_embed"}
    assert values.keys() - shared <= {"pos_embed.pos_embed"}
    assert all(torch.equal(found[name], values[name]) for name in shared)


def test_a_schedule_free_checkpoint_gives_the_weights_that_are_kept(runs, tmp_path):
    """Not those that it steps from: the result of the run is the proof."""
    pytest.importorskip("schedulefree")
    plan = runs("sd3", optimizer="adamw-schedulefree", ema=None)
    last = load_file(exported(plan, tmp_path / "last.safetensors", step=4))
    assert_same(last, load_file(exported(plan, tmp_path / "result.safetensors")))
    stepping = checkpoints.load(Path(plan.run_folder) / "checkpoints/step-000004").weights
    name = next(name for name in stepping if "lora_A" in name)
    assert not torch.equal(last["transformer." + name.replace(".default", "")], stepping[name])


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("format", ["diffusers", "kohya", "comfyui"])
def test_precision(runs, precision, dtype, format, tmp_path):
    plan = runs("sd3")
    file = exported(plan, tmp_path / "x.safetensors", precision=precision, format=format)
    found = load_file(file)
    assert {v.dtype for k, v in found.items() if not k.endswith("alpha")} == {dtype}
    assert {v.dtype for k, v in found.items() if k.endswith("alpha")} <= {torch.float32}


def test_the_resolution_told_is_the_sources(runs, tmp_path):
    """Not a bucket's, whose edges are multiples and no squares."""
    weights = chosen(Path(runs("sd3").run_folder))
    request, plan = requested(weights, out=tmp_path / "x"), weights.plan
    shapes = tuple(evolve(bucket, width=80, height=48) for bucket in plan.buckets)
    for said, edge in (
        ({"resolution": 64.0, "resolution_type": "pixel_area"}, "64x64"),
        ({"resolution": 512.0, "resolution_type": "pixel"}, "512x512"),
        ({"resolution": 0.262144, "resolution_type": "area"}, "512x512"),
    ):
        source = evolve(plan.sources[0], geometry=evolve(plan.sources[0].geometry, **said))
        other = evolve(plan, buckets=shapes, sources=(source,))
        found = described(evolve(request, weights=evolve(weights, plan=other)))
        assert found["modelspec.resolution"] == edge


def test_metadata(runs, tmp_path):
    plan = runs("sd3")
    file = exported(plan, tmp_path / "lora.safetensors", format="kohya")
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    content = file.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert said["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
    assert said["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert said["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"
    assert said["modelspec.title"] == plan.name
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("2", "3")
    assert (said["ss_steps"], said["ss_seed"], said["ss_learning_rate"]) == ("4", "7", "0.03")
    assert not any("tag" in key for key in said)
    json.dumps(said)


def test_the_file_is_the_one_that_the_library_writes(runs, tmp_path):
    """Byte for byte, but for the order of the metadata."""
    plan = runs("sd3")
    file = exported(plan, tmp_path / "lora.safetensors", format="kohya", precision="bf16")
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    save_file(load_file(file), tmp_path / "theirs.safetensors", said)
    ours, theirs = (read(p) for p in (file, tmp_path / "theirs.safetensors"))
    assert ours == theirs


def read(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_a_single_file_holds_the_vae_as_published(runs, tmp_path):
    """Diffusers' own map takes every tensor of it back to what the base has."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    plan = runs("sd3")
    file = exported(plan, tmp_path / "one.safetensors", merge=True, single_file=True)
    vae = pipeline_of(plan).vae
    kept = {k: v for k, v in load_file(file).items() if k.startswith("first_stage_model.")}
    found, expected = convert_ldm_vae_checkpoint(kept, vae.config), vae.state_dict()
    assert len(kept) == len(expected) and found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("family", "full", "options", "message"),
    [
        ("sana", False, {"format": "kohya"}, "no kohya keys for sana"),
        ("sana", False, {"format": "comfyui"}, "no comfyui keys for sana"),
        ("sana", False, {"merge": True, "single_file": True}, "no published single-file layout"),
        ("sd3", False, {"single_file": True}, "`--single-file` is for whole models"),
        ("sd3", True, {"merge": True}, "nothing to merge"),
        ("sd3", True, {"format": "kohya"}, "names the keys of a LoRA"),
        ("sd3", False, {"merge": True, "format": "comfyui"}, "names the keys of a LoRA"),
        (
            "sd3",
            False,
            {"merge": True, "single_file": True, "format": "peft"},
            "names the keys of a LoRA",
        ),
        ("sd3", True, {"single_file": True, "format": "comfyui"}, "names the keys of a LoRA"),
        ("sd3", False, {"format": "a1111"}, "unknown format"),
        ("sd3", False, {"format": "lycoris"}, "no lycoris keys for LoRA"),
        ("sd3", False, {"precision": "int8"}, "unknown precision"),
        ("sd3", False, {"step": 3}, "no checkpoint of step 3"),
    ],
)
def test_what_does_not_exist_is_refused(runs, family, full, options, message, tmp_path):
    plan = runs(family, full=full)
    with pytest.raises(Refused, match=message) as caught:
        exported(plan, tmp_path / "x", **options)
    assert caught.value.help
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_torn_is_left(runs, tmp_path, monkeypatch):
    plan = runs("sd3")
    place = exported(plan, tmp_path / "lora.safetensors")
    with pytest.raises(Refused, match="is there already"):
        exported(plan, place)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.export.lazy._append", full)
    for options in ({}, {"merge": True}):
        with pytest.raises(RunFailed, match="No space left on device"):
            exported(plan, tmp_path / "second", **options)
    assert list(tmp_path.iterdir()) == [place]
