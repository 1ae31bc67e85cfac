"""Adapters of other programs to start from: what is exported comes back to the bit.

Files that we don't write ourselves are written out here, as those programs' sources have them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compiler.adapters import AdapterKind
from compiler.families import FAMILIES
from compiler.plan import Adapter, Layout, Plan, Ranked, Scaled
from runtime.build import build
from runtime.events import Silent
from runtime.execute import execute
from runtime.export import dora, lora_keys
from runtime.export.conventions import FUSED, LORA
from runtime.export.export import COMFYUI, KOHYA, export, in_kohya
from runtime.export.foreign import PART, in_own_names
from runtime.export.lazy import held
from runtime.export.lora_keys import Layer
from runtime.export.request import chosen, requested
from runtime.export.whole import TRAINED
from runtime.families import family_of
from runtime.methods import adapter_files, lora
from runtime.methods.base import Built
from runtime.methods.kinds import parts_of
from tests.compiler.recipes import MACHINE, compiled, make_pictures
from tests.runtime.methods.test_kinds import adapter_of, made, plain, shake
from tests.runtime.methods.test_methods import FP32
from tests.runtime.tiny import make_tiny, tiny_model
from tests.test_matrix import RECIPE

TRAINING = [name for name, card in FAMILIES.items() if card.trainable_encoders]
WRITTEN = [
    pytest.param(family, marks=pytest.mark.slow) if family in ("kolors", "sdxl_refiner") else family
    for family in sorted(LORA["kohya"])  # of the two by the functions of the others
]
KINDS: tuple[AdapterKind, ...] = ("lokr", "loha", "glora", "full")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("foreign")

    def base(family: str) -> Path:
        if not (folder / family).exists():
            make_tiny(family, folder / family)
        return folder / family

    return base


def trained(folder: Path, adapter: Adapter, place: Path) -> tuple[Built, Path]:
    """As if trained, and its own file."""
    _, model, built = made(folder, adapter)
    shake(built)
    lora.export(built, model, family_of(folder.name), place)
    (file,) = place.glob("*.safetensors")
    return built, file


def layers(built: Built) -> dict[str, Layer]:
    """Of a LoRA in training."""
    from compiler.adapters import scale_of

    assert built.adapter is not None
    values = {name: p.detach() for name, p in built.trainable.items()}
    return {
        module: Layer(
            a=values[parts["lora_A"]],
            b=values[parts["lora_B"]],
            scale=scale_of(built.adapter, module),
        )
        for module, parts in parts_of(list(values)).items()
    }


def stored(tensors: Mapping[str, Tensor], path: Path) -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
    return path


def started(built: Built, folder: Path, adapter: Adapter, file: Path) -> dict[str, Tensor]:
    """What training starts with from this file, which is as `built`."""
    config: Any = built.model.config
    like = {name: p.detach() for name, p in built.trainable.items()}
    return adapter_files.read_start(evolve(adapter, start=str(file)), like, folder.name, config)


def begun(folder: Path, adapter: Adapter, file: Path) -> dict[str, Tensor]:
    """The same, of a model that is built to start from it."""
    _, _, built = made(folder, evolve(adapter, start=str(file)))
    return {name: p.detach() for name, p in built.trainable.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("family", WRITTEN)
def test_what_other_programs_read_is_read_back_to_the_bit(
    family: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """All linear layers, so that every module which a layer of the published model shares is
    there, and with attention alone, where some are missing."""
    folder, card = bases(family), FAMILIES[family]
    for targets in ("all-linear", "attention")[: 1 + (family in FUSED["kohya"])]:
        patterns = card.target_sets[targets]
        if family in ("flux2", "flux2_dev", "lumina2"):  # whose last modulation has no place there
            patterns = tuple(p for p in patterns if "norm_out" not in p)
        adapter = adapter_of("lora", family, alpha=8.0, targets=patterns)
        built, own = trained(folder, adapter, tmp_path / targets)
        expected = started(built, folder, adapter, own)
        same(expected, {name: p.detach() for name, p in built.trainable.items()})
        config: Any = built.model.config
        for format, foreign in (("kohya", KOHYA), ("comfyui", COMFYUI)):
            if family in foreign:
                tensors = foreign[family](layers(built), dict(config))
            else:
                tensors = lora_keys.folded(layers(built), card.trained_component)
            file = stored(tensors, tmp_path / f"{targets}-{format}.safetensors")
            same(started(built, folder, adapter, file), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_kinds_are_read_by_either_name(
    kind: AdapterKind, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = bases("sdxl")
    adapter = adapter_of(kind, "sdxl")
    built, own = trained(folder, adapter, tmp_path / "own")
    expected = started(built, folder, adapter, own)
    config: Any = built.model.config
    modules = list(parts_of(list(built.trainable)))
    there = in_kohya("sdxl", held(load_file(own)), modules, dict(config))
    tensors = {key: lazy.read() for key, lazy in there.items()}
    assert all(key.startswith("lora_unet_") for key in tensors)
    assert any(key.startswith("lora_unet_input_blocks_") for key in tensors)
    same(started(built, folder, adapter, stored(tensors, tmp_path / "x.safetensors")), expected)


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("family", sorted(FUSED["kohya"]))
def test_whole_matrices_lie_one_upon_the_other(
    family: str, targets: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """As the updates of a LoRA in the same keys, which Diffusers' readers are asked about; and they
    are read back to the bit."""
    folder, card = bases(family), FAMILIES[family]
    patterns = tuple(p for p in card.target_sets[targets] if "norm_out" not in p)
    built, _ = trained(folder, adapter_of("lora", family, targets=patterns), tmp_path / "lora")
    config: Any = built.model.config
    expected = KOHYA[family](layers(built), dict(config))
    adapter = adapter_of("full", family, targets=patterns)
    _, _, whole = made(folder, adapter)
    with torch.no_grad():
        for name, parameter in whole.trainable.items():
            layer = layers(built)[name.partition(".full_diff")[0]]
            parameter.copy_(layer.update() if "full_diff_b" not in name else parameter + 1)
    file = tmp_path / "own"
    _, model, _ = made(folder, adapter)
    lora.export(whole, model, family_of(family), file)
    (own,) = file.glob("*.safetensors")
    modules = list(parts_of(list(whole.trainable)))
    there = in_kohya(family, held(load_file(own)), modules, dict(config))
    tensors = {key: lazy.read() for key, lazy in there.items()}
    for layer in {key.partition(".")[0] for key in expected}:
        down, up = (expected[f"{layer}.lora_{which}.weight"] for which in ("down", "up"))
        update = up @ down * (expected[f"{layer}.alpha"] / down.shape[0])
        torch.testing.assert_close(tensors[f"{layer}.diff"], update, rtol=0, atol=1e-6)
    saved = stored(tensors, tmp_path / "x.safetensors")
    values = {name: p.detach() for name, p in whole.trainable.items()}
    same(started(whole, folder, adapter, saved), values)
    shared = next(k for k in tensors if re.search(r"(x_block|img)_attn_qkv|attention_qkv", k))
    fewer = evolve(adapter, targets=(r".*\.to_q",))
    with pytest.raises(ValueError, match="more than the layers that are targets"):
        begun(folder, fewer, stored({shared: tensors[shared]}, tmp_path / "y.safetensors"))


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_whole_matrices_are_what_the_published_model_lacks(
    family: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """The base under its publishers' names, plus what the file holds, is the merged model under
    these names; also of the last modulation, whose halves change places."""
    folder = bases(family)
    targets = (r".*\.to_[qv]", "norm_out.linear", r".*proj_(mlp|out)")
    adapter = adapter_of("full", family, targets=targets)
    _, model, built = made(folder, adapter)
    base = {n: t.detach().clone() for n, t in plain(folder).state_dict().items()}
    shake(built)
    config: Any = dict(built.model.config)  # type: ignore[call-overload]
    before, after = (
        {name: lazy.read() for name, lazy in TRAINED[family](held(each), config).items()}
        for each in (base, dict(lora.merged(built)))
    )
    lora.export(built, model, family_of(family), tmp_path)
    (own,) = tmp_path.glob("*.safetensors")
    there = in_kohya(family, held(load_file(own)), list(parts_of(list(built.trainable))), config)
    used = set()
    for name, tensor in before.items():
        layer, _, leaf = name.rpartition(".")
        key = f"lora_unet_{layer.replace('.', '_')}.{'diff_b' if leaf == 'bias' else 'diff'}"
        if key in there:
            tensor = tensor + there[key].read()
            used.add(key)
        torch.testing.assert_close(tensor, after[name], rtol=0, atol=1e-6, msg=name)
    assert used == there.keys()
    assert any("adaLN_modulation" in key for key in used)


def test_a_dora_of_lycoris_keeps_its_lengths(bases: Callable[[str], Path], tmp_path: Path) -> None:
    folder = bases("sd")
    adapter = adapter_of("dora", "sd")
    built, own = trained(folder, adapter, tmp_path / "own")
    tensors = KOHYA["sd"](layers(built), {})
    for name, lengths in built.trainable.items():
        if "magnitude" in name:
            layer = "lora_unet_" + name.partition(".lora_mag")[0].replace(".", "_")
            tensors[f"{layer}.dora_scale"] = lengths.detach().reshape(-1, 1)
    file = stored(tensors, tmp_path / "x.safetensors")
    same(started(built, folder, adapter, file), started(built, folder, adapter, own))
    key = next(key for key in tensors if key.endswith("dora_scale"))
    columns = tensors | {key: tensors[key].reshape(1, -1)}
    with pytest.raises(ValueError, match="has the lengths of columns"):
        started(built, folder, adapter, stored(columns, tmp_path / "y.safetensors"))


@pytest.mark.parametrize("kind", ["dora", "loha"])
def test_the_lengths_that_comfyui_multiplies_by_are_turned_back(
    kind: AdapterKind, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """By the base's own weights; where those are quantised it is refused."""
    folder, part = bases("sd"), "lora_magnitude_vector" if kind == "dora" else "dora_scale"
    adapter = adapter_of(kind, "sd", weight_decompose=kind == "loha")
    built, own = trained(folder, adapter, tmp_path / "own")
    tensors, base = load_file(own), held(plain(folder).state_dict())
    for module, parts in parts_of(list(built.trainable)).items():
        values = {name: built.trainable[full].detach() for name, full in parts.items()}
        if kind == "dora":
            update = values["lora_B"].flatten(1) @ values["lora_A"].flatten(1)
            key = f"unet.{module}.{part}"
        else:
            first = values["hada_w1_a"] @ values["hada_w1_b"]
            update = first * (values["hada_w2_a"] @ values["hada_w2_b"])
            key = f"lycoris_{module.replace('.', '_')}.{part}"

        assert key in tensors
        tensors[key] = dora.of_the_base(
            {"x": 1.5 * update}, {"x": tensors[key]}, as_x(base, module)
        )["x"]
    with safe_open(own, "pt") as file:
        metadata = {**(file.metadata() or {}), adapter_files.COMFYUI_LENGTHS: "true"}
    save_file(tensors, tmp_path / "z.safetensors", metadata)
    start = evolve(adapter, start=str(tmp_path / "z.safetensors"))
    _, _, again = made(folder, start)
    for name, parameter in built.trainable.items():
        torch.testing.assert_close(again.trainable[name], parameter, rtol=2e-6, atol=1e-7, msg=name)
    format = "diffusers" if kind == "dora" else "lycoris"
    with pytest.raises(ValueError, match=f"quantised weights don't tell .* `--format {format}`"):
        made(folder, start, quantize="int8")


def as_x(base: Mapping[str, Any], module: str) -> dict[str, Any]:
    return {"x.weight": base[f"{module}.weight"]}


def test_a_kernel_of_its_own_goes_into_the_first_matrix(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """LyCORIS' LoCon with `use_tucker`: its update, of a LoRA of the same rank and file keys."""
    from lycoris.modules.locon import LoConModule

    folder, module = bases("sd"), "down_blocks.0.resnets.0.conv1"
    adapter = adapter_of("lora", "sd", targets=(re.escape(module),))
    layer: Any = plain(folder).get_submodule(module)
    theirs = LoConModule("x", layer, 1.0, 4, 2.0, use_tucker=True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    name = f"lora_unet_{module.replace('.', '_')}"
    tensors = {f"{name}.{key}": tensor for key, tensor in theirs.state_dict().items()}
    assert f"{name}.lora_mid.weight" in tensors
    tensors = {key: tensor for key, tensor in tensors.items() if PART.fullmatch(key)}
    start = evolve(adapter, start=str(stored(tensors, tmp_path / "x.safetensors")))
    _, _, built = made(folder, start)
    update = dict(lora.merged(built))[f"{module}.weight"] - layer.weight
    expected, _ = theirs.get_diff_weight()
    torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-4)
    kept = {key: tensor for key, tensor in tensors.items() if "lora_down" not in key}
    with pytest.raises(ValueError, match="one of the two matrices"):
        made(folder, evolve(adapter, start=str(stored(kept, tmp_path / "y.safetensors"))))


@pytest.mark.parametrize("family", sorted(FUSED["kohya"]))
def test_layers_that_share_the_first_matrix(
    family: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """As sd-scripts and ComfyUI's own models train them: one adapter for query, key and value. Each
    of them then starts with all of the first matrix and its rows of the second."""
    folder, card = bases(family), FAMILIES[family]
    adapter = adapter_of("lora", family, targets=card.target_sets["attention"])
    built, _ = trained(folder, adapter, tmp_path / "own")
    config: Any = built.model.config
    tensors = KOHYA[family](layers(built), dict(config))
    shared = {}
    for key, tensor in tensors.items():
        if key.endswith("lora_down.weight"):
            layer = key.partition(".")[0]
            generator = torch.Generator().manual_seed(len(shared))
            down = torch.randn(4, tensor.shape[1], generator=generator)
            up = torch.randn(tensors[f"{layer}.lora_up.weight"].shape[0], 4, generator=generator)
            # Rows of layers that are no targets can't be had: here all of a layer's are, but for
            # the single blocks of Flux.1, whose fourth part is the feed-forward.
            if family == "flux" and "linear1" in layer:
                up[3 * config.num_attention_heads * config.attention_head_dim :] = 0
            shared |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
            shared[f"{layer}.alpha"] = torch.tensor(2.0)
    file = stored(shared, tmp_path / "x.safetensors")
    found = started(built, folder, adapter, file)
    # The whole layers' updates, by the file alone and by what training starts with.
    starts = parts_of(list(found))
    parts = {
        module: Layer(a=found[names["lora_A"]], b=found[names["lora_B"]], scale=6.0 / 4)
        for module, names in starts.items()
    }
    back = KOHYA[family](parts, dict(config))
    for layer in {key.partition(".")[0] for key in shared}:
        one, other = (
            each[f"{layer}.lora_up.weight"].double()
            @ each[f"{layer}.lora_down.weight"].double().flatten(1)
            * float(each[f"{layer}.alpha"])
            / each[f"{layer}.lora_down.weight"].shape[0]
            for each in (shared, back)
        )
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_another_alpha_is_in_the_second_matrix(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Rounded once: s B of the file is s B of the recipe, in float64."""
    folder = bases("sd")
    patterns = (Scaled(pattern=r".*to_q", alpha=1.0),)
    ranks = (Ranked(pattern=r".*to_k", rank=3),)
    built, _ = trained(folder, adapter_of("lora", "sd", ranks=ranks), tmp_path / "own")
    tensors = KOHYA["sd"](layers(built), {})
    file = stored(tensors, tmp_path / "x.safetensors")
    again = adapter_of("lora", "sd", alpha=7.0, alphas=patterns, ranks=ranks)
    found = begun(folder, again, file)
    for module, parts in parts_of(list(found)).items():
        layer = f"lora_unet_{module.replace('.', '_')}"
        rank = 3 if module.endswith("to_k") else 4
        ours = (1.0 if module.endswith("to_q") else 7.0) / rank
        theirs = float(tensors[f"{layer}.alpha"]) / rank
        expected = tensors[f"{layer}.lora_up.weight"].double() * theirs / ours
        assert torch.equal(found[parts["lora_B"]], expected.float()), module
        assert torch.equal(found[parts["lora_A"]], tensors[f"{layer}.lora_down.weight"])


def test_what_does_not_fit_is_named(bases: Callable[[str], Path], tmp_path: Path) -> None:
    folder = bases("sd3")
    adapter = adapter_of("lora", "sd3", targets=FAMILIES["sd3"].target_sets["attention"])
    built, _ = trained(folder, adapter, tmp_path / "own")
    config: Any = built.model.config
    tensors = KOHYA["sd3"](layers(built), dict(config))
    file = stored(tensors, tmp_path / "x.safetensors")
    for changes, words in (
        ({"rank": 3}, r"`lora_unet_.*_qkv` is of rank 12 for 3 layers together"),
        ({"targets": (r".*\.attn\.to_[qk]",)}, "is of rank 12 for 2 layers together"),
        ({"targets": (*adapter.targets, "context_embedder")}, "holds no `context_embedder"),
    ):
        with pytest.raises(ValueError, match=words):
            begun(folder, evolve(adapter, **changes), file)  # type: ignore[arg-type]
    wide = {k: torch.zeros(4, 99) if "lora_down" in k else v for k, v in tensors.items()}
    one = {k: v for k, v in wide.items() if "attn_proj" in k}
    only = evolve(adapter, targets=(r".*\.to_(out\.0|add_out)",))
    with pytest.raises(ValueError, match=r"of shape \(4, 99\), here it is"):
        begun(folder, only, stored(one, tmp_path / "y.safetensors"))


@pytest.mark.parametrize("family", TRAINING)
def test_text_encoders_keep_their_layers(family: str) -> None:
    """Each encoder takes its own from one file, and the model passes over theirs."""
    assert set(FAMILIES[family].trainable_encoders) <= FAMILIES[family].kohya_encoders.keys()
    modules = {"encoder.layers.0.self_attn.q_proj": 2, "encoder.layers.1.mlp.fc1": 2}
    stored_: dict[str, Tensor] = {"lora_unet_x.alpha": torch.tensor(1.0)}
    for number, root in enumerate(FAMILIES[family].kohya_encoders.values()):
        for module in modules:
            layer = Layer(a=torch.full((2, 3), number), b=torch.full((3, 2), 7.0), scale=0.5)
            stored_ |= lora_keys.kohya_plain({f"text_model.{module}": layer}, root)
    for number, encoder in enumerate(FAMILIES[family].kohya_encoders):
        found = in_own_names(stored_, modules, family, {}, encoder=encoder)
        for module in modules:
            assert (found[f"{encoder}.{module}.lora_A.weight"] == number).all()
            assert found[f"{encoder}.{module}.alpha"] == 1.0
    left = in_own_names(
        stored_, {}, family, {"num_layers": 1}, beside=list(FAMILIES[family].kohya_encoders)
    )
    assert left.keys() == {"lora_unet_x.alpha"}


def test_a_run_goes_on_from_a_file_of_sd_scripts_as_from_its_own(tmp_path: Path) -> None:
    """From the recipe on, with the text encoder's part; to the bit."""
    make_tiny("sd", tmp_path / "base")
    make_pictures(tmp_path / "pictures", [(64, 64), (80, 64)])
    first = ended(tmp_path, "first", "")
    result = Path(first.run_folder) / "lora" / "pytorch_lora_weights.safetensors"
    for format in ("kohya", "diffusers"):
        out = tmp_path / f"{format}.safetensors"
        export(requested(chosen(Path(first.run_folder)), format=format, out=out))
    found = {
        name: load_file(
            Path(ended(tmp_path, f"from-{name}", f'from = "{name}.safetensors"').run_folder)
            / "lora"
            / result.name
        )
        for name in ("kohya", "diffusers")
    }
    same(found["kohya"], found["diffusers"])
    begun_ = load_file(result)
    assert any(name.startswith("text_encoder.") for name in begun_)
    assert not any(torch.equal(tensor, begun_[name]) for name, tensor in found["kohya"].items())


def ended(folder: Path, name: str, start: str) -> Plan:
    path = folder / f"{name}.toml"
    recipe = RECIPE.format(
        name=name,
        family="sd",
        adapter=f'[adapter]\nkind = "lora"\nrank = 2\nalpha = 3.0\n{start}',
        compute="fp32",
        checkpointing=0,
        drawing="steps = 2",
    )
    path.write_text(f"{recipe}\n[train.text_encoders]\n")
    result = compiled(path, machine=MACHINE)
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    assert execute(result.plan, result.manifest, Silent()).status == "finished"
    return result.plan


def test_alphas_of_bfloat16_weights_keep_their_digits() -> None:
    """Three layers in one of rank 129, a number that bfloat16 has not."""
    shape = {"dtype": torch.bfloat16}
    layers_ = {
        f"transformer_blocks.0.attn.to_{name}": Layer(
            a=torch.ones(43, 4, **shape),  # type: ignore[arg-type]
            b=torch.ones(4, 43, **shape),  # type: ignore[arg-type]
            scale=1.0,
        )
        for name in "qkv"
    }
    tensors = KOHYA["sd3"](layers_, {"num_layers": 2})
    (alpha,) = (tensor for key, tensor in tensors.items() if key.endswith(".alpha"))
    assert alpha == 129


def test_other_layers_are_seen_when_it_is_planned(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """By the header, where the simulation builds the model: in our keys and in others'."""
    folder, sets = bases("sd3"), FAMILIES["sd3"].target_sets
    adapter = adapter_of("lora", "sd3", targets=sets["attention"])
    built, own = trained(folder, adapter, tmp_path / "own")
    config: Any = built.model.config
    theirs = stored(KOHYA["sd3"](layers(built), dict(config)), tmp_path / "x.safetensors")
    for file in (own, theirs):
        simulated(folder, evolve(adapter, start=str(file)))
        fewer = evolve(adapter, start=str(file), targets=(r".*\.to_out\.0",))
        with pytest.raises(ValueError, match="tensors of layers that are not targets, such as"):
            simulated(folder, fewer)
        more = evolve(adapter, start=str(file), targets=sets["all-linear"])
        with pytest.raises(ValueError, match=r"holds nothing of `.*` and \d+ more of the"):
            simulated(folder, more)


def simulated(folder: Path, adapter: Adapter) -> None:
    """Builds it as the memory model does."""
    family, model = family_of(folder.name), tiny_model(folder.name, folder)
    given = (model, adapter, FP32, Layout(), family, torch.device("meta"))
    build(*given, empty=True, seed=0)
