"""Every kind of adapter on every kind of model: its formula, its start, its file.

Formulas are written out here once more, in float64, from the papers that `compiler.adapters` names.
Files are loaded by the programs that they are for: Diffusers, peft and LyCORIS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from torch import Tensor, nn

from compiler.adapters import ADAPTERS, LAYERED, AdapterKind
from compiler.plan import Adapter, Layout, Model, Precision, Ranked, Scaled
from runtime.build import Built, build
from runtime.families import family_of
from runtime.families.base import Family
from runtime.methods import lora
from runtime.methods.boft import butterfly, permutation, rotations
from runtime.methods.kinds import parts_of, split
from tests.runtime.methods.test_methods import FP32, MIXED
from tests.runtime.tiny import make_tiny, tiny_model

CPU = torch.device("cpu")
FAMILIES = ("sana", "sd3", "sd")
KINDS: tuple[AdapterKind, ...] = LAYERED


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("kinds")

    def base(family: str) -> Path:
        if not (folder / family).exists():
            make_tiny(family, folder / family)
        return folder / family

    return base


def adapter_of(kind: AdapterKind, family: str, **changes: Any) -> Adapter:
    ranked = ADAPTERS[kind].ranked
    found = Adapter(
        kind=kind,
        rank=4 if ranked else 0,
        alpha=6.0 if ranked else 0.0,  # not the rank: a file without it would load too weak
        dropout=0.0,
        init="gaussian" if ADAPTERS[kind].inits else "",
        targets=family_of(family).card.target_sets["all-linear"],
        block_size=4 if ADAPTERS[kind].blocked else 2 if kind == "dylora" else 0,
        butterfly_factors=1 if kind == "boft" else 0,
    )
    return evolve(found, **changes)


def made(
    folder: Path, adapter: Adapter, precision: Precision = FP32, quantize: Any = "none"
) -> tuple[Family, Model, Built]:
    family, model = family_of(folder.name), tiny_model(folder.name, folder)
    parts = tuple(evolve(p, quantize=quantize) if p.trained else p for p in model.components)
    model = evolve(model, components=parts)
    built = build(model, adapter, precision, Layout(), family, CPU, empty=False, seed=3)
    built.model.eval()
    return family, model, built


def plain(folder: Path) -> nn.Module:
    family, model = family_of(folder.name), tiny_model(folder.name, folder)
    return family.load(model, model.trained_component, torch.float32, CPU).eval()


@torch.no_grad()
def shake(built: Built, by: float = 0.05) -> None:
    """As if trained: every weight moves."""
    generator = torch.Generator().manual_seed(1)
    for parameter in built.trainable.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)


@torch.no_grad()
def output(model: nn.Module, family: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    latents = torch.randn(2, 4, 8, 8, generator=generator)

    def text(width: int) -> Tensor:
        return torch.randn(2, 5, width, generator=generator)

    inputs: dict[str, Any] = {"timestep": torch.tensor([500, 20]), "return_dict": False}
    if family == "sd":
        inputs |= {"sample": latents, "encoder_hidden_states": text(config.cross_attention_dim)}
    elif family == "sana":
        inputs |= {"hidden_states": latents, "encoder_hidden_states": text(config.caption_channels)}
    else:
        pooled = torch.randn(2, config.pooled_projection_dim, generator=generator)
        inputs |= {"hidden_states": latents, "pooled_projections": pooled}
        inputs |= {"encoder_hidden_states": text(config.joint_attention_dim)}
    dtype = next(model.parameters()).dtype
    given = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    found: Tensor = model(**given)[0]
    return found


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_loads_where_it_is_said_to(
    bases: Callable[[str], Path], kind: AdapterKind, family: str, tmp_path: Path
) -> None:
    folder = bases(family)
    _, model, built = made(folder, adapter_of(kind, family))
    untrained = output(plain(folder), family)
    assert apart(output(built.model, family), untrained) < 2e-6
    shake(built, 0.2 if kind == "ia3" else 0.05)  # one number a row
    trained = output(built.model, family)
    assert apart(trained, untrained) > 0.05
    lora.export(built, model, family_of(family), tmp_path)
    assert (tmp_path / ADAPTERS[kind].file).is_file()
    loaded = LOADERS[ADAPTERS[kind].file](folder, tmp_path)
    assert apart(output(loaded, family), trained) < 1e-5


def by_diffusers(folder: Path, result: Path) -> nn.Module:
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(result)
    found: nn.Module = getattr(pipeline, family_of(folder.name).card.trained_component)
    return found.eval()


def by_lycoris(folder: Path, result: Path) -> nn.Module:
    from lycoris import create_lycoris_from_weights

    model = plain(folder)
    network, _ = create_lycoris_from_weights(1.0, str(result / "lycoris.safetensors"), model)
    network.merge_to(1.0)
    return model


@torch.no_grad()
def by_comfyui(folder: Path, result: Path) -> nn.Module:
    """LoKr with a kernel of its own, which LyCORIS 4.1 writes and can't load: as ComfyUI's
    comfy/weight_adapter/lokr.py reads it."""
    model, found = plain(folder), load_file(result / "lycoris.safetensors")
    for name, module in model.named_modules():
        start = f"lycoris_{name.replace('.', '_')}."
        held = {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
        if not held:
            continue
        left, right, scale = held["lokr_w1"], held.get("lokr_w2"), 1.0
        if right is None:
            scale = float(held["alpha"]) / held["lokr_w2_b"].shape[0]
            factors = (held["lokr_t2"], held["lokr_w2_b"], held["lokr_w2_a"])
            right = torch.einsum("i j k l, j r, i p -> p r k l", *factors).contiguous()
        weight: Any = module.weight
        weight += scale * torch.kron(left[:, :, None, None], right)
    return model


def by_peft(folder: Path, result: Path) -> nn.Module:
    import peft
    import peft.tuners.boft.layer as boft_layer

    with pytest.MonkeyPatch.context() as patch:  # it would look for a CUDA compiler
        patch.setattr(boft_layer, "get_fbd_cuda", lambda: None)
        model: Any = peft.PeftModel.from_pretrained(plain(folder), result)
    found: nn.Module = model.base_model.model
    return found.eval()


LOADERS = {
    "pytorch_lora_weights.safetensors": by_diffusers,
    "lycoris.safetensors": by_lycoris,
    "adapter_model.safetensors": by_peft,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_merged_weights_are_by_the_paper_s_formula(
    bases: Callable[[str], Path], kind: AdapterKind, quantize: str
) -> None:
    """And the model without adapter computes with them what it computed with it."""
    folder = bases("sana")
    changes = {"butterfly_factors": 2} if kind == "boft" else {}
    _, _, built = made(folder, adapter_of(kind, "sana", **changes), quantize=quantize)
    shake(built)
    found = dict(lora.merged(built))
    stock = plain(folder)
    base = stock.state_dict()
    if quantize != "none":
        base |= {
            f"{name.removesuffix('.base_layer')}.weight": module.weight
            for name, module in built.model.named_modules()
            if hasattr(module, "dequantised")
        }
    for module, parts in parts_of(list(built.trainable)).items():
        held = {part: built.trainable[name].detach().double() for part, name in parts.items()}
        weight = base[f"{module}.weight"].double()
        expected = FORMULAS[kind](weight.flatten(1), held).view(weight.shape)
        assert apart(found[f"{module}.weight"], expected) < 3e-6, module
    stock.load_state_dict(found)
    assert apart(output(stock, "sana"), output(built.model, "sana")) < 5e-6


Parts = Mapping[str, Tensor]
SCALE = 6 / 4


def dora(weight: Tensor, parts: Parts) -> Tensor:
    direction = weight + SCALE * parts["lora_B"].flatten(1) @ parts["lora_A"].flatten(1)
    lengths = direction.square().sum(1).sqrt()
    return torch.diag(parts["lora_magnitude_vector"].flatten() / lengths) @ direction


def lokr(weight: Tensor, parts: Parts) -> Tensor:
    left = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    right = (
        parts["lokr_w2"].flatten(1)
        if "lokr_w2" in parts
        else parts["lokr_w2_a"] @ parts["lokr_w2_b"].flatten(1)
    )
    rows = [torch.cat([number * right for number in row], dim=1) for row in left]
    return weight + SCALE * torch.cat(rows)


def loha(weight: Tensor, parts: Parts) -> Tensor:
    products = [parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2)]
    return weight + SCALE * products[0] * products[1]


def glora(weight: Tensor, parts: Parts) -> Tensor:
    a1, a2, b1, b2 = (parts[f"glora_{name}"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    one = torch.eye(weight.shape[1], dtype=weight.dtype)
    return weight @ (one + SCALE * a1 @ a2) + SCALE * b1 @ b2


def skewed(numbers: Tensor, size: int) -> Tensor:
    """(size, size) of the numbers of its upper triangle, row by row."""
    found = torch.zeros(size, size, dtype=numbers.dtype)
    at = 0
    for row in range(size):
        for column in range(row + 1, size):
            found[row, column], found[column, row] = numbers[at], -numbers[at]
            at += 1
    return found


def oft(weight: Tensor, parts: Parts) -> Tensor:
    """The five terms of the series that peft's layer adds up, the last of them once."""
    blocks = []
    for numbers in parts["oft_R"]:
        q, one = skewed(numbers, 4), torch.eye(4, dtype=torch.float64)
        blocks.append(one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    return weight @ torch.block_diag(*blocks).T


def boft(weight: Tensor, parts: Parts) -> Tensor:
    inputs, size = weight.shape[1], 4
    turned = torch.eye(inputs, dtype=torch.float64)
    for number, blocks in enumerate(parts["boft_R"]):
        one = torch.eye(size, dtype=torch.float64)
        skews = [(block - block.T) / 2 for block in blocks]
        cayley = [(one - skew) @ torch.linalg.inv(one + skew) for skew in skews]
        order = permutation(inputs, size, number)
        moved = torch.zeros(inputs, inputs, dtype=torch.float64)
        moved[torch.arange(inputs), order] = 1
        turned = moved @ torch.block_diag(*cayley) @ moved.T @ turned
    return parts["boft_s"].view(-1, 1) * (weight @ turned.T)


FORMULAS: dict[str, Callable[[Tensor, Parts], Tensor]] = {
    "lora": lambda weight, parts: (
        weight + SCALE * parts["lora_B"].flatten(1) @ parts["lora_A"].flatten(1)
    ),
    "dora": dora,
    "dylora": lambda weight, parts: (
        weight + SCALE * parts["lora_B"].flatten(1) @ parts["lora_A"].flatten(1)
    ),
    "lokr": lokr,
    "loha": loha,
    "glora": glora,
    "ia3": lambda weight, parts: torch.diag(parts["ia3_l"].flatten()) @ weight,
    "full": lambda weight, parts: weight + parts["full_diff"].flatten(1),
    "oft": oft,
    "boft": boft,
}


def test_rotations_keep_lengths_and_angles() -> None:
    """Of OFT's idea: what is learned is orthogonal. BOFT's Cayley transform is so exactly, and
    two factors mix inputs of different blocks."""
    numbers = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    turned = butterfly(torch.eye(16, dtype=torch.float64), rotations(numbers))
    assert apart(turned @ turned.T, torch.eye(16)) < 1e-12
    back = butterfly(turned, rotations(numbers), transposed=True)
    assert apart(back, torch.eye(16)) < 1e-12
    one = butterfly(torch.eye(16, dtype=torch.float64), rotations(numbers[:1]))
    assert (one != 0).sum() == 16 * 4 and (turned.abs() > 1e-12).all()


def test_permutations_are_peft_s() -> None:
    import peft.tuners.boft.layer as boft_layer

    class Known(boft_layer.Linear):  # type: ignore[misc]
        def __init__(self) -> None: ...

    known: Any = Known.__new__(Known)
    for inputs, size, factors in ((32, 4, 4), (48, 8, 2), (16, 2, 3)):
        for number in range(factors):
            blocks = int(inputs / size / 2**number)
            theirs = known.block_butterfly_perm(inputs, blocks, size // 2, factors - 1)
            assert permutation(inputs, size, number) == theirs.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_does_not_depend_on_what_else_is_adapted(
    bases: Callable[[str], Path], kind: AdapterKind
) -> None:
    folder, few = bases("sana"), (r"transformer_blocks\.1\.attn1\.to_q",)
    _, _, whole = made(folder, adapter_of(kind, "sana"))
    torch.manual_seed(99)
    _, _, alone = made(folder, adapter_of(kind, "sana", targets=few))
    assert alone.adapted_modules == 1
    for name, tensor in alone.trainable.items():
        assert torch.equal(tensor, whole.trainable[name])
    if ADAPTERS[kind].ranked:
        assert any(tensor.abs().sum() > 0 for tensor in alone.trainable.values())


@pytest.mark.parametrize(
    ("kind", "share"),
    [*((kind, False) for kind in KINDS if ADAPTERS[kind].count), ("oft", True)],
)
def test_the_table_counts_parameters(
    bases: Callable[[str], Path], kind: AdapterKind, share: bool
) -> None:
    _, _, built = made(bases("sd"), adapter_of(kind, "sd", block_share=share))
    for module, parts in parts_of(list(built.trainable)).items():
        layer: Any = built.model.get_submodule(module)
        outputs, inputs = layer.base_layer.weight.flatten(1).shape
        sizes = {"inputs": inputs, "outputs": outputs, "rank": 4, "block_size": 4}
        sizes |= {"butterfly_factors": 1, "block_share": share}
        held = sum(built.trainable[name].numel() for name in parts.values())
        assert held == eval(ADAPTERS[kind].count, {}, sizes)  # a formula of our own table


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("precision", [FP32, MIXED], ids=["fp32", "mixed"])
def test_a_start_that_takes_from_the_base_gives_it_back(
    bases: Callable[[str], Path], init: str, precision: Precision, tmp_path: Path
) -> None:
    """At first the model is the base; what is trained loads on the base as it is published."""
    folder = bases("sd3")
    adapter = adapter_of("lora", "sd3", init=init, scaling="sqrt-rank")
    family, model, built = made(folder, adapter, precision)
    close = 1e-5 if precision is FP32 else 0.06  # rounding of what is left to bfloat16
    assert apart(output(built.model, "sd3"), output(plain(folder), "sd3")) < close
    a, b = (next(t for n, t in built.trainable.items() if f"lora_{which}" in n) for which in "AB")
    assert a.abs().sum() > 0 and b.abs().sum() > 0
    shake(built, 0.02)
    lora.export(built, model, family, tmp_path)
    trained = output(built.model, "sd3")
    assert apart(trained, output(plain(folder), "sd3")) > 0.05
    assert apart(output(by_diffusers(folder, tmp_path), "sd3"), trained) < close


def test_what_is_taken_is_the_largest_part() -> None:
    """PiSSA's product is the best of its rank (Eckart and Young); OLoRA's columns are orthogonal
    and, with all of them, its product is the whole."""
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(weight.double())
    b, a = split(weight, 5, 2.0, "pissa", 0, "x")
    left = torch.linalg.matrix_norm(weight.double() - 2.0 * b.double() @ a.double(), ord=2)
    assert s[5] - 1e-5 <= left < 1.001 * s[5]
    assert apart(b.norm(dim=0), a.norm(dim=1)) < 1e-5  # shared out evenly
    b, a = split(weight, 5, 2.0, "olora", 0, "x")
    assert apart(b.T @ b, torch.eye(5)) < 1e-6
    b, a = split(weight, 24, 1.0, "olora", 0, "x")
    assert apart(b @ a, weight) < 1e-5
    with pytest.raises(ValueError, match=r"`x` has no 25 singular values .*only 24"):
        split(weight, 25, 1.0, "pissa", 0, "x")


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha", "glora"])
def test_ranks_and_alphas_by_pattern(
    bases: Callable[[str], Path], kind: AdapterKind, tmp_path: Path
) -> None:
    folder = bases("sana")
    adapter = adapter_of(
        kind,
        "sana",
        exclude=(r".*\.attn2\.to_k",),
        ranks=(Ranked(pattern=r"transformer_blocks\.1\..*", rank=2), Ranked(pattern=".*", rank=3)),
        alphas=(Scaled(pattern=r".*to_q", alpha=1.0),),
    )
    _, model, built = made(folder, adapter)
    modules = parts_of(list(built.trainable))
    assert not any(name.endswith("attn2.to_k") for name in modules)
    if kind != "lokr":  # whose matrices are whole where the rank is large enough
        part, side = {"loha": "hada_w1_b", "glora": "glora_a2"}.get(kind, "lora_A"), 0
        for name, parts in modules.items():
            rank = 2 if name.startswith("transformer_blocks.1.") else 3
            assert built.trainable[parts[part]].shape[side] == rank
    shake(built)
    lora.export(built, model, family_of("sana"), tmp_path)
    loaded = LOADERS[ADAPTERS[kind].file](folder, tmp_path)
    assert apart(output(loaded, "sana"), output(built.model, "sana")) < 1e-5


def test_patterns_that_match_nothing_are_named(bases: Callable[[str], Path]) -> None:
    folder = bases("sana")
    for changes, words in (
        ({"exclude": ("nothing",)}, "`nothing` of `exclude` matches none"),
        ({"exclude": (".*",)}, "leaves nothing to adapt"),
        ({"ranks": (Ranked(pattern="none", rank=2),)}, "`none` matches none of the"),
    ):
        with pytest.raises(ValueError, match=words):
            made(folder, adapter_of("lora", "sana", **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        (
            {"ranks": (Ranked(pattern="transformer_blocks.0", rank=2),)},
            r"transformer_blocks\.0\..*",
        ),
        ({"exclude": ("to_q|to_k",)}, r".*\.(to_q|to_k)"),
        ({"targets": ("attn1",)}, r".*\.attn1\..*"),
    ],
)
def test_a_pattern_of_a_part_is_told_the_one_of_the_whole(
    bases: Callable[[str], Path], changes: dict[str, Any], near: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"; `{near}` matches ")) as caught:
        made(bases("sana"), adapter_of("lora", "sana", **changes))
    names = [
        name for name, module in plain(bases("sana")).named_modules() if lora.is_linear(module)
    ]
    whole = [name for name in names if re.fullmatch(near, name)]
    assert whole and str(caught.value).endswith(f" matches {len(whole)}")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_rank_that_a_layer_has_not_is_named_before_any_weight_is_read(
    bases: Callable[[str], Path], init: str
) -> None:
    """Also of an empty model, as a plan simulates it. What the message allows is what works."""
    folder = bases("sana")
    family, model = family_of("sana"), tiny_model("sana", folder)
    linear = {
        name: min(layer.weight.flatten(1).shape)
        for name, layer in plain(folder).named_modules()
        if lora.is_linear(layer) and re.fullmatch(r"transformer_blocks\.\d+\.attn2\..*", name)
    }
    targets = (r"transformer_blocks\.\d+\.attn2\..*",)
    least, most = min(linear.values()), max(linear.values())

    def empty(**changes: Any) -> Built:
        adapter = adapter_of("lora", "sana", init=init, targets=targets, **changes)
        meta = torch.device("meta")
        return build(model, adapter, FP32, Layout(), family, meta, empty=True, seed=3)

    with pytest.raises(
        ValueError, match=f"`{init}` to start from, not {most + 1}: rank may be"
    ) as e:
        empty(rank=most + 1)
    allowed = int(re.findall(r"at most (\d+)", str(e.value))[0])
    assert allowed == least
    assert empty(rank=allowed).adapted_modules == len(linear)
    ranked = (Ranked(pattern=r".*\.to_q", rank=most + 7),)
    with pytest.raises(ValueError, match=rf"`transformer_blocks.0.attn2.to_q` .*not {most + 7}"):
        empty(rank=2, ranks=ranked)
    with pytest.raises(ValueError, match=r"in `transformer_blocks\\.\\d\+\\.attn2\\.to_q`$"):
        empty(rank=2, ranks=ranked)


@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_blocks_that_do_not_fit_are_named(bases: Callable[[str], Path], kind: AdapterKind) -> None:
    with pytest.raises(ValueError, match=r"inputs of `.*` can't be cut into blocks of 5"):
        made(bases("sana"), adapter_of(kind, "sana", block_size=5))
    if kind == "boft":
        with pytest.raises(ValueError, match="not enough for blocks of 8 in 4 butterfly factors"):
            made(bases("sana"), adapter_of(kind, "sana", block_size=8, butterfly_factors=4))


@pytest.mark.parametrize(
    ("kind", "tucker"),
    [
        *((kind, False) for kind in ("lora", "dora", "lokr", "loha", "ia3", "full")),
        ("lokr", True),
        ("loha", True),
    ],
)
def test_convolutions_of_several_pixels(
    bases: Callable[[str], Path], kind: AdapterKind, tucker: bool, tmp_path: Path
) -> None:
    folder = bases("sd")
    targets = (r".*resnets\.\d+\.conv\d", "conv_in")
    adapter = adapter_of(kind, "sd", targets=targets, tucker=tucker)
    if tucker and kind == "lokr":  # whose second matrix is whole unless the rank is small
        adapter = evolve(adapter, rank=1, alpha=1.5)
    _, model, built = made(folder, adapter)
    cores = [name for name in built.trainable if "_t1." in name or "_t2." in name]
    assert bool(cores) == tucker
    shake(built, 0.2 if tucker else 0.05)
    trained = output(built.model, "sd")
    assert apart(trained, output(plain(folder), "sd")) > 0.05
    lora.export(built, model, family_of("sd"), tmp_path)
    load = LOADERS[ADAPTERS[kind].file] if (kind, tucker) != ("lokr", True) else by_comfyui
    loaded = load(folder, tmp_path)
    assert apart(output(loaded, "sd"), trained) < 1e-5
    stock = plain(folder)
    stock.load_state_dict(dict(lora.merged(built)))
    assert apart(output(stock, "sd"), trained) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_on_from_its_file(
    bases: Callable[[str], Path], kind: AdapterKind, tmp_path: Path
) -> None:
    """At the strength that it had, whatever alpha is now."""
    folder = bases("sana")
    _, model, built = made(folder, adapter_of(kind, "sana"))
    shake(built)
    lora.export(built, model, family_of("sana"), tmp_path)
    again = adapter_of(kind, "sana", start=str(tmp_path / ADAPTERS[kind].file))
    if ADAPTERS[kind].ranked:
        again = evolve(again, alpha=1.5)
    _, _, loaded = made(folder, again)
    assert apart(output(loaded.model, "sana"), output(built.model, "sana")) < 2e-6
    fewer = evolve(again, targets=family_of("sana").card.target_sets["attention"])
    with pytest.raises(ValueError, match="tensors of layers that are not targets"):
        made(folder, fewer)


def test_both_of_lokr_s_matrices_stay_whole_where_that_is_asked_for(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = adapter_of("lokr", "sana", rank=1, alpha=0.5, full_matrix=True, decompose_both=True)
    _, model, built = made(bases("sana"), adapter)
    assert {part for parts in parts_of(list(built.trainable)).values() for part in parts} == {
        "lokr_w1",
        "lokr_w2",
    }
    shake(built)
    lora.export(built, model, family_of("sana"), tmp_path)
    loaded = by_lycoris(bases("sana"), tmp_path)
    trained = output(built.model, "sana")
    assert apart(output(loaded, "sana"), trained) < 1e-5
    stock = plain(bases("sana"))
    stock.load_state_dict(dict(lora.merged(built)))
    assert apart(output(stock, "sana"), trained) < 1e-5


def test_the_file_says_lycoris_names_and_strength(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """As ComfyUI reads them: `lycoris_` and the module with underscores; alpha over the rank
    scales where there is a rank, and nothing does where a LoKr is two whole matrices."""
    _, model, built = made(bases("sana"), adapter_of("lokr", "sana", rank=2, alpha=5.0))
    shake(built)
    lora.export(built, model, family_of("sana"), tmp_path)
    tensors = load_file(tmp_path / "lycoris.safetensors")
    merged = dict(lora.merged(built))
    base = plain(bases("sana")).state_dict()
    names = {k.removesuffix(".weight").replace(".", "_"): k for k in base}
    seen = set()
    for prefix in {key.partition(".")[0] for key in tensors}:
        held = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
        rank = held["lokr_w2_b"].shape[0] if "lokr_w2_b" in held else None
        scale = float(held["alpha"]) / rank if rank else 1.0
        seen.add(rank is None)
        right = held["lokr_w2_a"] @ held["lokr_w2_b"] if rank else held["lokr_w2"]
        name = names[prefix.removeprefix("lycoris_")]
        update = scale * torch.kron(held["lokr_w1"], right.flatten(1))
        assert apart(base[name] + update.view(base[name].shape), merged[name]) < 1e-6
    assert seen == {False, True}
