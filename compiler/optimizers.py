"""The optimizers, one row of facts each; used by the plan (memory, checks) and by the run.

A row is all that a new optimizer needs here: its class, the package that holds it, what it keeps
per parameter and which arguments it takes. State bytes were measured (weights of 1e6 elements).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from compiler.plan import Device, Dtype

EVERYWHERE: tuple[Device, ...] = ("cpu", "cuda", "mps", "xpu")


@frozen(kw_only=True)
class OptimizerFacts:
    """What must be known of an optimizer before it is built.

    `defaults` are all arguments besides the learning rate that a plan states, with the values used
    where a recipe gives none; their names are the only ones a recipe may give. `constants` are
    handed over as they are and are no one's to choose.
    """

    name: str
    title: str
    path: str  # import path of the class
    extra: str  # package that must be installed besides torch; "" for none
    state_bytes: Mapping[Dtype, float]  # per trained parameter, by the trained weights' type
    defaults: Mapping[str, Any]
    devices: tuple[Device, ...] = EVERYWHERE
    fused: tuple[Device, ...] = ()  # devices where `fused=True` exists
    constants: Mapping[str, Any] = field(factory=dict)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments that a recipe may give, besides `lr`."""
        return tuple(self.defaults)


def _by_weight(states: int) -> dict[Dtype, float]:
    """Bytes of `states` tensors that are kept in the weights' own type."""
    return {"float32": 4.0 * states, "bfloat16": 2.0 * states, "float16": 2.0 * states}


_ROWS = (
    # Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv 1711.05101.
    OptimizerFacts(
        name="adamw",
        title="AdamW",
        path="torch.optim.AdamW",
        extra="",
        state_bytes=_by_weight(2),
        defaults={"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
        fused=("cpu", "cuda", "mps", "xpu"),
    ),
    # Kingma and Ba, "Adam", arXiv 1412.6980; weight decay is added to the gradient here.
    OptimizerFacts(
        name="adam",
        title="Adam",
        path="torch.optim.Adam",
        extra="",
        state_bytes=_by_weight(2),
        defaults={"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        fused=("cpu", "cuda", "mps", "xpu"),
    ),
    # Liu et al., "On the variance of the adaptive learning rate and beyond", arXiv 1908.03265.
    OptimizerFacts(
        name="radam",
        title="RAdam",
        path="torch.optim.RAdam",
        extra="",
        state_bytes=_by_weight(2),
        defaults={"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        constants={"decoupled_weight_decay": True},
    ),
    OptimizerFacts(
        name="sgd",
        title="SGD with momentum",
        path="torch.optim.SGD",
        extra="",
        state_bytes=_by_weight(1),
        defaults={"momentum": 0.9, "weight_decay": 0.0},
        fused=("cpu", "cuda", "mps", "xpu"),
    ),
)

OPTIMIZERS: Mapping[str, OptimizerFacts] = {row.name: row for row in _ROWS}


def state_bytes(name: str, trained: Dtype, parameters: int) -> int:
    """Bytes of optimizer state for `parameters` trained parameters. KeyError: no such optimizer."""
    return round(OPTIMIZERS[name].state_bytes[trained] * parameters)
