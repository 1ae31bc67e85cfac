"""The header of a safetensors file: names and shapes, without reading a tensor.

Eight bytes with the length of a JSON text, then the text (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from attrs import frozen

LIMIT = 100 * 2**20  # bytes; a header is never longer


@frozen(kw_only=True)
class Header:
    """What a file says of its tensors."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    text: bytes  # as it stands in the file


def header_of(path: Path) -> Header | None:
    """The header of the file at `path`; None if it is no such file, or has no good header."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LIMIT:
                return None
            text = file.read(length)
        found = json.loads(text)
        entries = {name: tuple(e["shape"]) for name, e in found.items() if name != "__metadata__"}
        metadata = {str(k): str(v) for k, v in found.get("__metadata__", {}).items()}
    except (OSError, ValueError, RecursionError, struct.error, AttributeError):
        return None
    except (KeyError, TypeError):
        return None
    if not all(type(size) is int and size >= 0 for shape in entries.values() for size in shape):
        return None
    return Header(shapes=entries, metadata=metadata, text=text)
