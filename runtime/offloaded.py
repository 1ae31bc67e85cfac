"""An optimizer whose state and arithmetic are in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn


@define(kw_only=True, eq=False)
class Mirror:
    """A weight on the device and its copy in host memory, which is what the optimizer steps."""

    here: nn.Parameter  # on the device
    host: nn.Parameter
    seen: int = -1  # autograd's count of in-place changes of `here`, when last copied

    def fetch(self) -> None:
        """Gradient and, where somebody changed it, weight: to the host."""
        gradient = self.here.grad
        self.host.grad = None if gradient is None else gradient.to("cpu", copy=True)
        if self.here._version != self.seen:
            self.host.copy_(self.here)

    def put(self) -> None:
        """The stepped weight: back to the device."""
        if self.host.grad is not None:
            self.here.copy_(self.host)
            self.host.grad = None
        self.seen = self.here._version


class HostAdamW(torch.optim.Optimizer):
    """AdamW that keeps its moments, and computes, in host memory: 0 bytes of state on the device.

    Rajbhandari et al., "ZeRO-Offload", arXiv 2101.06840. Each step moves gradients to the host and
    weights back; the numbers are those of `torch.optim.AdamW` on the processor, bit for bit.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, nn.Parameter]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        named = list(params)
        self._mirrors: list[Mirror] = []
        self._host: torch.optim.Optimizer | None = None
        super().__init__(
            named, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        if any(parameter.is_meta for _, parameter in named):
            return  # a simulation of the device's memory: there is nothing on it
        for group in self.param_groups:
            for parameter in group["params"]:
                host = nn.Parameter(parameter.detach().to("cpu", copy=True))
                self._mirrors.append(Mirror(here=parameter, host=host))
        hosts = [mirror.host for mirror in self._mirrors]
        self._host = torch.optim.AdamW(
            hosts, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of all parameters that have a gradient."""
        found = None if closure is None else torch.enable_grad()(closure)()
        if self._host is None:
            return found
        for mirror in self._mirrors:
            mirror.fetch()
        (group,) = self.param_groups
        self._host.param_groups[0]["lr"] = group["lr"]
        self._host.step()
        for mirror in self._mirrors:
            mirror.put()
        return found

    def state_dict(self) -> dict[str, Any]:
        """The host optimizer's state, under this one's numbers: the parameters are in one order."""
        found: dict[str, Any] = super().state_dict()
        if self._host is not None:
            found["state"] = self._host.state_dict()["state"]
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; the tensors go to host memory."""
        super().load_state_dict({**state_dict, "state": {}})
        if self._host is not None:
            theirs = {**self._host.state_dict(), "state": state_dict["state"]}
            self._host.load_state_dict(theirs)

    @property
    def host_tensors(self) -> list[Tensor]:
        """What this keeps in host memory."""
        states = self._host.state.values() if self._host is not None else ()
        kept = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return [*(mirror.host for mirror in self._mirrors), *kept]
