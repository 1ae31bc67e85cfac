"""Fused backward: each weight is updated as soon as its gradient is complete.

The gradient is dropped at once, so that all gradients are never there together: the peak of a full
fine-tune falls by almost the size of its trained weights. The weights are those of the ordinary
step, bit for bit, because an update of one weight reads no other. (Lv et al., "Full parameter
fine-tuning for large language models with limited resources", arXiv 2306.09782.)

What can't go with it is refused when the plan is made (`compiler.passes.fused`).

Numbers that are not finite: the loss is judged before the backward pass, and where it is not finite
nothing is updated. A gradient is judged before its weight is updated. From the first one that is
not finite no further weight is updated in this step; those before it in the backward pass have
been, with finite gradients. The step then fails as a whole (the logged norm is not finite) and the
last checkpoint is what counts: a run never goes on from such a step, nor saves it. On an
accelerator this holds without waiting for the device where the optimizer has a fused kernel;
elsewhere the norm is read at the end of the step, and weights after the first bad gradient may be
spoiled too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FusedBackward:
    """Hooks on a model's trained parameters that step `optimizer`, one parameter at a time.

    `trainable` are what the optimizer updates, by the names that the model's own parameters have
    (the masters, where there are some; see `runtime.methods.base`). For each step: `begin` between
    the forward and the backward pass, then `finish`. `copies` are the parameters that compute, by
    those names, where not all are the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        copies: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._norms: list[Tensor | None] = [None] * len(trainable)
        self._start: list[dict[str, Any]] = []
        self._failed: Tensor | None = None  # on an accelerator: 1 from the first bad number on
        self._stopped = False  # on the processor: the same
        groups = {
            id(p): number
            for number, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        }
        own = dict(model.named_parameters()) if copies is None else copies
        self._handles = [
            own[name].register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._hook(number, parameter, groups[id(parameter)])
            )
            for number, (name, parameter) in enumerate(trainable.items())
        ]

    def begin(self, losses: Tensor) -> None:
        """Ready for a backward pass. `losses` (B,) are its samples': not finite, nothing moves."""
        self._norms = [None] * len(self._norms)
        self._start = [_copied(group) for group in self._optimizer.param_groups]
        finite = torch.isfinite(losses).all()
        if self._by_flag(losses):
            self._failed = (~finite).float()
        elif not losses.is_meta:
            self._stopped = not finite.item()

    def idle(self) -> list[bool]:
        """Of each trained parameter, whether the backward pass gave it no gradient; asked before
        `finish`."""
        return [norm is None for norm in self._norms]

    def finish(self) -> Tensor:
        """L2 norm over all gradients of the backward pass together, float32, as `gradient_norm`."""
        norms = [norm for norm in self._norms if norm is not None]
        self._norms = [None] * len(self._norms)
        self._failed = None
        return total_norm(norms)

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, number: int, parameter: nn.Parameter, group: int) -> object:
        def hook(_: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None, "handed over by the hook that was there before"
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            self._norms[number] = norm
            if self._may_step(norm):
                self._step(parameter, group)
            parameter.grad = None

        return hook

    def _by_flag(self, tensor: Tensor) -> bool:
        """Whether the optimizer is told on the device whether to update (`found_inf`)."""
        return tensor.device.type != "cpu" and bool(self._optimizer.param_groups[0].get("fused"))

    def _may_step(self, norm: Tensor) -> bool:
        if self._failed is not None:
            self._failed = torch.maximum(self._failed, (~torch.isfinite(norm)).float())
            self._optimizer.grad_scale = None  # type: ignore[attr-defined]
            self._optimizer.found_inf = self._failed  # type: ignore[attr-defined]
            return True
        if norm.device.type == "cpu" and not torch.isfinite(norm).item():
            self._stopped = True
        return not self._stopped

    def _step(self, parameter: nn.Parameter, number: int) -> None:
        """The optimizer's own step, with nothing but `parameter` in sight.

        Some optimizers count their steps in the group, not in each parameter's state: the group is
        what it was before the step for each of its parameters in turn.
        """
        groups = self._optimizer.param_groups
        group, start = groups[number], self._start[number]
        group.clear()
        group.update(_copied(start), params=[parameter])
        self._optimizer.param_groups = [group]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups, group["params"] = groups, start["params"]


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients of which `norms` are each one's own, float32."""
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return total


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group whose counters can change without changing `group`'s."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items()}
