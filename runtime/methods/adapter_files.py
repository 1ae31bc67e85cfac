"""An adapter's file as other programs read it, and back: which tensors, under which names.

LoRA and DoRA are as Diffusers saves them, LoKr and LoHa as LyCORIS does
(https://github.com/KohakuBlueleaf/LyCORIS, `lycoris_` and the module's name with underscores),
OFT and BOFT as peft does. `compiler.adapters` says who loads them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from compiler.adapters import ADAPTERS, LORAS, LYCORIS_FILE, rank_of, scale_of
from compiler.families.card import FamilyCard
from compiler.plan import Adapter
from compiler.safetensors import header_of
from compiler.words import BUNDLE
from runtime.methods.kinds import NAME, exactly, parts_of

PEFT_ROOT = "base_model.model"  # what peft's own files put before a module's name
LYCORIS_PREFIX = "lycoris_"
Taken = Mapping[str, tuple[Tensor, Tensor]]  # module -> (B, A) that the base lacks in training
LENGTHS = "lora_magnitude_vector"  # of DoRA's rows; under a weight's name for a text encoder
OUTER = "text_model."  # a module of CLIP's that not all versions of transformers have
COMFYUI_LENGTHS = "tuner_lengths_for_comfyui"
"""Metadata of a DoRA whose lengths are such as ComfyUI multiplies by, see `runtime.export.dora`."""
DIGITS = 2**-22  # of an alpha, which files hold as float32
T = TypeVar("T")


def layout_of(adapter: Adapter, card: FamilyCard) -> Literal["diffusers", "lycoris", "peft"]:
    """How the result's file is laid out."""
    if is_lycoris(adapter):
        return "lycoris"
    is_lora = adapter.kind in LORAS
    return "diffusers" if is_lora and card.lora_loader == "pipeline" else "peft"


def is_lycoris(adapter: Adapter) -> bool:
    """Whether its file has LyCORIS' keys."""
    return ADAPTERS[adapter.kind].file == LYCORIS_FILE


def given_back(values: Mapping[str, Tensor], taken: Taken) -> dict[str, Tensor]:
    """`values`, a LoRA in training, as one for the base as it was: of twice the rank.

    W - s B0 A0 + s B A = W + s (B, -B0) (A; A0).
    """
    found = dict(values)
    for module, (b0, a0) in taken.items():
        name_a, name_b = (f"{module}.lora_{which}.{NAME}.weight" for which in "AB")
        a, b = values[name_a], values[name_b]
        tail = a0.to(a).view(-1, *a.shape[1:])
        head = -b0.to(b).view(*b.shape)
        found[name_a], found[name_b] = torch.cat([a, tail]), torch.cat([b, head], dim=1)
    return found


def laid_out(values: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of the file of `values`, which have their names in training; without what
    Diffusers and peft put before all of them."""
    found: dict[str, Tensor] = {}
    for module, parts in parts_of(list(values)).items():
        held = {part: values[name] for part, name in parts.items()}
        if is_lycoris(adapter):
            prefix = LYCORIS_PREFIX + module.replace(".", "_") + "."
            found |= {prefix + part: tensor for part, tensor in _lycoris(held, adapter, module)}
        else:
            found |= {f"{module}.{leaf(part)}": tensor for part, tensor in held.items()}
    return found


def leaf(part: str) -> str:
    """How Diffusers and peft call a part in files: layers have a weight, parameters are bare."""
    return f"{part}.weight" if part in ("lora_A", "lora_B", "oft_R") else part


def _lycoris(
    parts: Mapping[str, Tensor], adapter: Adapter, module: str
) -> Sequence[tuple[str, Tensor]]:
    """With the strength in the first factor and alpha = rank: readers scale by alpha / rank where
    a factor is two matrices, and don't where none is."""
    if adapter.kind == "full" or "norm_w" in parts:
        return [(_lycoris_name(part), tensor) for part, tensor in parts.items()]
    scale, folded = scale_of(adapter, module), dict(parts)
    if adapter.kind == "glora":  # which is always scaled
        named = [(_lycoris_name(part), tensor) for part, tensor in parts.items()]
        return [*named, ("alpha", torch.tensor(scale * parts["glora_a2"].shape[0]))]
    first = next(p for p in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if p in parts)
    folded[first] = (parts[first].float() * scale).to(parts[first].dtype)
    inner = next((p for p in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b") if p in parts), None)
    rank = adapter.rank if inner is None else parts[inner].shape[0]
    return [*folded.items(), ("alpha", torch.tensor(float(rank)))]


def _lycoris_name(part: str) -> str:
    """LyCORIS' own name of a part in training."""
    kind, _, rest = part.partition("_")
    return {"glora": f"{rest}.weight", "full": rest, "norm": f"{rest}_norm"}.get(kind, part)


def peft_settings(values: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Any]:
    """What Diffusers and peft must know of an adapter, as plain values in an order that is always
    the same. `values` have their names in training.

    A LoRA's alpha is such that alpha / rank is the scale, whichever root the plan takes of it.
    """
    import peft

    modules = sorted(parts_of(list(values)))
    config: Any
    if adapter.kind == "oft":
        config = peft.OFTConfig(
            r=0,
            oft_block_size=adapter.block_size,
            block_share=adapter.block_share,
            target_modules=modules,
        )
    elif adapter.kind == "boft":
        config = peft.BOFTConfig(
            boft_block_size=adapter.block_size,
            boft_n_butterfly_factor=adapter.butterfly_factors,
            target_modules=modules,
        )
    elif adapter.kind == "ia3":
        config = peft.IA3Config(target_modules=modules, feedforward_modules=[])
    else:
        config = peft.LoraConfig(target_modules=modules, **_sizes(values, adapter))
    return settings_of(config)


def settings_of(config: Any) -> dict[str, Any]:
    """peft's settings as plain values in an order that is always the same."""
    told = config.to_dict()
    return {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in told.items()}


def _sizes(values: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Any]:
    ranks = {m: values[parts["lora_A"]].shape[0] for m, parts in parts_of(list(values)).items()}
    alphas = {module: scale_of(adapter, module) * rank for module, rank in ranks.items()}
    return {**lora_sizes(ranks, alphas), "use_dora": adapter.kind == "dora"}


def lora_sizes(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """peft's settings for the ranks and alphas of these modules: the commonest, and patterns for
    the others."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exactly(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {exactly(m): a for m, a in alphas.items() if a != alpha},
    }


def read_start(
    adapter: Adapter,
    like: Mapping[str, Tensor],
    family: str,
    config: Mapping[str, Any],
    *,
    encoder: str = "",
    beside: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The file `adapter.start` under the names in training, at the strength that it has; in our
    keys or in those of other programs.

    `like` is what is trained, of a component of this `config`. Lengths of rows are the file's, see
    `is_for_comfyui`. Raises ValueError if the file has other layers or sizes, and OSError.
    """
    path = Path(adapter.start)
    short = {name.removeprefix(OUTER) if encoder else name: name for name in like}
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`{path}` can't be read: {error}") from error
    if is_lycoris(adapter) or adapter.kind in LORAS:
        from runtime.export.foreign import in_own_names

        modules = parts_of(list(short))
        ranks = {module: rank_of(adapter, module) for module in modules}
        given = (stored, ranks, family, config)
        lycoris = is_lycoris(adapter)
        try:
            stored = in_own_names(*given, encoder=encoder, beside=beside, lycoris=lycoris)
        except ValueError as error:
            raise ValueError(f"`{path}` does not fit: {error}") from error
    found = _read(stored, adapter, path, list(short), encoder, beside)
    return {short[name]: _as(like[short[name]], t, name, path) for name, t in found.items()}


def is_for_comfyui(adapter: Adapter) -> bool:
    """Whether the lengths of rows in the file `adapter.start` are such as ComfyUI multiplies by."""
    return bool(header_metadata(Path(adapter.start)).get(COMFYUI_LENGTHS))


def check_start(
    adapter: Adapter,
    names: Sequence[str],
    family: str,
    config: Mapping[str, Any],
    *,
    encoder: str = "",
) -> None:
    """Raise ValueError if the file `adapter.start`, by its header alone, has other layers than
    `names` are of. What only tensors tell is left to `read_start`."""
    header = header_of(Path(adapter.start))
    if header is None or not (is_lycoris(adapter) or adapter.kind in LORAS):
        return
    from runtime.export.foreign import known

    short = [name.removeprefix(OUTER) if encoder else name for name in names]
    modules = list(parts_of(short))
    found, strange = known(header.shapes, modules, family, config, encoder=encoder)
    missing = [module for module in modules if module not in found]
    if missing:
        raise ValueError(
            f"`{adapter.start}` holds nothing of `{missing[0]}` and {len(missing) - 1} more of the "
            f"{len(modules)} layers that are targets"
            if len(missing) > 1
            else f"`{adapter.start}` holds nothing of `{missing[0]}`, which is a target"
        )
    others = ("text_encoder", "lora_te", f"{BUNDLE}.")
    left = [k for k in strange if not k.startswith(others) and not k.endswith(".alpha")]
    if left and not encoder:
        raise ValueError(
            f"`{adapter.start}` holds {len(left)} tensors of layers that are not targets, such as "
            f"`{min(left)}`"
        )


def _as(like: Tensor, tensor: Tensor, name: str, path: Path) -> Tensor:
    """`tensor` with as many edges of length 1 as `like`; programs differ in them."""
    one, other = ([edge for edge in each.shape if edge != 1] for each in (like, tensor))
    if one != other:
        raise ValueError(
            f"`{path}` holds `{name}` of shape {tuple(tensor.shape)}, here it is "
            f"{tuple(like.shape)}: another rank, or another base"
        )
    return tensor.reshape(like.shape)


def read_result(
    adapter: Adapter,
    path: Path,
    names: Sequence[str],
    *,
    encoder: str = "",
    beside: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The file of an adapter like `adapter` under the names in training, at the strength that it
    has there. Raises ValueError if it is of other modules or parts, and OSError.

    Of the trained component, or of a text `encoder`; what the file holds of the encoders `beside`
    is passed over.
    """
    return _read(load_file(path), adapter, path, names, encoder, beside)


def _read(
    every: Mapping[str, Tensor],
    adapter: Adapter,
    path: Path,
    names: Sequence[str],
    encoder: str,
    beside: Sequence[str],
) -> dict[str, Tensor]:
    """See `read_result`; `every` is what the file holds, in our keys."""
    stored = _of(every, encoder, beside)
    told = _of(_lora_metadata(path), encoder, beside)
    found: dict[str, Tensor] = {}
    wanted = parts_of(names)
    for module, parts in wanted.items():
        held = _stored(stored, adapter, path, module, list(parts))
        found |= {parts[p]: t for p, t in _at_scale(held, adapter, module, told).items()}
    known = {key for module, parts in wanted.items() for key in _keys(adapter, module, parts)}
    strange = [key for key in stored if key not in known and not key.endswith(".alpha")]
    if strange:
        raise ValueError(
            f"`{path}` holds {len(strange)} tensors of layers that are not targets, such as "
            f"`{min(strange)}`"
        )
    return found


def _of(tree: Mapping[str, T], encoder: str, beside: Sequence[str]) -> dict[str, T]:
    """The entries of one component, by names without what stands for it."""
    if encoder:
        start = re.compile(rf"{encoder}\.(text_model\.)?")
        own = {start.sub("", k, count=1): v for k, v in tree.items() if start.match(k)}
        return {re.sub(rf"\.{LENGTHS}\.weight$", f".{LENGTHS}", k): v for k, v in own.items()}
    others = tuple(f"{name}." for name in beside)
    return {_plain(key): each for key, each in tree.items() if not key.startswith(others)}


def _plain(key: str) -> str:
    """A name without what Diffusers or peft put before it."""
    return re.sub(rf"^({re.escape(PEFT_ROOT)}|transformer|unet)\.", "", key)


def _stored(
    stored: Mapping[str, Tensor], adapter: Adapter, path: Path, module: str, parts: Sequence[str]
) -> dict[str, Tensor]:
    """The parts of one module, and its alpha if the file has one."""
    keys = dict(zip((*parts, "alpha"), _keys(adapter, module, [*parts, "alpha"]), strict=True))
    missing = [key for part, key in keys.items() if key not in stored and part != "alpha"]
    if missing:
        raise ValueError(f"`{path}` holds no `{missing[0]}`: other targets or sizes")
    return {part: stored[key] for part, key in keys.items() if key in stored}


def _keys(adapter: Adapter, module: str, parts: Iterable[str]) -> list[str]:
    """What the file calls `parts` of a module, without what stands before all names."""
    if is_lycoris(adapter):
        prefix = LYCORIS_PREFIX + module.replace(".", "_")
        return [f"{prefix}.{_lycoris_name(part)}" for part in parts]
    return [f"{module}.{leaf(part)}" for part in parts]


def _at_scale(
    held: Mapping[str, Tensor], adapter: Adapter, module: str, metadata: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The second factor, times the file's scale over the plan's: the same update."""
    found = {part: tensor for part, tensor in held.items() if part != "alpha"}
    if not ADAPTERS[adapter.kind].ranked or "norm_w" in found:
        return found
    if adapter.kind == "glora":
        rank = held["glora_a2"].shape[0]
        share = float(held["alpha"]) / rank / scale_of(adapter, module)
        firsts = () if share == 1 else ("glora_a1", "glora_b1")
        return found | {part: found[part].float() * share for part in firsts}
    if adapter.kind in LORAS:
        rank, second = held["lora_A"].shape[0], "lora_B"
        theirs = _of_module(metadata, "alpha_pattern", module, metadata.get("lora_alpha", rank))
        scale = theirs / (rank**0.5 if metadata.get("use_rslora") else rank)
        if "alpha" in held:  # as other programs tell it, beside each layer
            scale = float(held["alpha"]) / rank
    else:
        second = next(p for p in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if p in held)
        inner = next((p for p in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b") if p in held), None)
        rank = adapter.rank if inner is None else held[inner].shape[0]
        scale = float(held["alpha"]) / rank if inner and "alpha" in held else 1.0
    share = scale / scale_of(adapter, module)
    if not isclose(share, 1, rel_tol=DIGITS):  # else it keeps its number format too
        found[second] = (found[second].double() * share).float()
    return found


def _of_module(metadata: Mapping[str, Any], table: str, module: str, otherwise: float) -> float:
    from peft.utils.other import get_pattern_key

    patterns = metadata.get(table) or {}
    return float(patterns.get(get_pattern_key(list(patterns), module), otherwise))


def _lora_metadata(path: Path) -> dict[str, Any]:
    """What a LoRA's file says of its strength: in itself for Diffusers, beside it for peft."""
    beside = path.with_name("adapter_config.json")
    if beside.is_file():
        found: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
        return found
    told: dict[str, Any] = json.loads(header_metadata(path).get("lora_adapter_metadata", "{}"))
    return told


def header_metadata(path: Path) -> Mapping[str, str]:
    """What a safetensors file says of itself."""
    header = header_of(path)
    return header.metadata if header else {}
