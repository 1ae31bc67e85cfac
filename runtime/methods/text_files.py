"""What was trained of text encoders, in files: beside the model's own, as Diffusers reads it.

A CLIP's layers are called `text_model.encoder...` there, as they always were, whether or not the
installed version of transformers keeps that outer module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from compiler.plan import TextTraining
from runtime.methods import adapter_files
from runtime.methods.adapter_files import LENGTHS, OUTER
from runtime.new_tokens import is_rows

T = TypeVar("T")


def of_encoder(values: Mapping[str, T], encoder: str) -> dict[str, T]:
    """Those of `values`, by their names in training, that are of one encoder, by its own names;
    without vectors of new tokens."""
    start = f"{encoder}."
    own = {n: each for n, each in values.items() if n.startswith(start) and not is_rows(n)}
    return {name.removeprefix(start): each for name, each in own.items()}


def of_model(values: Mapping[str, T]) -> dict[str, T]:
    """Those of `values`, by their names in training, that are the trained component's own."""
    return {name: each for name, each in values.items() if not name.startswith("text_encoder")}


def in_file(name: str) -> str:
    """The name of an encoder's layer or tensor in files."""
    return name if name.startswith(OUTER) else OUTER + name


def for_diffusers(values: Mapping[str, Tensor], facts: TextTraining) -> dict[str, Any]:
    """Arguments of a pipeline's `save_lora_weights` for the encoders' adapters."""
    found: dict[str, Any] = {}
    for encoder, (tensors, settings) in of_encoders(values, facts).items():
        found[f"{encoder}_lora_layers"] = tensors
        found[f"{encoder}_lora_adapter_metadata"] = settings
    return found


def of_encoders(
    values: Mapping[str, Tensor], facts: TextTraining | None
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Of each encoder, its adapter's tensors as they are called in files, and peft's settings."""
    found = {}
    for encoder in facts.encoders if facts else ():
        assert facts is not None and facts.adapter is not None
        own = inner(of_encoder(values, encoder))
        tensors = adapter_files.laid_out(own, facts.adapter)
        # Names without the outer module match with and without it: peft compares ends.
        settings = adapter_files.peft_settings(own, facts.adapter)
        found[encoder] = {_in_diffusers(name): each for name, each in tensors.items()}, settings
    return found


def _in_diffusers(name: str) -> str:
    """The name of an adapter's tensor in files: transformers looks for DoRA's lengths under the
    name of a weight, and Diffusers' own models without."""
    return in_file(name) + (".weight" if name.endswith(f".{LENGTHS}") else "")


def inner(values: Mapping[str, T]) -> dict[str, T]:
    """The same by names without the outer module."""
    return {name.removeprefix(OUTER): each for name, each in values.items()}


def read(facts: TextTraining, path: Path, names: Sequence[str], encoder: str) -> dict[str, Tensor]:
    """One encoder's adapter from the file at `path`, under its names in training, of which `names`
    are all. Raises ValueError if it is of other layers or parts, and OSError."""
    assert facts.adapter is not None
    own = of_encoder({name: name for name in names}, encoder)
    short = inner(own)
    found = adapter_files.read_result(facts.adapter, path, list(short), encoder=encoder)
    return {short[name]: tensor for name, tensor in found.items()}
