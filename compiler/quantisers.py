"""The quantisers of frozen weights, one row of facts each; used by the plan and by the run.

Only the matrices inside the model's blocks are quantised (linear layers and 1x1 convolutions); what
a row says of bytes and errors is of those. Products are computed in the model's own number format:
a weight is turned back when it is needed, in the forward and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from compiler.adapters import ADAPTERS, AdapterKind
from compiler.plan import Device, Dtype, Quantisation

COMPUTE: tuple[Dtype, ...] = ("float32", "bfloat16")
EVERYWHERE: tuple[Device, ...] = ("cpu", "cuda", "mps", "xpu")


@frozen(kw_only=True)
class QuantiserFacts:
    """What must be known of a quantiser before a weight is seen.

    `error` is the root mean square of w' - w over that of w, for normally distributed weights in
    rows of 2048. `traffic` counts what the operations read and write to turn one weight back into
    a 16-bit number.
    """

    name: Quantisation
    title: str
    bits: int  # of a code
    group: int  # weights that share a scale; 0: those of one row (an output channel)
    scale_bytes: int
    error: float
    traffic: float  # bytes moved for one weight, each time that it is used
    cost: str  # in accuracy, for a person
    adapters: tuple[AdapterKind, ...] = tuple(ADAPTERS)  # kinds that train on it
    compute: tuple[Dtype, ...] = COMPUTE
    devices: tuple[Device, ...] = EVERYWHERE

    def weight_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a quantised matrix, its scales included. The last group may be padded."""
        if self.group == 0:
            return rows * (columns * self.bits // 8 + self.scale_bytes)
        groups = -(-rows * columns // self.group)
        return groups * (self.group * self.bits // 8 + self.scale_bytes)

    def bytes_per_weight(self, columns: int) -> float:
        """Bytes of one weight in a large matrix with rows of `columns` weights."""
        return self.bits / 8 + self.scale_bytes / (self.group or columns)

    def relative_time(self, tokens: int, flops_per_byte: float = 200.0) -> float:
        """Time of products with `tokens` vectors a pass, by a model; 1 for plain weights.

        `flops_per_byte` is the device's arithmetic over its memory rate; about 200 for the data
        sheets of current accelerators at 16 bits (H200: 989e12 / 4.8e12). A weight costs 2 tokens
        operations; moving `traffic` bytes takes as long as `traffic * flops_per_byte` of them.
        """
        return 1 + self.traffic * flops_per_byte / (2 * tokens)


_ROWS = (
    # Symmetric, absmax / 127.5 a row, as torchao's int8 weight-only scheme.
    QuantiserFacts(
        name="int8",
        title="8-bit integers",
        bits=8,
        group=0,
        scale_bytes=4,
        error=0.0083,
        traffic=7.0,  # codes to 16 bits (1 + 2), times the scale (2 + 2)
        cost="hardly any: errors of about 0.8 % of a weight",
    ),
    # OCP 8-bit floating point (arXiv 2209.05433), E4M3, absmax / 448 a row.
    QuantiserFacts(
        name="fp8",
        title="8-bit floating point (E4M3)",
        bits=8,
        group=0,
        scale_bytes=4,
        error=0.0265,
        traffic=7.0,
        cost="little: errors of about 2.6 % of a weight, also where rows hold outliers",
        devices=("cpu", "cuda", "xpu"),  # PyTorch has no such type on mps
    ),
    # Groups of 32, scaled so that the weight furthest from zero is -8; scales in bfloat16. The
    # sign of the scale saves the level that a symmetric scheme wastes (error 0.0948 with 7.5).
    QuantiserFacts(
        name="int4",
        title="4-bit integers",
        bits=4,
        group=32,
        scale_bytes=2,
        error=0.0860,
        traffic=12.0,  # three shifts (1 each), interleaved (2), to 16 bits (3), scaled (4)
        cost="some: errors of about 9 % of a weight, which an adapter learns to make up for",
    ),
    # NormalFloat (QLoRA, arXiv 2305.14314, section 3 and appendix E), blocks of 64.
    QuantiserFacts(
        name="nf4",
        title="4-bit NormalFloat",
        bits=4,
        group=64,
        scale_bytes=2,
        error=0.0920,
        traffic=10.5,  # codes to indices (2.5), looked up (4), scaled (4)
        cost="some: errors of about 9 % of a weight, which an adapter learns to make up for",
    ),
)

QUANTISERS: Mapping[Quantisation, QuantiserFacts] = {row.name: row for row in _ROWS}
"""By name; "none" has no row."""
