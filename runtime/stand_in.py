"""What stands for an optimizer in the memory simulation where the real one can't run there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from compiler.optimizers import OPTIMIZERS, OptimizerFacts
from compiler.plan import Dtype, Optimizer
from runtime.errors import MachineUnfit
from runtime.optimizers import make_optimizer

MIN_BLOCKED = 4096  # smaller weights keep their state in full (torchao, bitsandbytes)
DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def simulated(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    device: torch.device,
) -> torch.optim.Optimizer:
    """The plan's optimizer to be run on meta tensors: the real one where it can be.

    One that compiles its step, needs a device of its own, reads values, or is not installed here
    is stood for by its state, from the table.
    """
    facts = OPTIMIZERS[optimizer.name]
    named = list(named_parameters)
    if facts.compiled or facts.reads_values or "cpu" not in facts.devices:
        return StandIn(named, facts)
    try:
        return make_optimizer(optimizer, named, device)
    except MachineUnfit:
        return StandIn(named, facts)


class StandIn(torch.optim.Optimizer):
    """Has the state of `facts` after its first step, and leaves weights alone.

    Its update makes as many copies of a weight at a time as the table says: none for those that
    have one kernel for the whole of it.
    """

    def __init__(self, params: Iterable[tuple[str, nn.Parameter]], facts: OptimizerFacts) -> None:
        self._facts = facts
        super().__init__(list(params), {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Make the state of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                if not self.state[parameter]:
                    self.state[parameter].update(self._state(parameter))
                copies = [torch.empty_like(parameter) for _ in range(self._facts.copies)]
                copies.clear()
        return None if closure is None else closure()

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        facts, count = self._facts, parameter.numel()
        if facts.factored:
            return _factors(parameter)
        number = facts.state_bytes[DTYPES[parameter.dtype]]
        if facts.block and (count < MIN_BLOCKED or count % facts.block):
            number = facts.full_bytes or float(2 * parameter.element_size())
        size = round(number * count)
        return {"bytes": torch.empty(size, dtype=torch.uint8, device=parameter.device)}


def _factors(parameter: Tensor) -> dict[str, Tensor]:
    """(..., rows, columns) -> (..., rows, 1) and (..., 1, columns), or a vector; and the counter,
    which lies on the host whatever device trains."""
    found = {"step": torch.zeros((), device="cpu")}
    if parameter.ndim < 2:
        return {**found, "variance": torch.empty_like(parameter)}
    rows, columns = parameter[..., :1], parameter[..., :1, :]
    return {**found, "row_var": torch.empty_like(rows), "col_var": torch.empty_like(columns)}
