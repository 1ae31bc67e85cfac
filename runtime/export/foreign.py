"""Adapters in the keys of other programs, read back: the inverse of what `tuner export` writes.

LoRA and DoRA of sd-scripts, musubi-tuner, OneTrainer, ComfyUI and ai-toolkit (`lora_unet_`,
`lora_te_`, `diffusion_model.`, `transformer.`, with `.alpha` or without), and LyCORIS' kinds under
`lora_unet_`. A layer goes by its name in Diffusers or by that of the model as it was published.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from compiler.families import FAMILIES
from compiler.words import BUNDLE
from runtime.export import bfl, bfl2, mmdit, nextdit, sgm
from runtime.export.conventions import Config
from runtime.export.mmdit import Place, halves_swapped

PLACES: Mapping[str, Callable[[str, Config], Place]] = {
    "flux": bfl.place,
    "flux2": lambda module, config: bfl2.place(module),
    "flux2_dev": lambda module, config: bfl2.place(module),
    "kolors": lambda module, config: Place(sgm.published(module, config)),
    "lumina2": nextdit.place,
    "sd": lambda module, config: Place(sgm.published(module, config)),
    "sd3": lambda module, config: mmdit.place(module, int(config["num_layers"])),
    "sdxl": lambda module, config: Place(sgm.published(module, config)),
    "sdxl_refiner": lambda module, config: Place(sgm.published(module, config)),
}
"""Where a module is in the model as published; of other families the names are Diffusers' own.
Each raises KeyError for a module that has no place there."""

DOTTED = ("", "transformer.", "unet.", "diffusion_model.", "base_model.model.")
JOINED = ("lora_unet_", "lora_transformer_", "lycoris_")
PART = re.compile(
    r"(.+?)\.(lora_(?:down|mid|up|A|B)\.weight|alpha|dora_scale"
    r"|lora_magnitude_vector(?:\.weight)?|(?:lokr|hada)_\w+|[ab][12]\.weight|diff|diff_b|w_norm|b_norm)"
)
OURS = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
}
MID = "lora_mid.weight"
A, B, LENGTHS, ALPHA = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "alpha"
WHOLE = frozenset({"diff", "diff_b"})  # what LyCORIS' `full` adds to a weight and a bias
OF_COLUMNS = "the lengths of columns, and those of rows are trained"
Parts = dict[str, Tensor]
Spelled = dict[str, list[tuple[str, Place]]]
"""From a layer as a file may call it to the modules that it holds."""


def in_own_names(
    stored: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    family: str,
    config: Config,
    *,
    encoder: str = "",
    beside: Sequence[str] = (),
    lycoris: bool = False,
) -> dict[str, Tensor]:
    """`stored` with the layers of the modules in `ranks` under our own names, those of a text
    encoder below `encoder`; what is not known stays as it is.

    A layer's strength is `alpha` over its rank; without alpha it is 1. `beside` are encoders whose
    layers are passed over. Raises ValueError for a layer that can't be cut into the modules'.
    """
    spelled = _of_encoder(ranks, family, encoder) if encoder else _of_model(ranks, family, config)
    others = tuple(f"{FAMILIES[family].kohya_encoders[name]}_" for name in beside)
    found: dict[str, Tensor] = {}
    layers: dict[str, Parts] = {}
    for key, tensor in stored.items():
        match = PART.fullmatch(key)
        if key.startswith((*others, f"{BUNDLE}.")):
            continue
        if match is None or match[1] not in spelled:
            found[key] = tensor
        else:
            layers.setdefault(match[1], {})[match[2]] = tensor
    for layer, parts in layers.items():
        places = spelled[layer]
        if lycoris:
            if "dora_scale" in parts and parts["dora_scale"].shape[0] == 1:
                raise ValueError(f"`{layer}` has {OF_COLUMNS}")
            for module, held in _of_lycoris(layer, parts, places):
                start = "lycoris_" + module.replace(".", "_")
                found |= {f"{start}.{part}": tensor for part, tensor in held.items()}
            continue
        own = {OURS.get(part, part): tensor for part, tensor in parts.items()}
        own = _folded(layer, own) if {A, MID} <= own.keys() else own
        for module, held in _cut(layer, own, places, ranks):
            start = f"{encoder}.{module}" if encoder else module
            found |= {f"{start}.{part}": tensor for part, tensor in held.items()}
    return found


def _folded(layer: str, parts: Parts) -> Parts:
    """A LoCon with a kernel of its own between two 1x1 convolutions (LyCORIS' `use_tucker`): the
    same update of the same rank, with the kernel in the first matrix."""
    down, mid = parts[A].float().flatten(1), parts[MID].float()
    if mid.ndim != 4 or mid.shape[1] != down.shape[0]:
        raise ValueError(f"`{layer}` has a kernel that does not follow its first matrix")
    kept = {part: tensor for part, tensor in parts.items() if part != MID}
    return kept | {A: torch.einsum("oikl,in->onkl", mid, down).contiguous()}


def _of_lycoris(
    layer: str, parts: Parts, places: Sequence[tuple[str, Place]]
) -> Iterator[tuple[str, Parts]]:
    """The modules that share `layer`. Rows can be told apart in whole matrices alone."""
    _, first = places[0]
    if first.parts == 1 and not first.swapped:
        yield places[0][0], parts
        return
    if parts.keys() - WHOLE:
        raise ValueError(f"`{layer}` is of several layers, or of other rows, than are trained here")
    if first.swapped:
        yield places[0][0], {part: halves_swapped(tensor) for part, tensor in parts.items()}
        return
    cut: dict[str, Parts] = {module: {} for module, _ in places}
    for part, tensor in parts.items():
        outputs = tensor.shape[0]
        rows = list(first.rows or [outputs // first.parts] * first.parts)
        if sum(rows) != outputs:
            raise ValueError(f"`{layer}` has {outputs} outputs, and this base's {sum(rows)}")
        pieces = dict(enumerate(torch.split(tensor, rows)))
        for module, place in places:
            cut[module][part] = pieces.pop(place.part).clone()
        if any(piece.any() for piece in pieces.values()):
            raise ValueError(f"`{layer}` holds more than the layers that are targets")
    yield from cut.items()


def known(
    keys: Iterable[str],
    modules: Iterable[str],
    family: str,
    config: Config,
    *,
    encoder: str = "",
) -> tuple[set[str], list[str]]:
    """By its `keys` alone: those of `modules` that a file has layers for, and the keys that are of
    none of them."""
    ranks = dict.fromkeys(modules, 0)
    spelled = _of_encoder(ranks, family, encoder) if encoder else _of_model(ranks, family, config)
    found: set[str] = set()
    strange = []
    for key in keys:
        match = PART.fullmatch(key)
        if match is not None and match[1] in spelled:
            found |= {module for module, _ in spelled[match[1]]}
        else:
            strange.append(key)
    return found, strange


def _of_encoder(modules: Mapping[str, int], family: str, encoder: str) -> Spelled:
    root = FAMILIES[family].kohya_encoders.get(encoder)
    found: Spelled = {}
    for module in modules:
        place = [(module, Place(module))]
        if root is not None:
            found[f"{root}_text_model_{module.replace('.', '_')}"] = place
        found |= {f"{encoder}.{outer}{module}": place for outer in ("", "text_model.")}
    return found


def _of_model(modules: Mapping[str, int], family: str, config: Config) -> Spelled:
    found: Spelled = {}
    for module in modules:
        for start in DOTTED:
            found[start + module] = [(module, Place(module))]
        for start in JOINED:
            found[start + module.replace(".", "_")] = [(module, Place(module))]
    published: Spelled = {}
    for module in modules if family in PLACES else ():
        try:
            place = PLACES[family](module, config)
        except KeyError:
            continue
        published.setdefault(place.module, []).append((module, place))
    for name, places in published.items():
        for key in (name, f"diffusion_model.{name}", f"lora_unet_{name.replace('.', '_')}"):
            # A few modules are called alike here and there: rows are then as published.
            found[key] = places
    return found


def _cut(
    layer: str, parts: Parts, places: Sequence[tuple[str, Place]], ranks: Mapping[str, int]
) -> Iterator[tuple[str, Parts]]:
    """The modules that share `layer`, each with its own matrices."""
    if A not in parts or B not in parts:
        raise ValueError(f"`{layer}` has one of the two matrices of LoRA only")
    _, first = places[0]
    up = halves_swapped(parts[B]) if first.swapped else parts[B]
    if first.parts == 1:
        lengths = parts.get(LENGTHS)
        if lengths is not None:
            parts = parts | {LENGTHS: _of_rows(layer, lengths, up, swapped=first.swapped)}
        yield places[0][0], parts | {B: up}
        return
    if LENGTHS in parts:
        raise ValueError(
            f"`{layer}` is a DoRA of several layers in one, which can't be taken apart"
        )
    rows = list(first.rows or [up.shape[0] // first.parts] * first.parts)
    if sum(rows) != up.shape[0]:
        raise ValueError(f"`{layer}` has {up.shape[0]} outputs, and this base's {sum(rows)}")
    yield from _apart(layer, parts | {B: up}, rows, places, ranks)


def _apart(
    layer: str,
    parts: Parts,
    rows: Sequence[int],
    places: Sequence[tuple[str, Place]],
    ranks: Mapping[str, int],
) -> Iterator[tuple[str, Parts]]:
    """A layer that several modules share. Either each has columns of its own in the second matrix,
    and zeros in those of others; or all share the first matrix, which each then gets whole."""
    down, up = parts[A], parts[B]
    rank = down.shape[0]
    scale = float(parts[ALPHA]) / rank if ALPHA in parts else 1.0
    wanted = {place.part: module for module, place in places}
    own = [ranks[wanted[part]] for part in sorted(wanted)]
    left = up.clone()
    columns, cut = 0, {}
    for part in sorted(wanted):
        across = slice(sum(rows[:part]), sum(rows[: part + 1]))
        mine = slice(columns, columns + ranks[wanted[part]])
        columns, cut[part] = mine.stop, (across, mine)
        left[across, mine] = 0
    if sum(own) != rank or left.any():
        if any(one != rank for one in own):
            raise ValueError(
                f"`{layer}` is of rank {rank} for {len(own)} layers together, which is not what "
                f"the recipe's ranks make: {' + '.join(map(str, own))} apart, or the same for all"
            )
        cut = {part: (across, slice(0, rank)) for part, (across, _) in cut.items()}
    covered = torch.zeros(up.shape[0], dtype=torch.bool)
    for part, (across, mine) in cut.items():
        covered[across] = True
        alpha = torch.tensor(scale * (mine.stop - mine.start), dtype=torch.float64)
        yield wanted[part], {A: down[mine].clone(), B: up[across, mine].clone(), ALPHA: alpha}
    if up[~covered].any():
        raise ValueError(f"`{layer}` holds more than the layers that are targets")


def _of_rows(layer: str, lengths: Tensor, up: Tensor, *, swapped: bool) -> Tensor:
    """A DoRA's lengths of rows, (outputs,). Raises ValueError for those of columns."""
    across = lengths.ndim == 2 or (lengths.ndim > 1 and lengths.shape[1] != up.shape[0])
    if across and lengths.shape[0] == 1 and lengths.shape[1] != 1:
        raise ValueError(f"`{layer}` has {OF_COLUMNS}")
    flat = lengths.flatten()
    return halves_swapped(flat) if swapped else flat
