"""Streamed loading against loading whole and quantising then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compiler.plan import Model, Quantisation
from compiler.quantisers import QUANTISERS
from runtime.families import common
from runtime.memory.tracker import Tracker
from runtime.quantise import stream as streaming
from runtime.quantise.layers import eligible, quantise, quantised_layers
from tests.runtime.tiny import tiny_model

CPU, META = torch.device("cpu"), torch.device("meta")
KINDS = tuple(QUANTISERS)
PARTS = [
    ("sana", "transformer"),
    ("sana", "text_encoder"),
    ("sd3", "transformer"),
    ("sd3", "text_encoder"),
    ("sd3", "text_encoder_2"),
    ("sd3", "text_encoder_3"),
]


def quantised_model(folder: Path, name: str, kind: Quantisation, where: str = "device") -> Model:
    model = tiny_model("sana" if "sana" in folder.name else "sd3", folder)
    changed = tuple(
        evolve(part, quantize=kind, quantize_on=where) if part.name == name else part
        for part in model.components
    )
    return evolve(model, components=changed)


def whole(folder: Path, name: str, kind: Quantisation, dtype: torch.dtype) -> nn.Module:
    """By the library that wrote the files, then quantised."""
    cls, library = common.component_class(tiny_model(_family(folder), folder), name)
    key = "dtype" if library == "transformers" else "torch_dtype"
    loaded: nn.Module = cls.from_pretrained(folder, subfolder=name, **{key: dtype})
    if kind != "none":
        quantise(loaded, kind, CPU, on=CPU)
    return loaded


def _family(folder: Path) -> str:
    return "sana" if "sana" in folder.name else "sd3"


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for kind in ("parameters", "buffers"):
        ours = dict(getattr(one, f"named_{kind}")())
        theirs = dict(getattr(other, f"named_{kind}")())
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype, name
            assert torch.equal(value, theirs[name]), name


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a component is not read one tensor at a time."""

    def streamed(*args: Any, **kwargs: Any) -> nn.Module:
        found = streaming.stream(*args, **kwargs)
        assert found is not None
        return found

    monkeypatch.setattr(common, "stream", streamed)


@pytest.mark.parametrize(("family", "name"), PARTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_is_loading_and_quantising(
    family: str,
    name: str,
    kind: Quantisation,
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
    no_fallback: None,
) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{family}")
    ours = common.load_component(quantised_model(folder, name, kind), name, dtype, CPU)
    theirs = whole(folder, name, kind, dtype)
    assert_same(ours, theirs)
    assert list(quantised_layers(ours)) and not ours.training
    if name.startswith("text"):
        assert ours.config._attn_implementation == theirs.config._attn_implementation


@pytest.mark.parametrize("family", ["sana", "sd3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_transformers_are_streamed_as_well(
    family: str, dtype: torch.dtype, request: pytest.FixtureRequest, no_fallback: None
) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{family}")
    ours = common.load_component(tiny_model(family, folder), "transformer", dtype, CPU)
    theirs = whole(folder, "transformer", "none", dtype)
    assert_same(ours, theirs)
    places = [[p.data_ptr() % 64 for p in model.parameters()] for model in (ours, theirs)]
    assert places[0] == places[1]  # sums depend on it in their last bits
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_the_place_of_quantising_changes_nothing(tiny_sd3: Path) -> None:
    found = [
        common.load_component(
            quantised_model(tiny_sd3, "transformer", "int8", where),
            "transformer",
            torch.float32,
            CPU,
        )
        for where in ("cpu", "device")
    ]
    assert_same(*found)


def test_shards_and_the_hub(
    tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files behind an index, found by their names on the hub."""
    folder = shutil.copytree(tiny_sana, tmp_path / "sana")
    plain = whole(folder, "transformer", "none", torch.float32)
    shutil.rmtree(folder / "transformer")
    saved: Any = plain
    saved.save_pretrained(folder / "transformer", max_shard_size="20KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    asked: list[str] = []

    def download(repo: str, name: str, revision: str | None) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        assert (repo, revision) == ("owner/sana", "main")
        asked.append(name)
        if not (folder / name).exists():
            raise EntryNotFoundError("404")
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = quantised_model(folder, "transformer", "nf4")
    model = evolve(model, base="owner/sana", local=False, revision="main")
    ours = common.load_component(model, "transformer", torch.float32, CPU)
    assert_same(ours, whole(tiny_sana, "transformer", "nf4", torch.float32))
    assert asked[0].endswith(".index.json") and len(asked) > 3


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_files_of_another_form_are_left_to_their_library(
    tiny_sana: Path, tmp_path: Path, kind: Quantisation
) -> None:
    folder = shutil.copytree(tiny_sana, tmp_path / "sana")
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "stranger": torch.zeros(1)}, file, metadata={"format": "pt"})
    model = quantised_model(folder, "transformer", kind)
    ours = common.load_component(model, "transformer", torch.bfloat16, CPU)
    assert_same(ours, whole(tiny_sana, "transformer", kind, torch.bfloat16))


def test_what_a_library_keeps_in_float32(tiny_sd3: Path) -> None:
    """T5 overflows in float16 but for one layer, which transformers therefore keeps in float32."""
    model = quantised_model(tiny_sd3, "text_encoder_3", "int8")
    ours = common.load_component(model, "text_encoder_3", torch.float16, CPU)
    assert_same(ours, whole(tiny_sd3, "text_encoder_3", "int8", torch.float16))
    formats = {layer.weight.dtype for name, layer in quantised_layers(ours) if ".wo" in name}
    assert formats == {torch.float32}
    states = ours(torch.tensor([[5, 6, 7]])).last_hidden_state
    assert states.isfinite().all()


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_first_and_last_layers_and_norms_stay(family: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{family}")
    found = common.load_component(
        quantised_model(folder, "transformer", "int8"), "transformer", torch.float32, CPU
    )
    names = {name for name, _ in quantised_layers(found)}
    assert all(name.startswith("transformer_blocks.") for name in names)
    left = {
        name
        for name, module in found.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in names
    }
    if family == "sana":
        assert any(".conv_inverted" in name for name in names)  # its 1x1 convolutions
        left = {name for name in left if not name.endswith(".conv_depth")}
    assert not any(name.startswith("transformer_blocks.") for name in left)
    assert {"proj_out", "patch_embed.proj", "pos_embed.proj"} & left
    assert not eligible(found)


@pytest.mark.parametrize(("family", "name"), PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_component_has_the_form_of_a_loaded_one(
    family: str, name: str, kind: Quantisation, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{family}")
    model = quantised_model(folder, name, kind)
    loaded = common.load_component(model, name, torch.bfloat16, CPU)
    for device in (META, CPU):
        empty = common.empty_component(model, name, torch.bfloat16, device)
        assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
            n: (p.shape, p.dtype) for n, p in loaded.named_parameters()
        }
        assert {p.device.type for p in empty.parameters()} == {device.type}
        for layer_name, layer in quantised_layers(empty):
            assert (
                layer.levels is None
                or device is META
                or torch.equal(layer.levels, loaded.get_submodule(layer_name).levels)
            )


@pytest.mark.parametrize("kind", KINDS)
def test_one_plain_weight_at_a_time(kind: Quantisation, tmp_path: Path) -> None:
    size, count = 256, 16
    layers = nn.ModuleList([nn.Linear(size, size, bias=False) for _ in range(count)])
    model = nn.ModuleDict({"blocks": layers})
    save_file(model.state_dict(), tmp_path / "model.safetensors")

    def make() -> nn.Module:
        plain = [nn.Linear(size, size, bias=False) for _ in range(count)]
        return nn.ModuleDict({"blocks": nn.ModuleList(plain)})

    with Tracker({"cpu"}) as tracker:
        found = streaming.stream(
            make, [tmp_path / "model.safetensors"], torch.float32, CPU, kind, on=CPU
        )
    assert found is not None
    held = sum(p.nbytes for p in found.parameters()) + sum(b.nbytes for b in found.buffers())
    one = 4 * size * size
    # The weight as it is read and what its codes are computed from; 16 plain ones would be 16.
    assert tracker.peak - held < 6 * one
    assert json.dumps(list(found.state_dict())) == json.dumps(
        [f"blocks.{n}.{part}" for n in range(count) for part in ("codes", "scales")]
    )
    values: list[Tensor] = [layer.weight for _, layer in quantised_layers(found)]
    assert len(values) == count
