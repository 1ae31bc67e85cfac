"""Text encoders that are trained: against a step written apart, and against Diffusers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
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
from torch import Tensor, nn

from compiler.adapters import CLIP_TARGETS
from compiler.data.manifest import Manifest
from compiler.families import FAMILIES
from compiler.optimizers import OPTIMIZERS
from compiler.plan import Ema, Layout, Plan, Text, TextTraining
from compiler.plan import Optimizer as plan_optimizer
from runtime import checkpoints
from runtime.batch import Batch
from runtime.build import build
from runtime.events import Silent
from runtime.execute import execute
from runtime.export.draw import draw
from runtime.export.export import export
from runtime.export.extract import extract
from runtime.export.pictures import pictures
from runtime.export.request import Refused, chosen, requested
from runtime.export.size import Size
from runtime.families import family_of
from runtime.families.clip import TrainsText
from runtime.families.common import encode_prompts
from runtime.methods.base import Built
from runtime.optimizers import SHARE, grouped, host_state, make_optimizer, set_lr
from runtime.optimizers import load_state as load_optimizer
from runtime.step import forward_losses, micro_step
from runtime.text_training import Tokenizers, tokenizers
from tests.runtime.families.test_sd import objective
from tests.runtime.plans import PICTURES, draw_data, tiny_plan
from tests.runtime.tiny import make_tiny
from tests.test_matrix import KillAfter, Killed

CPU = torch.device("cpu")
SEVERAL = ["a photo of a sks dog", "", "red circle on blue"]
TRAINING = sorted(name for name, card in FAMILIES.items() if card.trainable_encoders)
TARGET = {"unet": (r".*\.attn\d\.to_[qkv]",), "transformer": (r".*\.attn\.to_[qkv]",)}
STEPS = 4
RUNS = ["sd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "sd3", "sdxl"))]

Planned = Callable[..., tuple[Plan, Manifest]]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """Plans on a tiny base of a family, all of whose CLIPs are trained."""
    root: Path = tmp_path_factory.mktemp("text")

    def make(family: str, name: str, whole: bool = False, **changes: Any) -> Any:
        folder, card = root / family, FAMILIES[family]
        if not folder.exists():
            make_tiny(family, folder)
            draw_data(root / f"{family}-dog", ((64, 64),) * 3)
        if card.prediction != "flow":
            changes = {"objective": objective(), **changes}
        share, until, steps = changes.pop("te", 1.0), changes.pop("until", 0), STEPS
        plan, manifest = tiny_plan(
            family, folder, root / f"{family}-dog", root / f"{family}-{name}", steps=steps, lr=3e-2
        )
        assert plan.adapter is not None
        adapter = evolve(
            plan.adapter,
            kind=changes.pop("kind", "lora"),
            targets=TARGET[card.trained_component],
            init="kaiming",
        )
        facts = TextTraining(
            encoders=card.trainable_encoders,
            adapter=None if whole else evolve(adapter, rank=3, targets=CLIP_TARGETS["all-linear"]),
            lr=share * plan.optimizer.lr,
            until=until or steps,
        )
        text = Text(
            max_length=77 if card.prompt_length == 77 else 32,
            instruction=(),
            zeros_for_empty=card.zeros_for_empty,
        )
        given = {"text": text, "adapter": None if whole else adapter, "ema": None, **changes}
        return evolve(plan, text_training=facts, **given), manifest

    return make


def built_of(plan: Plan) -> Built:
    """The model and its encoders, as a run has them."""
    given = (plan.model, plan.adapter, plan.precision, Layout(), family_of(plan.model.family), CPU)
    return build(*given, empty=False, seed=plan.seed, text_training=plan.text_training)


def batch_of(plan: Plan, prompts: list[str], cached: dict[str, Tensor]) -> Batch:
    """A batch of noise with these prompts, of which `cached` are the embeddings."""
    family = family_of(plan.model.family)
    torch.manual_seed(4)
    made = family.example_batch(plan.model, 64, 64, len(prompts), plan.text, CPU)
    speller = tokenizers(plan, family)
    assert speller is not None
    return evolve(
        made,
        latents=torch.randn_like(made.latents),
        noise=torch.randn_like(made.noise),
        sigmas=torch.linspace(0.2, 0.8, len(prompts)),
        text={**made.text, **cached},
        tokens=speller.batch(prompts),
    )


def stock_of(plan: Plan) -> Any:
    """The base by plain Diffusers, encoders included."""
    card = FAMILIES[plan.model.family]
    stock = getattr(diffusers, card.pipeline).from_pretrained(plan.model.base)
    stock.set_progress_bar_config(disable=True)
    return stock


@torch.no_grad()
def cached_of(plan: Plan, stock: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Embeddings as the run caches them: one prompt at a time, joined."""
    family = family_of(plan.model.family)
    return family.collate_text(
        [encode_prompts(family, stock.components, [p], plan.text)[0] for p in prompts]
    )


@pytest.mark.parametrize("family", TRAINING)
def test_at_first_the_embeddings_are_those_that_are_cached(family: str, planned: Planned) -> None:
    plan, _ = planned(family, "first")
    stock, words = stock_of(plan), built_of(plan).text
    assert words is not None
    for prompt in (*SEVERAL, "red circle " * 60):  # alone, as it is cached
        cached = cached_of(plan, stock, [prompt])
        wrong = {name: torch.full_like(tensor, 7.0) for name, tensor in cached.items()}
        alone = tuple(words.encoders) == words.family.card.text_encoders
        with words.inference():
            found = words.of(batch_of(plan, [prompt], wrong if alone else cached))
        for name, tensor in cached.items():
            assert torch.equal(found[name], tensor), name


def reference(plan: Plan, stock: Any, built: Built, batch: Batch, prompts: list[str]) -> Tensor:
    """The loss of a batch by the stock modules, in which each adapted weight is W + s B A."""
    leaves = built.trainable
    modules = {n: m for n, m in stock.components.items() if isinstance(m, nn.Module)}

    def called(name: str, **inputs: Any) -> Any:
        module, start = modules[name], f"{name}." if name.startswith("text") else ""
        weights = {}
        for key, weight in module.named_parameters():
            a = leaves.get(start + key.replace(".weight", ".lora_A.default.weight"))
            b = leaves.get(start + key.replace(".weight", ".lora_B.default.weight"))
            plain = leaves.get(start + key)
            if plain is not None:
                weights[key] = plain
            elif a is not None and b is not None and not isinstance(a, str):
                adapter = plan.text_training.adapter if start else plan.adapter  # type: ignore[union-attr]
                assert adapter is not None
                weights[key] = weight + adapter.alpha / adapter.rank * (b @ a)
        return torch.func.functional_call(module, weights, kwargs=inputs)

    def numbers(tokenizer: Any) -> Tensor:
        options = {"padding": "max_length", "max_length": 77, "truncation": True}
        found: Tensor = tokenizer(prompts, return_tensors="pt", **options).input_ids
        return found

    first = {"input_ids": numbers(stock.tokenizer), "output_hidden_states": True}
    of_first = called("text_encoder", **first)
    kept = batch.kept[:, None, None, None] if batch.kept is not None else None
    if plan.model.family == "sd":
        assert kept is not None
        noisy = kept.sqrt() * batch.latents + (1 - kept).sqrt() * batch.noise
        found = called(
            "unet",
            sample=noisy,
            timestep=(batch.sigmas * 1000).round().long() - 1,
            encoder_hidden_states=of_first.last_hidden_state,
        ).sample
        return ((found - batch.noise) ** 2).mean(dim=(1, 2, 3))
    of_second = called(
        "text_encoder_2", input_ids=numbers(stock.tokenizer_2), output_hidden_states=True
    )
    states = torch.cat([of_first.hidden_states[-2], of_second.hidden_states[-2]], dim=-1)
    assert kept is not None
    found = called(
        "unet",
        sample=kept.sqrt() * batch.latents + (1 - kept).sqrt() * batch.noise,
        timestep=(batch.sigmas * 1000).round().long() - 1,
        encoder_hidden_states=states,
        added_cond_kwargs={"text_embeds": of_second[0], "time_ids": batch.text["time_ids"]},
    ).sample
    return ((found - batch.noise) ** 2).mean(dim=(1, 2, 3))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_loss_and_gradients_are_those_of_the_stock_modules(
    family: str, whole: bool, planned: Planned
) -> None:
    plan, _ = planned(family, "gradients", whole=whole)
    stock, built = stock_of(plan), built_of(plan)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in built.trainable.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) / 10)
    batch = batch_of(plan, SEVERAL, cached_of(plan, stock, SEVERAL))
    losses = micro_step(
        family_of(family), built.model, batch, plan.objective, plan.precision, 3, words=built.text
    )
    ours = {n: p.grad for n, p in built.trainable.items()}
    for parameter in built.trainable.values():
        parameter.grad = None
    theirs = reference(plan, stock, built, batch, SEVERAL)
    (theirs.sum() / 3).backward()
    torch.testing.assert_close(losses, theirs.detach(), rtol=1e-5, atol=1e-6)
    compared = 0
    for name, parameter in built.trainable.items():
        expected, found = parameter.grad, ours[name]
        if expected is None:
            assert found is None or not found.any(), name
            continue
        assert found is not None, name
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, msg=name)
        compared += name.startswith("text_encoder") and bool(expected.any())
    assert compared > 20
    assert not whole or compared > 40


def final_weights(plan: Plan) -> dict[str, Tensor]:
    """What was trained, in the last checkpoint."""
    saved = checkpoints.latest(Path(plan.run_folder) / "checkpoints")
    assert saved is not None
    return dict(checkpoints.load(saved).weights)


def drawn(plan: Plan, step: int) -> Any:
    """The picture after `step` updates, as numbers."""
    (path,) = Path(plan.run_folder, "samples", f"step-{step:06d}").glob("*.png")
    return np.asarray(Image.open(path))


def pictured(plan: Plan, stock: Any) -> Any:
    """The validation picture by a stock pipeline, as numbers."""
    validation = plan.validation
    width, height = validation.sizes[0]
    scale = {FAMILIES[plan.model.family].guidance_argument: validation.guidance}
    length = {} if plan.text.max_length == 77 else {"max_sequence_length": plan.text.max_length}
    picture = stock(
        validation.prompts[0].text,
        **scale,
        **length,
        num_inference_steps=validation.steps,
        width=width,
        height=height,
        generator=torch.Generator("cpu").manual_seed(validation.seeds[0]),
    ).images[0]
    return np.asarray(picture)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", RUNS)
def test_a_run_is_resumed_exactly_and_loads_in_diffusers(
    family: str, kind: str, planned: Planned
) -> None:
    settings: dict[str, Any] = {"validation": PICTURES, "te": 0.5, "until": 3, "kind": kind}
    whole, manifest = planned(family, f"whole-{kind}", **settings)
    assert execute(whole, manifest, Silent()).status == "finished"
    every = evolve(whole.checkpoints, every=1)
    halted, manifest = planned(family, f"halted-{kind}", checkpoints=every, **settings)
    with pytest.raises(Killed):
        execute(halted, manifest, KillAfter(2))
    assert execute(halted, manifest, Silent()).status == "finished"
    file = f"{kind}/pytorch_lora_weights.safetensors"
    one, other = (load_file(Path(p.run_folder, file)) for p in (whole, halted))
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


def states(plan: Plan, manifest: Manifest) -> Iterator[dict[str, Tensor]]:
    """What was trained, after each step."""
    plan = evolve(plan, checkpoints=evolve(plan.checkpoints, every=1, keep=0))
    assert execute(plan, manifest, Silent()).status == "finished"
    for step in range(1, STEPS + 1):
        folder = checkpoints.folder_of(Path(plan.run_folder) / "checkpoints", step)
        yield dict(checkpoints.load(folder).weights)


def test_encoders_stop_when_they_should_and_have_their_own_rate(planned: Planned) -> None:
    constant = {"name": "constant", "warmup": 0, "end": 1.0}
    plan, manifest = planned("sdxl", "stopped", te=0.25, until=2)
    schedule = evolve(plan.schedule, **constant)
    plan = evolve(plan, schedule=schedule, max_grad_norm=0.0)
    optimizer = evolve(plan.optimizer, arguments={**plan.optimizer.arguments, "weight_decay": 0.0})
    first, second, third, last = states(evolve(plan, optimizer=optimizer), manifest)
    theirs = [n for n in first if n.startswith("text_encoder") and "lora_B" in n and first[n].any()]
    ours = [n for n in first if not n.startswith("text_encoder") and "lora_B" in n]
    # AdamW's first step is the learning rate times the gradient's sign, from a B of zeros.
    largest = {name: first[name].abs().max().item() for name in (*theirs, *ours)}
    assert max(largest[n] for n in ours) == pytest.approx(plan.optimizer.lr, rel=1e-3)
    assert max(largest[n] for n in theirs) == pytest.approx(0.25 * plan.optimizer.lr, rel=1e-3)
    for name in theirs:
        assert not torch.equal(first[name], second[name])
        assert torch.equal(second[name], third[name]), name
        assert torch.equal(second[name], last[name]), name
    assert any(not torch.equal(second[n], last[n]) for n in ours)


def test_dropped_captions_of_a_base_that_zeroes_them_are_zeros(planned: Planned) -> None:
    plan, _ = planned("sdxl", "zeros")
    words, stock = built_of(plan).text, stock_of(plan)
    assert words is not None
    batch = batch_of(plan, SEVERAL, cached_of(plan, stock, SEVERAL))
    family = family_of("sdxl")
    made = Tokenizers(plan.model, family, tuple(words.encoders), plan.text)
    batch = evolve(batch, tokens=made.batch(["a dog", "", "cat"], [False, True, False]))
    found = words.of(batch)
    for tensor in (found["encoder_hidden_states"], found["text_embeds"]):
        assert not tensor[1].any()
        assert tensor[0].any()
        assert tensor[2].any()


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


def built_stock(plan: Plan, folder: Path) -> Any:
    """The pipeline in `folder`."""
    stock = getattr(diffusers, FAMILIES[plan.model.family].pipeline).from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    return stock


def wanted_of(plan: Plan) -> Any:
    """The validation picture once more."""
    return pictures(chosen(Path(plan.run_folder)), [plan.validation.prompts[0].text])


@pytest.mark.parametrize("family", RUNS)
def test_exports_draw_the_same_pictures(family: str, planned: Planned, tmp_path: Path) -> None:
    plan, manifest = planned(family, "exported", validation=PICTURES)
    assert execute(plan, manifest, Silent()).status == "finished"
    picture, weights = drawn(plan, STEPS).astype(int), chosen(Path(plan.run_folder))
    (again,) = draw(weights, wanted_of(plan))
    assert np.array_equal(np.asarray(Image.open(again)), drawn(plan, STEPS))
    of_step = chosen(Path(plan.run_folder), step=STEPS)
    for format, source in (("diffusers", of_step), ("kohya", weights), ("comfyui", weights)):
        path = tmp_path / f"{format}.safetensors"
        export(requested(source, format=format, out=path))
        if format == "kohya" and family in ("flux", "sd3"):  # which Diffusers does not read, or not
            check_keys(plan, path)  # of so few layers
            continue
        stock = stock_of(plan)
        stock.load_lora_weights(path)
        assert np.abs(pictured(plan, stock).astype(int) - picture).max() <= 1, format
    merged = tmp_path / "merged"
    export(requested(weights, merge=True, out=merged))
    assert np.abs(pictured(plan, built_stock(plan, merged)).astype(int) - picture).max() <= 1
    assert np.abs(pictured(plan, stock_of(plan)).astype(int) - picture).max() > 1
    tuned = [merged]
    if family in ("sd", "sdxl"):  # whose published files hold the encoders
        one = export(
            requested(weights, merge=True, single_file=True, out=tmp_path / "1.safetensors")
        )
        cls: Any = getattr(diffusers, FAMILIES[family].pipeline)
        options = {"safety_checker": None} if family == "sd" else {"add_watermarker": False}
        read = cls.from_single_file(str(one), config=plan.model.base, **options)
        read.scheduler = stock_of(plan).scheduler
        read.set_progress_bar_config(disable=True)
        assert np.abs(pictured(plan, read).astype(int) - picture).max() <= 1
        tuned.append(one)
    else:
        with pytest.raises(Refused, match="leave them out"):
            requested(weights, merge=True, single_file=True, out=tmp_path / "1.safetensors")
    for number, model in enumerate(tuned):
        check_extracted(plan, model, tmp_path / f"of-{number}.safetensors")


def check_extracted(plan: Plan, tuned: Path, out: Path) -> None:
    """The LoRA of what `tuned` has more than the base, at full rank, makes its picture."""
    found = extract(
        Path(plan.model.base), tuned, Size(), format="diffusers", precision="fp32", out=out
    )
    assert not found.left
    keys = load_file(out)
    for encoder in FAMILIES[plan.model.family].trainable_encoders:
        assert any(key.startswith(f"{encoder}.text_model.encoder.") for key in keys)
    stock = stock_of(plan)
    stock.load_lora_weights(out)
    difference = pictured(plan, stock).astype(int) - drawn(plan, STEPS).astype(int)
    assert np.abs(difference).max() <= 1


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
    plan, manifest = planned("sd", "resized", validation=PICTURES)
    assert execute(plan, manifest, Silent()).status == "finished"
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
    plan, manifest = planned("sdxl", "first-half")
    assert execute(plan, manifest, Silent()).status == "finished"
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


def test_updates_in_the_backward_pass_reach_the_encoders(planned: Planned) -> None:
    finals = []
    for fused in (False, True):
        plan, manifest = planned("sd", f"fused-{fused}", whole=True, te=0.5, until=3)
        layout = Layout(fused_backward=fused)
        plan = evolve(plan, max_grad_norm=0.0, memory=evolve(plan.memory, layout=layout))
        assert execute(plan, manifest, Silent()).status == "finished"
        finals.append(final_weights(plan))
    assert all(torch.equal(tensor, finals[1][name]) for name, tensor in finals[0].items())


def test_the_base_is_asked_with_its_own_encoders(planned: Planned) -> None:
    plan, _ = planned("sdxl", "kept")
    built, stock = built_of(plan), stock_of(plan)
    batch = batch_of(plan, SEVERAL[:1], cached_of(plan, stock, SEVERAL[:1]))
    batch = evolve(batch, keeps_base=True)
    given = (built.model, batch, plan.objective, plan.precision)
    losses = forward_losses(family_of("sdxl"), *given, built.text)
    assert not losses.detach().any()  # an adapter that was not trained changes nothing
    with torch.no_grad():
        for name, parameter in built.trainable.items():
            if name.startswith("text_encoder") and "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    assert forward_losses(family_of("sdxl"), *given, built.text).detach().all()


def test_mixed_precision_keeps_masters_of_the_encoders(planned: Planned) -> None:
    plan, _ = planned("sdxl", "mixed")
    parts = tuple(
        evolve(part, dtype="bfloat16") if part.name.startswith("text_encoder") else part
        for part in plan.model.components
    )
    precision = evolve(plan.precision, compute="bfloat16", weights="bfloat16")
    built = built_of(evolve(plan, model=evolve(plan.model, components=parts), precision=precision))
    assert {p.dtype for p in built.trainable.values()} == {torch.float32}
    copies = built.copies()
    assert all(copies[name].dtype == torch.bfloat16 for name in built.trainable)
    batch = batch_of(plan, SEVERAL, cached_of(plan, stock_of(plan), SEVERAL))
    family = family_of("sdxl")
    micro_step(family, built.model, batch, plan.objective, precision, 3, words=built.text)
    reached = [n for n, p in built.trainable.items() if p.grad is not None and p.grad.any()]
    assert any(n.startswith("text_encoder.") for n in reached)
    assert any(n.startswith("text_encoder_2.") for n in reached)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizers_take_a_rate_for_each_group(name: str, planned: Planned) -> None:
    facts = OPTIMIZERS[name]
    if facts.one_lr or facts.compiled or "cpu" not in facts.devices:
        pytest.skip("has one rate, compiles, or needs an accelerator")
    pytest.importorskip(facts.path.partition(".")[0])
    plan, _ = planned("sd", "rates", te=0.25)
    optimizer = plan_optimizer(name=name, lr=1e-2, arguments=dict(facts.defaults), fused=False)
    text = evolve(plan.text_training, lr=2.5e-3)  # type: ignore[type-var]
    plan = evolve(plan, optimizer=optimizer, text_training=text)
    torch.manual_seed(0)
    pairs = {n: nn.Parameter(torch.randn(8, 8)) for n in ("a.weight", "text_encoder.b.weight")}
    made = make_optimizer(optimizer, grouped(pairs.items(), plan), CPU)
    set_lr(made, 4e-3)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([4e-3, 1e-3])
    for parameter in pairs.values():
        parameter.grad = torch.ones_like(parameter)
    before = {n: p.detach().clone() for n, p in pairs.items()}
    for _ in range(8):  # some do not move at first
        made.step()
    assert all(not torch.equal(before[n], p) for n, p in pairs.items())
    again = make_optimizer(optimizer, grouped(pairs.items(), plan), CPU)
    load_optimizer(again, host_state(made))
    assert [group[SHARE] for group in again.param_groups] == [1.0, 0.25]


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


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_cards_say_what_can_be_trained(family: str) -> None:
    card = FAMILIES[family]
    assert set(card.embedding_keys) <= set(card.trainable_encoders) <= set(card.text_encoders)
    clips = [name for name in card.text_encoders if card.components[name].startswith("CLIPText")]
    assert list(card.trainable_encoders) == clips
    assert isinstance(family_of(family), TrainsText) == bool(clips)
    loads = hasattr(getattr(diffusers, card.pipeline), "load_textual_inversion")
    assert not card.embedding_keys or loads
