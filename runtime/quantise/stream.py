"""Loads a component from its safetensors files one tensor at a time, quantising as it goes.

Neither the host nor the device ever holds the whole of the plain weights. The result is bit for bit
that of loading all of them and quantising then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compiler.plan import Quantisation
from runtime.quantise.layers import Quantised, hollow

Shapes = dict[str, tuple[int, ...]]


def stream(
    make: Callable[[], nn.Module],
    files: Sequence[Path],
    dtype: torch.dtype,
    device: torch.device,
    kind: Quantisation,
    *,
    on: torch.device,
) -> nn.Module | None:
    """A component with the weights in `files`, as `dtype` on `device`; quantised ones in codes.

    `make` builds it; its own weights are never allocated. Weights are quantised on `on`. None if
    the files' names and shapes are not exactly the component's own: the library that wrote them
    then has to translate them.
    """
    shell = _shell(make, dtype)
    tied = getattr(shell, "all_tied_weights_keys", None) or {}
    expected = {name: tuple(value.shape) for name, value in shell.state_dict().items()}
    if _without(expected, tied) != _without(_shapes(files), tied):
        return None
    if kind != "none":
        hollow(shell, kind, torch.device("meta"))
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                if name not in tied:
                    _put(shell, name, opened.get_tensor(name), dtype, device, on)
    if tied:
        shell.tie_weights()  # type: ignore[operator]
    return shell.to(device=device).eval()


def _shell(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The component with its parameters on the meta device; what it computes for itself is real."""
    from accelerate import init_empty_weights

    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as the libraries' own loaders do
    try:
        with init_empty_weights(include_buffers=False):
            return make()
    finally:
        torch.set_default_dtype(usual)


def _shapes(files: Sequence[Path]) -> Shapes:
    """Names and shapes of all tensors in `files`, from their headers."""
    found: Shapes = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found[name] = tuple(opened.get_slice(name).get_shape())
    return found


def _without(shapes: Shapes, tied: dict[str, str]) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name not in tied}


@torch.no_grad()
def _put(
    model: nn.Module,
    name: str,
    value: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    on: torch.device,
) -> None:
    """Set one tensor of `model`.

    On the CPU, in the file's own format, it stays in the mapped file, as the libraries' loaders
    have it: read when it is needed, private to this process, and at the same addresses modulo a
    cache line, on which the last bits of products depend.
    """
    owner_name, _, key = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    wanted = dtype if value.is_floating_point() else value.dtype
    if isinstance(owner, Quantised) and key == "weight":
        owner.take(value.to(device=on, dtype=wanted), device)
        return
    placed = value.to(device=device, dtype=wanted)
    if key in owner._buffers:
        owner._buffers[key] = placed
        return
    there: Any = owner._parameters[key]
    owner._parameters[key] = nn.Parameter(placed, requires_grad=there.requires_grad)
