"""A small recipe language for the tests of the compiler's base; not the real schema."""

import enum
from typing import Annotated, ClassVar, Literal

from attrs import field, frozen

from compiler.structure import Length, Range
from compiler.units import ByteSize, Interval, Share

PositiveInt = Annotated[int, Range(ge=1)]


class Mode(enum.Enum):
    """How it runs."""

    QUICK = "quick"
    EXACT = "exact"


@frozen(kw_only=True)
class Lora:
    """Low-rank adaptation."""

    kind: Literal["lora"]
    """Low-rank."""
    rank: PositiveInt
    """Rank of the update."""
    alpha: Annotated[float, Range(gt=0)] | Literal["auto"] = "auto"
    """Scale; "auto" is the rank."""
    targets: tuple[str, ...] = ()
    """Module name patterns."""


@frozen(kw_only=True)
class Lokr:
    """Kronecker products."""

    kind: Literal["lokr"]
    factor: int = field(default=8, metadata={"doc": "Size of a block.", "unit": "rows"})


@frozen(kw_only=True)
class Optimizer:
    """Optimizer."""

    __shorthand__: ClassVar[str] = "name"

    name: Literal["adamw", "lion"] = "adamw"
    lr: Annotated[float, Range(gt=0, le=1)] = field(
        default=1e-4, metadata={"synonyms": ("learning_rate",)}
    )
    fused: bool = False


@frozen(kw_only=True)
class Captions:
    """Captions."""

    source: Literal["textfile", "filename"] = field(default="textfile", metadata={"key": "from"})
    dropout: Annotated[float, Range(ge=0, le=1)] = 0.0


@frozen(kw_only=True)
class DataSource:
    """A folder of images."""

    path: str
    id: str
    repeats: float = 1.0
    size: tuple[int, int] = (512, 512)
    captions: Captions | None = None


@frozen(kw_only=True)
class Model:
    """The base model."""

    family: Literal["sd3", "flux1", "sana"]
    base: str


@frozen(kw_only=True)
class Train:
    """How to train."""

    steps: PositiveInt | None = None
    optimizer: Optimizer = field(factory=Optimizer)
    batch_size: PositiveInt | dict[int, PositiveInt] = 1
    mode: Mode = Mode.EXACT
    every: Interval = field(factory=lambda: Interval.parse("1 epoch"))
    warmup: Share | Literal["none"] = "none"
    budget: ByteSize | Literal["auto", "none"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    prompts: dict[str, str] = field(factory=dict)
    limit: Annotated[float, Range(nonfinite=True)] = 0.0


@frozen(kw_only=True)
class Recipe:
    """A recipe."""

    schema: Literal[1]
    """Version of the language."""
    model: Model
    adapter: Lora | Lokr | None = None
    source: Annotated[tuple[DataSource, ...], Length(ge=1)] = field()
    train: Train = field(factory=Train)


GOOD = """\
schema = 1

[model]
family = "sd3"            # the family
base = 'stabilityai/sd3'

[adapter]
kind = "lora"
rank = 16
targets = ["attn", "ff"]

[[source]]
id = "subject"
path = "datasets/a"
repeats = 2.5
captions = { from = "textfile", dropout = 0.1 }

[[source]]
id = "reg"
path = "datasets/b"
size = [
    512,
    768,
]

[train]
steps = 400
optimizer = { name = "adamw", lr = 1.5e-3 }
batch_size = { 512 = 4, 1024 = 1 }
every = "200 steps"
warmup = "10%"
budget = "24 GiB"
prompts.portrait = \"\"\"
a \\"wide\\" view\"\"\"
"""
