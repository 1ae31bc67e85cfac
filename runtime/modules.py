"""A model's blocks, by the names that its family's card gives."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn


def blocks_of(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The blocks of `model` in its own order: those in module lists of these names, and modules
    whose names match these patterns in full. Raises ValueError for a pattern that matches none."""
    found: list[nn.Module] = []
    for name in names:
        listed = getattr(model, name, None) if name.isidentifier() else None
        if isinstance(listed, nn.ModuleList):
            found += listed
            continue
        blocks = [module for path, module in model.named_modules() if re.fullmatch(name, path)]
        if not blocks:
            raise ValueError(f"{type(model).__name__} has no blocks called `{name}`")
        found += blocks
    return found
