"""What is known of an optimizer before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from attrs import field, frozen

from compiler.plan import Device, Dtype

EVERYWHERE: tuple[Device, ...] = ("cpu", "cuda", "mps", "xpu")

GLOBAL_ESTIMATE = "it estimates its step size from all gradients together"
FACTORS = "it keeps means over the rows and columns of each whole weight"
ON_HOST = "it updates all weights at once, in host memory"


@frozen(kw_only=True)
class OptimizerFacts:
    """One row of the table.

    `defaults` are the arguments besides the learning rate that a plan states, with the values used
    where a recipe gives none; `optional` ones are stated only where a recipe gives them. No others
    may stand in a recipe. `constants` are handed over as they are and are no one's to choose. A
    default is the class's own unless `ours` says why it is not.
    """

    name: str
    title: str
    path: str  # import path of the class
    package: str = ""  # what must be installed besides torch and torchao
    state_bytes: Mapping[Dtype, float]  # on the device, per parameter of a 1,024 x 1,024 weight
    host_bytes: float = 0.0  # of state in host memory, per parameter
    defaults: Mapping[str, Any]
    optional: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(factory=dict)
    ours: Mapping[str, str] = field(factory=dict)
    renamed: Mapping[str, str] = field(factory=dict)  # key of the recipe -> the class's argument
    least: Mapping[str, float] = field(factory=dict)  # bounds that are this row's alone
    most: Mapping[str, float] = field(factory=dict)
    usual_lr: tuple[float, float] = (0.0, 0.1)  # outside of it, a learning rate is a mistake
    devices: tuple[Device, ...] = EVERYWHERE
    fused: tuple[Device, ...] = ()  # devices where `fused=True` exists
    foreach: bool = False  # an accelerator updates many weights at once, at the cost of copies
    compiled: bool = False  # its step is compiled when it first runs: needs a C++ compiler
    block: int = 0  # states are in blocks; in full where a weight is no whole number of them
    full_bytes: float = 0.0  # per parameter of such a weight; 0: two tensors of the weight's type
    reads_values: bool = False  # its step waits for the device, and can't be run on meta tensors
    factored: bool = False
    """Of a weight it keeps a number for each row and one for each column, of a vector all; and a
    counter of its steps on the host."""
    late: int = 1
    """After how many updates one takes as much memory as any: some begin otherwise (measured)."""
    copies: int = 0  # of a weight at a time in the step of one that reads values (measured)
    weights: tuple[Dtype, ...] = ("float32", "bfloat16")  # what it can train
    bf16: Literal["rounds", "kahan", "stochastic"] = "rounds"
    """How an update much smaller than its bfloat16 weight is kept: not at all, in a compensation
    term beside the weight, or on average."""
    averages: bool = False  # schedule-free: what it trains is not what is judged and kept
    whole: str = ""  # why its step reads whole weights, not numbers one by one; "" if it does not
    not_in_backward: str = ""  # why its step can't be taken weight by weight; "" if it can
    shaping: tuple[str, ...] = ()
    """Arguments that decide what it keeps of a weight: its state can't be gone on with under other
    values of them."""
    one_lr: str = ""  # why all weights have one learning rate; "" if they need not
    eight_bit: str = ""  # its sibling that keeps its state in 8 bits

    @property
    def not_by_rows(self) -> str:
        """Why a rank can't update its rows of a weight without the others'; "" if it can."""
        if self.whole:
            return self.whole
        if self.block:
            return "it keeps states in blocks, which rows of weights would cut elsewhere"
        if self.bf16 == "stochastic":
            return "its random roundings would depend on the number of devices"
        return ON_HOST if self.host_bytes else ""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments that a recipe may give, besides `lr`."""
        return (*self.defaults, *self.optional)


def weights_like(states: float) -> dict[Dtype, float]:
    """Bytes of `states` tensors that are kept in the weights' own type."""
    return {"float32": 4.0 * states, "bfloat16": 2.0 * states, "float16": 2.0 * states}


def always(number: float) -> dict[Dtype, float]:
    """`number` bytes whatever the weights' type is."""
    return {"float32": number, "bfloat16": number, "float16": number}


def kahan(states: float) -> dict[Dtype, float]:
    """As `weights_like`, and one more tensor where the weights have 16 bits."""
    return {**weights_like(states + 1), "float32": 4.0 * states}
