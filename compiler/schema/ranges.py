"""Types that many keys share: what a number may be, or a word."""

from __future__ import annotations

from typing import Annotated, Literal

from compiler.structure import Range

Auto = Literal["auto"]
Count = Annotated[int, Range(ge=0, le=1_000_000)]
Seed = Annotated[int, Range(ge=0, le=2**62)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
LEAST_SHIFT, MOST_SHIFT = 0.001, 1_000
Shift = Annotated[float, Range(ge=LEAST_SHIFT, le=MOST_SHIFT)]
Mean = Annotated[float, Range(ge=-100, le=100)]
Rate = Annotated[float, Range(ge=0, lt=1)]
Beta = Rate
Probability = Annotated[float, Range(ge=0, le=1)]
BatchSize = Annotated[int, Range(ge=1, le=65_536)]
Format = Literal["bf16", "fp16", "fp32"]
