"""LoRAs made smaller, and made of the difference of two models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from attrs import evolve
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from compiler.families import FAMILIES
from runtime.export import opened
from runtime.export.base import base_tensors
from runtime.export.export import export
from runtime.export.lazy import write
from runtime.export.lora_keys import Layer
from runtime.export.request import Refused, chosen, requested, size_of
from runtime.export.size import Size, parsed
from runtime.export.svd import extracted, resized
from runtime.export.whole import laid_out
from tests.runtime.export.runs import EVERYTHING, drawn, pipeline_of
from tests.runtime.export.test_export import apart
from tests.runtime.tiny import make_tiny
from tuner.cli import run_command
from tuner.exits import DONE, REFUSED


def layer(rank: int = 6, outputs: int = 20, inputs: int = 30) -> Layer:
    generator = torch.Generator().manual_seed(0)
    return Layer(
        a=torch.randn(rank, inputs, generator=generator),
        b=torch.randn(outputs, rank, generator=generator),
        scale=1.5,
    )


def test_the_words_for_a_size() -> None:
    assert parsed("32") == Size(rank=32)
    assert parsed("95%") == parsed("0.95") == Size(energy=0.95)
    assert parsed("100%") == Size(energy=1)
    assert [parsed(t) for t in ("0", "-1", "x", "1.5", "101%", "0%", "99999", "")] == [None] * 8
    with pytest.raises(Refused, match="`x` is no size"):
        size_of("x")


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_a_smaller_lora_is_the_nearest(rank: int) -> None:
    """By Eckart and Young: what is left is the root of the other singular values' squares."""
    whole = layer()
    small = resized(whole, Size(rank=rank))
    assert small.a.shape == (min(rank, 6), 30) and small.scale == 1.5
    values = torch.linalg.svdvals(whole.update().double())
    left = (whole.update().double() - small.update().double()).norm()
    assert abs(left - values[rank:].square().sum().sqrt()) < 1e-4


def test_a_share_is_kept_with_the_smallest_rank() -> None:
    whole = layer()
    values = torch.linalg.svdvals(whole.update().double()).square()[:6]
    shares = (values.cumsum(0) / values.sum()).tolist()
    for rank in range(1, 6):
        found = resized(whole, Size(energy=shares[rank - 1] - 1e-6))
        assert found.a.shape[0] == rank


def test_all_of_it_is_kept_without_what_is_empty() -> None:
    whole = layer()
    twice = Layer(a=torch.cat([whole.a] * 2), b=torch.cat([whole.b] * 2, 1) / 2, scale=whole.scale)
    found = resized(twice, Size(energy=1))
    assert found.a.shape[0] == 6
    torch.testing.assert_close(found.update(), whole.update(), rtol=0, atol=1e-4)


def test_a_difference_is_cut_like_a_matrix() -> None:
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    small, whole = extracted(weight, Size(rank=3)), extracted(weight, Size())
    assert small.a.shape == (3, 4, 3, 3) and small.b.shape == (8, 3, 1, 1)
    values = torch.linalg.svdvals(weight.flatten(1).double())
    left = (weight.flatten(1) - small.update()).norm().item()
    assert abs(left - values[3:].square().sum().sqrt().item()) < 1e-4
    assert torch.allclose(whole.update().view(weight.shape), weight, atol=1e-5)


def with_lora(plan: Any, file: Path) -> Any:
    pipeline = pipeline_of(plan)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return pipeline


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_a_run_s_lora_in_its_own_rank_and_smaller(runs: Any, format: str, tmp_path: Path) -> None:
    plan = runs("sd3")
    place = {name: tmp_path / f"{name}.safetensors" for name in ("same", "small", "as-it-is")}
    weights = chosen(Path(plan.run_folder))
    export(requested(weights, format=format, out=place["as-it-is"]))
    export(requested(weights, format=format, resize="2", out=place["same"]))
    export(requested(weights, format=format, resize="1", out=place["small"]))
    assert {t.shape[0] for k, t in load_file(place["small"]).items() if "lora_A" in k} == {1}
    picture = drawn(with_lora(plan, place["as-it-is"]))
    assert apart(drawn(with_lora(plan, place["same"])), picture) < 1e-4
    small = drawn(with_lora(plan, place["small"]))
    assert 1e-4 < apart(small, picture) < apart(drawn(pipeline_of(plan)), picture)


def test_only_a_lora_is_resized(runs: Any, tmp_path: Path) -> None:
    weights = chosen(Path(runs("sd3").run_folder))
    with pytest.raises(Refused, match="only a LoRA can be resized"):
        requested(weights, merge=True, resize="1", out=tmp_path / "x")


def test_a_lora_of_two_models_is_that_between_them(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base and the base with a LoRA of rank 2 in it: rank 2 gives it back."""
    plan = runs("sd3")
    merged, out = tmp_path / "merged", tmp_path / "lora.safetensors"
    export(requested(chosen(Path(plan.run_folder)), merge=True, out=merged))
    call = ["export", plan.model.base, "--extract", str(merged), "--resize", "2"]
    assert run_command([*call, "--out", str(out)]) == DONE
    told = capsys.readouterr()
    assert told.out == f"{out}\n" and "note:" not in told.err
    tensors = load_file(out)
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {2}
    assert len(EVERYTHING["sd3"]) and len(tensors) % 2 == 0
    assert apart(drawn(with_lora(plan, out)), drawn(pipeline_of(plan, merged))) < 1e-4
    file = next((merged / "transformer").glob("*.safetensors"))
    state = load_file(file)
    name = next(k for k in state if k.endswith("norm_q.weight"))
    state[name] += 1
    save_file(state, file, metadata={"format": "pt"})
    assert run_command([*call, "--out", str(tmp_path / "more.safetensors")]) == DONE
    assert f"note: a LoRA can't hold all that differs, such as {name}" in capsys.readouterr().err


def test_models_that_are_not_alike_are_refused(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, other = runs("sd3").model.base, runs("sana").model.base
    for words, message in (
        ([base, "--extract", other], "not of one shape"),
        ([base, "--extract", base], "no layer that differs"),
        ([base, "--extract", str(tmp_path)], "is no model in the Diffusers layout"),
        ([base, "--extract", other, "--merge"], "takes two models, no run"),
        ([base, "--extract", other, "--resize", "x"], "no size of a LoRA"),
        ([base, "--extract", other, "--format", "lycoris"], "no LoRA is extracted as `lycoris`"),
    ):
        assert run_command(["export", *words, "--out", str(tmp_path / "x")]) == REFUSED
        assert message in capsys.readouterr().err


def changed(folder: Path, *names: str) -> None:
    """Other numbers in some weights of the component in `folder`."""
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    generator = torch.Generator().manual_seed(3)
    for name in names:
        state[name] = state[name] + torch.randn(state[name].shape, generator=generator)
    save_file(state, file, metadata={"format": "pt"})


def test_a_lora_of_pixart_is_extracted_for_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Diffusers loads none of it; to say so without a way out went in a circle."""
    base, tuned = make_tiny("pixart", tmp_path / "base"), tmp_path / "tuned"
    shutil.copytree(base, tuned)
    names = [f"transformer_blocks.0.attn{n}.to_{x}.weight" for n, x in ((1, "q"), (2, "v"))]
    changed(tuned / "transformer", *names)
    call = ["export", str(base), "--extract", str(tuned), "--resize", "90%"]
    assert run_command(call) == REFUSED
    assert "Diffusers loads no LoRA of pixart; there is `--format peft`" in capsys.readouterr().err
    assert run_command([*call, "--format", "peft", "--out", str(tmp_path / "x")]) == DONE
    model = PixArtTransformer2DModel.from_pretrained(base, subfolder="transformer")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "x")).merge_and_unload()
    wanted = load_file(tuned / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in merged.state_dict().items():
        difference, left = wanted[name] - before[name], wanted[name] - tensor
        if name in names:
            assert 0 < left.square().sum() <= 0.1001 * difference.square().sum()
        else:
            assert not difference.any() and not left.any()


@pytest.mark.parametrize("family", ["flux2", "kolors"])
@pytest.mark.parametrize("format", ["kohya", "comfyui"])
def test_layers_without_a_place_refuse_no_file(
    family: str, format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole fine-tune changes them all."""
    base, tuned = make_tiny(family, tmp_path / "base"), tmp_path / "tuned"
    shutil.copytree(base, tuned)
    component = FAMILIES[family].trained_component
    (file,) = (base / component).glob("*.safetensors")
    names = list(load_file(file))
    changed(tuned / component, *names)
    call = ["export", str(base), "--extract", str(tuned), "--resize", "1", "--format", format]
    assert run_command([*call, "--out", str(tmp_path / "x.safetensors")]) == DONE
    keys = "".join(load_file(tmp_path / "x.safetensors"))
    assert ("single_stream_modulation" in keys) == (family == "flux2")
    assert ("label_emb" in keys) == (family == "kolors") and "encoder_hid_proj" not in keys
    assert "a LoRA can't hold all that differs" in capsys.readouterr().err
    shutil.rmtree(tuned)
    shutil.copytree(base, tuned)
    changed(tuned / component, "encoder_hid_proj.weight" if family == "kolors" else names[0])
    code = run_command([*call, "--out", str(tmp_path / "y.safetensors")])
    assert code == (REFUSED if family == "kolors" else DONE)
    if family == "kolors":
        assert f"has a place in a LoRA with {format} keys" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["sd", "sdxl", "sdxl_refiner", "kolors"])
def test_a_unet_without_its_pipeline_is_of_the_same_family(family: str, tmp_path: Path) -> None:
    """Whose names in sd-scripts' files differ."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    make_tiny(family, base)
    shutil.copytree(base, tuned)
    state = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    changed(tuned / "unet", next(k for k in state if k.endswith("attn1.to_q.weight")))
    found = []
    for inner in ("", "unet"):
        out = tmp_path / f"of-{inner}.safetensors"
        words = ["--extract", str(tuned / inner), "--format", "kohya", "--out", str(out)]
        assert run_command(["export", str(base / inner), *words]) == DONE
        found.append(load_file(out))
    assert found[0].keys() == found[1].keys()
    own = any("input_blocks" in key or "output_blocks" in key for key in found[0])
    assert own == (family in ("sdxl", "sdxl_refiner"))


def test_whole_files_are_compared_as_folders_are(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = runs("sd3")
    base, merged = Path(plan.model.base), tmp_path / "merged"
    weights = chosen(Path(plan.run_folder))
    export(requested(weights, merge=True, out=merged))
    file = tmp_path / "merged.safetensors"
    export(requested(weights, merge=True, single_file=True, out=file))
    (bare,) = (merged / "transformer").glob("*.safetensors")

    def of(one: Path, other: Path) -> dict[str, torch.Tensor]:
        out = tmp_path / "out.safetensors"
        call = ["export", str(one), "--extract", str(other), "--resize", "2", "--out", str(out)]
        assert run_command(call) == DONE, capsys.readouterr().err
        found = load_file(out)
        out.unlink()
        return found

    expected = of(base, merged)
    first = tmp_path / "base.safetensors"
    whole = laid_out(plan.model, base_tensors(plan.model, 0), everything=False, dtype=None)
    write(first, whole, {})
    for one, other in ((base, file), (base, bare), (first, merged)):
        found = of(one, other)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    call = ["export", str(first), "--extract", str(file), "--out", str(tmp_path / "x")]
    assert run_command(call) == REFUSED  # no published model is as small
    assert "is no whole model in one file that is known here" in capsys.readouterr().err
    configs = {name: json.loads(text) for name, text in plan.model.configs.items()}
    card = FAMILIES["sd3"]
    known = evolve(card.known[0], configs=configs)
    monkeypatch.setattr(opened, "FAMILIES", {**FAMILIES, "sd3": evolve(card, known=(known,))})
    found = of(first, file)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_lora_is_no_whole_model(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = runs("sd3")
    lora = next(chosen(Path(plan.run_folder)).result.glob("*.safetensors"))
    text = tmp_path / "text.safetensors"
    text.write_text("no weights", encoding="utf-8")
    for file, message in ((lora, "is no whole model"), (text, "is no safetensors file")):
        call = ["export", plan.model.base, "--extract", str(file), "--out", str(tmp_path / "x")]
        assert run_command(call) == REFUSED
        assert message in capsys.readouterr().err
