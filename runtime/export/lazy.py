"""Tensors that are read when they are written, one at a time, and the file that they go to.

The file is safetensors' (https://github.com/huggingface/safetensors): eight bytes with the length
of a JSON header, the header with names, types, shapes and positions, then the bytes of the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from attrs import frozen
from safetensors import safe_open
from torch import Tensor

from runtime import files

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in NAMES.items()}
WIDENED = {"F8_E4M3": torch.bfloat16, "F8_E5M2": torch.bfloat16}
"""What numbers of eight bits are read as: it holds them all, and what is merged into them."""
HASHES = ("modelspec.hash_sha256", "sshs_model_hash")  # of the tensors' bytes as they stand there
UNKNOWN = "0" * 64


@frozen(kw_only=True)
class Lazy:
    """A tensor to be. `read` gives it anew each time, on the host."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def to(self, dtype: torch.dtype | None) -> Lazy:
        """In another number format; indices and None change nothing."""
        if dtype is None or not self.dtype.is_floating_point:
            return self
        return Lazy(shape=self.shape, dtype=dtype, read=lambda: self.read().to(dtype))


Tensors = dict[str, Lazy]


def held(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors that are there already."""
    return {name: _held(tensor) for name, tensor in tensors.items()}


def _held(tensor: Tensor) -> Lazy:
    return Lazy(shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor)


def in_files(paths: Sequence[Path]) -> Tensors:
    """All tensors of safetensors files, which stay mapped as long as one of these is kept."""
    return {name: lazy for path in paths for name, lazy in _in_file(path).items()}


def _in_file(path: Path) -> Tensors:
    opener: Any = safe_open
    opened = opener(path, "pt")
    found: Tensors = {}
    for name in opened.keys():  # noqa: SIM118 (it is no mapping)
        part = opened.get_slice(name)
        dtype = WIDENED.get(part.get_dtype()) or TYPES[part.get_dtype()]
        found[name] = Lazy(
            shape=tuple(part.get_shape()), dtype=dtype, read=partial(_read, opened, name, dtype)
        )
    return found


def _read(opened: Any, name: str, dtype: torch.dtype) -> Tensor:
    tensor: Tensor = opened.get_tensor(name).to(dtype)
    return tensor


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; holds one tensor at a time in memory.

    Entries of `metadata` called as in `HASHES` get the SHA-256 of the tensors' bytes. Raises
    OSError.
    """
    # Larger types first, as the library orders them, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    with files.partial_file(path) as partial, partial.open("w+b") as file:
        head = _header(names, tensors, metadata, UNKNOWN)
        file.write(head)
        digest = hashlib.sha256()
        for name in names:
            _append(file, tensors[name], digest)
        file.seek(0)
        final = _header(names, tensors, metadata, digest.hexdigest())
        assert len(final) == len(head), "hashes are of one length"
        file.write(final)


def _header(
    names: Sequence[str], tensors: Tensors, metadata: Mapping[str, str], digest: str
) -> bytes:
    hashes = {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    told = {k: hashes.get(k, v) for k, v in metadata.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **told}}
    position = 0
    for name in names:
        lazy = tensors[name]
        end = position + lazy.dtype.itemsize * prod(lazy.shape)
        entries[name] = {
            "dtype": NAMES[lazy.dtype],
            "shape": list(lazy.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _append(file: BinaryIO, lazy: Lazy, digest: Any) -> None:
    tensor = lazy.read()
    assert tuple(tensor.shape) == lazy.shape and tensor.dtype == lazy.dtype, "as announced"
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    digest.update(data)
    file.write(data)
