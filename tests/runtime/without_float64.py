"""A tensor as on devices that have no float64 (Apple's)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


class Without(torch.Tensor):
    """It, and what is computed with it, refuses float64 until it is on the host."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        found = super().__torch_function__(func, types, args, dict(kwargs or {}))
        return found.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else found
