"""An adapter's file as other programs read it, and back: which tensors, under which names.

LoRA and DoRA are as Diffusers saves them, LoKr and LoHa as LyCORIS does
(https://github.com/KohakuBlueleaf/LyCORIS, `lycoris_` and the module's name with underscores),
OFT and BOFT as peft does. `compiler.adapters` says who loads them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compiler.adapters import scale_of
from compiler.plan import Adapter
from compiler.safetensors import header_of
from runtime.methods.kinds import NAME, parts_of

PEFT_PREFIX = "base_model.model."
LYCORIS_PREFIX = "lycoris_"
Taken = Mapping[str, tuple[Tensor, Tensor]]  # module -> (B, A) that the base lacks in training


def given_back(
    values: Mapping[str, Tensor], adapter: Adapter, taken: Taken
) -> dict[str, Tensor]:
    """`values`, a LoRA in training, as one for the base as it was: of twice the rank.

    W - s B0 A0 + s B A = W + s (B, -B0) (A; A0).
    """
    found = dict(values)
    for module, (b0, a0) in taken.items():
        name_a, name_b = (f"{module}.lora_{which}.{NAME}.weight" for which in "AB")
        a, b = values[name_a], values[name_b]
        tail = a0.to(a).view(a0.shape[0], *a.shape[1:])
        head = -b0.to(b).view(*b0.shape, *b.shape[2:])
        found[name_a], found[name_b] = torch.cat([a, tail]), torch.cat([b, head], dim=1)
    return found


def laid_out(
    values: Mapping[str, Tensor], adapter: Adapter, component: str
) -> dict[str, Tensor]:
    """The tensors of the file of `values`, which have their names in training."""
    found: dict[str, Tensor] = {}
    for module, parts in parts_of(list(values)).items():
        held = {part: values[name] for part, name in parts.items()}
        if adapter.kind in ("lora", "dora"):
            prefix = f"{component}.{module}."
            found |= {prefix + leaf(part): tensor for part, tensor in held.items()}
        elif adapter.kind in ("lokr", "loha"):
            prefix = LYCORIS_PREFIX + module.replace(".", "_") + "."
            found |= {prefix + part: tensor for part, tensor in _lycoris(held, adapter, module)}
        else:
            prefix = f"{PEFT_PREFIX}{module}."
            found |= {prefix + leaf(part): tensor for part, tensor in held.items()}
    return found


def leaf(part: str) -> str:
    """How Diffusers and peft call a part in files: layers have a weight, parameters are bare."""
    return f"{part}.weight" if part in ("lora_A", "lora_B", "oft_R") else part


def _lycoris(
    parts: Mapping[str, Tensor], adapter: Adapter, module: str
) -> Sequence[tuple[str, Tensor]]:
    """With the strength in the first factor and alpha = rank: readers scale by alpha / rank where
    a factor is two matrices, and don't where none is."""
    scale, folded = scale_of(adapter, module), dict(parts)
    first = next(p for p in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if p in parts)
    folded[first] = (parts[first].float() * scale).to(parts[first].dtype)
    inner = next((p for p in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b") if p in parts), None)
    rank = adapter.rank if inner is None else parts[inner].shape[0]
    return [*folded.items(), ("alpha", torch.tensor(float(rank)))]


def lora_settings(values: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Any]:
    """What Diffusers and peft must know of a LoRA: ranks, alphas, targets, as plain values.

    Alpha is such that alpha / rank is the scale, whichever root the plan takes of the rank.
    """
    ranks = {m: values[parts["lora_A"]].shape[0] for m, parts in parts_of(list(values)).items()}
    alphas = {module: scale_of(adapter, module) * rank for module, rank in ranks.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {f"^{m}": r for m, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {f"^{m}": a for m, a in sorted(alphas.items()) if a != alpha},
        "use_dora": adapter.kind == "dora",
    }


def peft_config(values: Mapping[str, Tensor], adapter: Adapter) -> str:
    """The `adapter_config.json` that peft needs beside its file."""
    modules = sorted(parts_of(list(values)))
    common = {"inference_mode": True, "target_modules": modules}
    if adapter.kind == "oft":
        kind: dict[str, Any] = {
            "peft_type": "OFT",
            "r": 0,
            "oft_block_size": adapter.block_size,
            "block_share": adapter.block_share,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5,
            "peft_version": _peft_version(),
        }
    else:
        kind = {
            "peft_type": "BOFT",
            "boft_block_size": adapter.block_size,
            "boft_block_num": 0,
            "boft_n_butterfly_factor": adapter.butterfly_factors,
        }
    return json.dumps(kind | common, indent=2, sort_keys=True) + "\n"


def _peft_version() -> str:
    import peft

    return str(peft.__version__)


def read_start(adapter: Adapter, component: str, names: Sequence[str]) -> dict[str, Tensor]:
    """The file `adapter.start` under the names in training, at the strength that it has.

    `names` are those of what is trained. Raises ValueError if the file has others, and OSError.
    """
    path = Path(adapter.start)
    stored = load_file(path)
    metadata = _lora_metadata(path, component)
    found: dict[str, Tensor] = {}
    for module, parts in parts_of(names).items():
        held = _stored(stored, adapter, component, module, list(parts))
        for part, tensor in _at_scale(held, adapter, module, metadata).items():
            found[parts[part]] = tensor
    strange = len(stored) - sum(1 for key in stored if key.endswith(".alpha")) - len(found)
    if strange:
        raise ValueError(
            f"`{path}` holds {strange} tensors of layers that the targets don't match"
        )
    return found


def _stored(
    stored: Mapping[str, Tensor], adapter: Adapter, component: str, module: str, parts: Sequence[str]
) -> dict[str, Tensor]:
    """The parts of one module, and its alpha if the file has one."""
    if adapter.kind in ("lokr", "loha"):
        prefix = LYCORIS_PREFIX + module.replace(".", "_") + "."
        keys = {part: prefix + part for part in (*parts, "alpha")}
    else:
        prefix = f"{component}." if adapter.kind in ("lora", "dora") else PEFT_PREFIX
        keys = {part: f"{prefix}{module}.{leaf(part)}" for part in parts}
    missing = [key for part, key in keys.items() if key not in stored and part != "alpha"]
    if missing:
        raise ValueError(f"`{adapter.start}` holds no `{missing[0]}`: it has other targets or sizes")
    return {part: stored[key] for part, key in keys.items() if key in stored}


def _at_scale(
    held: Mapping[str, Tensor], adapter: Adapter, module: str, metadata: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The second factor, times the file's scale over the plan's: the same update."""
    found = {part: tensor for part, tensor in held.items() if part != "alpha"}
    if adapter.kind in ("oft", "boft"):
        return found
    if adapter.kind in ("lora", "dora"):
        rank, second = held["lora_A"].shape[0], "lora_B"
        theirs = _of_module(metadata, "alpha_pattern", module, metadata.get("lora_alpha", rank))
        scale = theirs / (rank**0.5 if metadata.get("use_rslora") else rank)
    else:
        second = next(p for p in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if p in held)
        inner = next((p for p in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b") if p in held), None)
        rank = adapter.rank if inner is None else held[inner].shape[0]
        scale = float(held["alpha"]) / rank if inner and "alpha" in held else 1.0
    found[second] = found[second].float() * (scale / scale_of(adapter, module))
    return found


def _of_module(
    metadata: Mapping[str, Any], table: str, module: str, otherwise: float
) -> float:
    from peft.utils import get_pattern_key

    patterns = metadata.get(table) or {}
    return float(patterns.get(get_pattern_key(list(patterns), module), otherwise))


def _lora_metadata(path: Path, component: str) -> dict[str, Any]:
    header = header_of(path)
    told = header.metadata.get("lora_adapter_metadata", "{}") if header else "{}"
    prefix = f"{component}."
    found = {k.removeprefix(prefix): v for k, v in json.loads(told).items() if k.startswith(prefix)}
    return found

