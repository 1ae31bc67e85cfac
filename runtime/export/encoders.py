"""What was trained of text encoders, as other programs read it: LoRA keys, and whole encoders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from torch import Tensor

from compiler.families import FAMILIES
from compiler.plan import Plan
from runtime.errors import RunFailed
from runtime.export import lora_keys
from runtime.export.base import component_tensors
from runtime.export.lazy import Tensors
from runtime.export.lora_keys import Layer
from runtime.export.weights import merged
from runtime.methods.adapter_files import OUTER
from runtime.methods.text_files import in_file, inner, of_encoder


def kohya(family: str, layers: Mapping[str, Layer], names: Sequence[str]) -> dict[str, Tensor]:
    """The layers of the encoders `names` under sd-scripts' names."""
    found: dict[str, Tensor] = {}
    for encoder in names:
        own = {in_file(name): layer for name, layer in of_encoder(layers, encoder).items()}
        found |= lora_keys.kohya_plain(own, FAMILIES[family].kohya_encoders[encoder])
    return found


def diffusers(
    layers: Mapping[str, Layer], names: Sequence[str], *, folded: bool
) -> tuple[dict[str, Tensor], list[dict[str, str]]]:
    """The layers of the encoders `names` under Diffusers' names, and the metadata that tell their
    strength; with the strength in them (`folded`) there are none."""
    found: dict[str, Tensor] = {}
    told: list[dict[str, str]] = []
    for encoder in names:
        own = of_encoder(layers, encoder)
        if not own:
            continue
        named = {in_file(name): layer for name, layer in own.items()}
        if folded:
            found |= lora_keys.folded(named, encoder)
        else:
            found |= lora_keys.diffusers(named, encoder)
            told.append(lora_keys.settings(inner(own), encoder))
    return found, told


def joined(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The metadata of several components as those of one file."""
    (key,) = {key for each in metadata for key in each}
    whole: dict[str, object] = {}
    for each in metadata:
        whole |= json.loads(each[key])
    return {key: json.dumps(whole, sort_keys=True)}


def whole_encoders(plan: Plan, trained: Tensors) -> dict[str, Tensors]:
    """Every tensor of each encoder that was trained, with what was trained in it, by the names in
    the base's files. Raises RunFailed if the base is another one, and OSError."""
    found: dict[str, Tensors] = {}
    facts = plan.text_training
    for encoder in facts.encoders if facts else ():
        base = component_tensors(plan.model, encoder)
        outer = {name.removeprefix(OUTER): name for name in base}
        own = inner(of_encoder(trained, encoder))
        plain = {short: base[name] for short, name in outer.items()}
        if facts is not None and facts.adapter is not None:
            new = merged(plain, own, facts.adapter)
        else:
            if strange := own.keys() - plain.keys():
                raise RunFailed(f"the base's {encoder} has no `{min(strange)}`: it is another one")
            new = {**plain, **own}
        found[encoder] = {outer[short]: tensor for short, tensor in new.items()}
    return found
