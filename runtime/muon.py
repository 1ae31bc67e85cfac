"""Muon for matrices and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """PyTorch's Muon on parameters of two dimensions, PyTorch's AdamW on the others.

    Muon's orthogonal update is scaled to the root mean square of AdamW's (arXiv 2502.16982), so one
    `lr` and one `weight_decay` serve both. `betas` and `eps` are AdamW's, the rest is Muon's.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, nn.Parameter]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        named = list(params)
        sides: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
        for name, parameter in named:
            sides[parameter.ndim == 2].append((name, parameter))
        self._parts: dict[bool, torch.optim.Optimizer] = {}
        common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        if sides[True]:
            self._parts[True] = torch.optim.Muon(
                sides[True],
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn="match_rms_adamw",
                **common,
            )
        if sides[False]:
            self._parts[False] = torch.optim.AdamW(sides[False], betas=betas, eps=eps, **common)
        groups = [
            {**group, "matrices": matrices}
            for matrices, part in self._parts.items()
            for group in part.param_groups
        ]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of all parameters that have a gradient."""
        found = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            part = self._parts[group["matrices"]]
            part.param_groups, part.state = [group], self.state  # theirs live here, in one state
            part.step()
        return found
