"""What runs that train text encoders leave: checkpoints, results and exports that load."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compiler.families import FAMILIES
from compiler.plan import Ema, Plan
from runtime.events import Silent
from runtime.execute import execute
from runtime.export.draw import draw
from runtime.export.export import export
from runtime.export.extract import extract
from runtime.export.request import Refused, chosen, requested
from runtime.export.size import Size
from tests.runtime.plans import PICTURES
from tests.runtime.text_plans import (
    RUNS,
    STEPS,
    Planned,
    built_of,
    built_stock,
    drawn,
    final_weights,
    pictured,
    planned,
    stock_of,
    wanted_of,
)
from tests.test_matrix import CopyAfter, goes_on

__all__ = ["planned"]  # the fixture


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd", "lora"),
        ("sd", "dora"),
        *(pytest.param(name, "lora", marks=pytest.mark.slow) for name in ("flux", "sd3", "sdxl")),
        pytest.param("sd3", "dora", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_resumed_exactly_and_loads_in_diffusers(
    family: str, kind: str, planned: Planned
) -> None:
    settings: dict[str, Any] = {"validation": PICTURES, "te": 0.5, "until": 3, "kind": kind}
    whole, manifest = planned(family, f"whole-{kind}", **settings)
    whole = evolve(whole, checkpoints=evolve(whole.checkpoints, every=1))
    copied = CopyAfter(whole, 2)
    assert execute(whole, manifest, copied).status == "finished"
    file = f"{kind}/pytorch_lora_weights.safetensors"
    one = {key: tensor.clone() for key, tensor in load_file(Path(whole.run_folder, file)).items()}
    goes_on(whole, manifest, copied)
    other = load_file(Path(whole.run_folder, file))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    for encoder in FAMILIES[family].trainable_encoders:
        start = f"{encoder}.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"
        assert one[start].any(), encoder
    check_start(whole, Path(whole.run_folder, file))
    stock = stock_of(whole)
    untrained = pictured(whole, stock)
    assert np.array_equal(untrained, drawn(whole, 0))
    stock.load_lora_weights(f"{whole.run_folder}/{kind}")
    assert np.array_equal(pictured(whole, stock), drawn(whole, STEPS))
    assert not np.array_equal(untrained, drawn(whole, STEPS))


def finished(planned: Planned, family: str) -> Plan:
    """A run of LoRA with pictures, made once for all that is done with its files."""
    plan, manifest = planned(family, "exported", validation=PICTURES)
    assert execute(plan, manifest, Silent()).status in ("finished", "already")
    return plan


def check_start(plan: Plan, file: Path) -> None:
    """Another run can start from the result, to whichever name of DoRA's lengths it has."""
    assert plan.adapter is not None and plan.text_training is not None
    assert plan.text_training.adapter is not None
    ended = final_weights(plan)
    short = file.with_name("short.safetensors")
    lengths = ".lora_magnitude_vector"
    names = {key: re.sub(rf"{lengths}\.weight$", lengths, key) for key in load_file(file)}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({names[k]: tensor for k, tensor in load_file(file).items()}, short, metadata)
    for start in (str(file), str(short)):
        text = evolve(plan.text_training.adapter, start=start)
        facts = evolve(plan.text_training, adapter=text)
        adapter = evolve(plan.adapter, start=start)
        begun = built_of(evolve(plan, adapter=adapter, text_training=facts)).trainable
        assert begun.keys() == ended.keys()
        assert all(torch.equal(begun[name].detach(), ended[name]) for name in ended)
    short.unlink()


@pytest.mark.parametrize("family", RUNS)
def test_whole_encoders_are_saved_beside_the_model(family: str, planned: Planned) -> None:
    plan, manifest = planned(family, "full", whole=True, validation=PICTURES, te=0.1)
    plan = evolve(plan, ema=Ema(decay=0.5, device="cpu", every=1, save="both"))
    assert execute(plan, manifest, Silent()).status == "finished"
    result = Path(plan.run_folder, "model")
    card = FAMILIES[family]
    stock = getattr(diffusers, card.pipeline).from_pretrained(result)
    stock.set_progress_bar_config(disable=True)
    base = stock_of(plan)
    trained = final_weights(plan)
    for encoder in card.trainable_encoders:
        ours, theirs = getattr(stock, encoder), getattr(base, encoder)
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, trained[f"{encoder}.{name}"]), name
        assert any(
            not torch.equal(tensor, theirs.state_dict()[name])
            for name, tensor in ours.state_dict().items()
        )
        averaged = type(ours).from_pretrained(result / f"{encoder}_ema")
        assert not torch.equal(
            averaged.get_input_embeddings().weight, ours.get_input_embeddings().weight
        )
    for name in (card.trained_component, *card.trainable_encoders):  # pictures are the average's
        cls = type(getattr(stock, name))
        setattr(stock, name, cls.from_pretrained(result / f"{name}_ema"))
    assert np.array_equal(pictured(plan, stock), drawn(plan, STEPS))
    (drawing,) = draw(chosen(Path(plan.run_folder)), wanted_of(plan))
    expected = pictured(plan, built_stock(plan, result))
    assert np.array_equal(np.asarray(Image.open(drawing)), expected)


@pytest.mark.parametrize("family", RUNS)
def test_exports_draw_the_same_pictures(family: str, planned: Planned, tmp_path: Path) -> None:
    plan = finished(planned, family)
    picture, weights = drawn(plan, STEPS).astype(int), chosen(Path(plan.run_folder))
    (again,) = draw(weights, wanted_of(plan))
    assert np.array_equal(np.asarray(Image.open(again)), drawn(plan, STEPS))
    of_step, stock = chosen(Path(plan.run_folder), step=STEPS), stock_of(plan)
    for format, source in (("diffusers", of_step), ("kohya", weights), ("comfyui", weights)):
        path = tmp_path / f"{format}.safetensors"
        export(requested(source, format=format, out=path))
        if format == "kohya" and family in ("flux", "sd3"):  # which Diffusers does not read, or not
            check_keys(plan, path)  # of so few layers
            continue
        stock.load_lora_weights(path)
        assert np.abs(pictured(plan, stock).astype(int) - picture).max() <= 1, format
        stock.unload_lora_weights()
    merged = tmp_path / "merged"
    export(requested(weights, merge=True, out=merged))
    assert np.abs(pictured(plan, built_stock(plan, merged)).astype(int) - picture).max() <= 1
    assert np.abs(pictured(plan, stock).astype(int) - picture).max() > 1
    tuned = [merged]
    if family in ("sd", "sdxl"):  # whose published files hold the encoders
        one = export(
            requested(weights, merge=True, single_file=True, out=tmp_path / "1.safetensors")
        )
        cls: Any = getattr(diffusers, FAMILIES[family].pipeline)
        options = {"safety_checker": None} if family == "sd" else {"add_watermarker": False}
        read = cls.from_single_file(str(one), config=plan.model.base, **options)
        read.scheduler = stock.scheduler
        read.set_progress_bar_config(disable=True)
        assert np.abs(pictured(plan, read).astype(int) - picture).max() <= 1
        tuned.append(one)
    else:
        with pytest.raises(Refused, match="leave them out"):
            requested(weights, merge=True, single_file=True, out=tmp_path / "1.safetensors")
    for number, model in enumerate(tuned):
        check_extracted(plan, stock, model, tmp_path / f"of-{number}.safetensors")


def check_extracted(plan: Plan, stock: Any, tuned: Path, out: Path) -> None:
    """The LoRA of what `tuned` has more than the base, at full rank, makes its picture."""
    found = extract(
        Path(plan.model.base), tuned, Size(), format="diffusers", precision="fp32", out=out
    )
    assert not found.left
    keys = load_file(out)
    for encoder in FAMILIES[plan.model.family].trainable_encoders:
        assert any(key.startswith(f"{encoder}.text_model.encoder.") for key in keys)
    stock.load_lora_weights(out)
    difference = pictured(plan, stock).astype(int) - drawn(plan, STEPS).astype(int)
    assert np.abs(difference).max() <= 1
    stock.unload_lora_weights()


def test_what_a_lora_can_t_hold_of_text_encoders_is_told(planned: Planned, tmp_path: Path) -> None:
    base, tuned = planned("sd3", "apart")[0].model.base, tmp_path / "tuned"
    shutil.copytree(base, tuned)

    def change(encoder: str, name: str) -> None:
        (file,) = (tuned / encoder).glob("*.safetensors")
        held = load_file(file)
        (key,) = (key for key in held if key.removeprefix("text_model.") == name)
        save_file({**held, key: held[key] + 1}, file, {"format": "pt"})

    change("text_encoder", "encoder.layers.0.mlp.fc1.weight")
    change("text_encoder", "final_layer_norm.bias")
    change("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q.weight")
    for format, start in (
        ("diffusers", "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_"),
        ("comfyui", "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_"),
        ("kohya", "lora_te1_text_model_encoder_layers_0_mlp_fc1."),
    ):
        out = tmp_path / f"{format}.safetensors"
        words: Any = {"format": format, "precision": "", "out": out}
        found = extract(Path(base), tuned, Size(), **words)
        assert found.left == ("text_encoder.final_layer_norm.bias", "text_encoder_3")
        assert found.layers == 1
        assert all(key.startswith(start) for key in load_file(out))


def test_encoders_are_made_smaller_too(planned: Planned, tmp_path: Path) -> None:
    """Each layer is the nearest of its rank: what is left is the root of the other singular values'
    squares (Eckart and Young, 1936)."""
    plan = finished(planned, "sd")
    weights, found = chosen(Path(plan.run_folder)), {}
    for name, resize, format in (
        ("whole", "", "diffusers"),
        ("same", "3", "diffusers"),
        ("small", "1", "diffusers"),
        ("kohya", "1", "kohya"),
    ):
        path = tmp_path / f"{name}.safetensors"
        export(requested(weights, format=format, resize=resize, out=path))
        found[name] = load_file(path)
        if name == "same":
            stock = stock_of(plan)
            stock.load_lora_weights(path)
            difference = pictured(plan, stock).astype(int) - drawn(plan, STEPS).astype(int)
            assert np.abs(difference).max() <= 1
    ours = [key.removesuffix(".lora_A.weight") for key in found["whole"] if "lora_A" in key]
    assert any(module.startswith("text_encoder.") for module in ours)
    for module in ours:
        whole, small = (
            (each[f"{module}.lora_B.weight"] @ each[f"{module}.lora_A.weight"]).double()
            for each in (found["whole"], found["small"])
        )
        assert found["small"][f"{module}.lora_A.weight"].shape[0] == 1
        values = torch.linalg.svdvals(whole)
        left = (whole - small).norm()
        torch.testing.assert_close(left, values[1:].norm(), rtol=1e-3, atol=1e-6)
        root = module.replace("text_encoder.", "lora_te.").replace("unet.", "lora_unet.")
        theirs = root.replace(".", "_")
        for one, other in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
            tensor = found["kohya"][f"{theirs}.{other}.weight"]
            assert torch.equal(tensor, found["small"][f"{module}.{one}.weight"])


def check_keys(plan: Plan, path: Path) -> None:
    """The encoders' layers in a file of sd-scripts' keys are those of the result."""
    found = load_file(path)
    result = load_file(Path(plan.run_folder, "lora/pytorch_lora_weights.safetensors"))
    for number, encoder in enumerate(FAMILIES[plan.model.family].trainable_encoders, 1):
        layer = "encoder.layers.1.mlp.fc1"
        theirs = f"lora_te{number}_text_model_" + layer.replace(".", "_")
        ours = f"{encoder}.text_model.{layer}"
        assert torch.equal(found[f"{theirs}.lora_down.weight"], result[f"{ours}.lora_A.weight"])
        assert torch.equal(found[f"{theirs}.lora_up.weight"], result[f"{ours}.lora_B.weight"])
        assert found[f"{theirs}.alpha"].item() == pytest.approx(2.0)


def test_a_run_starts_from_what_another_one_made(planned: Planned) -> None:
    plan = finished(planned, "sdxl")
    assert plan.adapter is not None and plan.text_training is not None
    start = str(Path(plan.run_folder, "lora/pytorch_lora_weights.safetensors"))
    assert plan.text_training.adapter is not None
    facts = evolve(plan.text_training, adapter=evolve(plan.text_training.adapter, start=start))
    again = evolve(plan, adapter=evolve(plan.adapter, start=start), text_training=facts)
    begun, ended = built_of(again).trainable, final_weights(plan)
    assert begun.keys() == ended.keys()
    assert all(torch.equal(begun[name].detach(), ended[name]) for name in ended)
    with pytest.raises(ValueError, match="layers that are not targets"):
        built_of(evolve(again, text_training=None))


@pytest.mark.slow
def test_the_refiner_s_encoder_loads_in_diffusers(planned: Planned, tmp_path: Path) -> None:
    plan, manifest = planned("sdxl_refiner", "refined")
    assert execute(plan, manifest, Silent()).status == "finished"
    stock = stock_of(plan)
    stock.load_lora_weights(plan.run_folder + "/lora")
    found = dict(stock.text_encoder_2.named_parameters())
    trained = {n: t for n, t in final_weights(plan).items() if n.startswith("text_encoder_2.")}
    assert trained
    for name, tensor in trained.items():
        own = name.removeprefix("text_encoder_2.").replace(".default.", ".default_0.")
        assert torch.equal(found[own], tensor), name
    for format in ("kohya", "comfyui"):
        path = tmp_path / f"{format}.safetensors"
        export(requested(chosen(Path(plan.run_folder)), format=format, out=path))
        assert any(key.startswith("lora_te_text_model_encoder") for key in load_file(path))
