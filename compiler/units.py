"""Quantities that carry their unit in the text: `400 steps`, `10%`, `24 GiB`, `30 min`.

Each type has `parse` (raises UnitError with a sentence for the user), a `str` that parses back
to an equal value, and, for `compiler.structure`, the class facts `expects`, `examples`, `code`.
A bare number has no unit and is always refused.
"""

import re
from decimal import Decimal
from fractions import Fraction
from typing import ClassVar, Literal, NamedTuple, Self

import attrs

MAX_BYTES = 2**60
MAX_STEPS = 10**12
MAX_EPOCHS = 10**6
MAX_SECONDS = 10 * 366 * 86_400  # ten years
_QUANTITY = re.compile(
    r"(?P<number>[+-]?[0-9][0-9_]*(?:\.[0-9][0-9_]*)?)\s*(?P<unit>[A-Za-z%]*)", re.A
)
_MAX_DIGITS = 20
_MAX_SHOWN = 40

TimeUnit = Literal["s", "min", "h", "d"]
_SECONDS: dict[str, int] = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
_TIME_WORDS: dict[str, str] = {
    word: unit
    for unit, words in {
        "s": ("s", "sec", "second", "seconds"),
        "min": ("min", "mins", "minute", "minutes"),
        "h": ("h", "hour", "hours"),
        "d": ("d", "day", "days"),
    }.items()
    for word in words
}
_STEP_WORDS = {"step": "steps", "steps": "steps"}
_EPOCH_WORDS = {"epoch": "epochs", "epochs": "epochs"}
_BYTES: dict[str, int] = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


class UnitError(ValueError):
    """A text is not a quantity; `message` says why, `advice` what to write instead."""

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(f"{message}: {advice}" if advice else message)
        self.message = message
        self.advice = advice


class _Quantity(NamedTuple):
    amount: Fraction
    unit: str
    text: str


@attrs.frozen(kw_only=True)
class Interval:
    """How often something happens: every so many steps, epochs or minutes, or never (`off`)."""

    amount: float
    """A whole number of steps; epochs and times may have fractions. 0 for `off`."""
    unit: Literal["steps", "epochs", "s", "min", "h", "d", "off"]

    expects: ClassVar[str] = "an interval such as `400 steps`, `1 epoch`, `30 min` or `off`"
    examples: ClassVar[tuple[str, ...]] = ("400 steps", "1 epoch", "30 min", "2 h", "off")
    code: ClassVar[str] = "bad-unit"

    @classmethod
    def parse(cls, value: str | float) -> Self:
        """Interval from its text; raises UnitError with a sentence for the user."""
        if isinstance(value, str) and value.strip() == "off":
            return cls(amount=0, unit="off")
        units = _STEP_WORDS | _EPOCH_WORDS | _TIME_WORDS
        nothing = ("is no interval", "say `off` for never")
        found = _quantity(value, units, "steps", "`steps`, `epochs`, `min` or `h`", nothing)
        unit = units[found.unit]
        _bounded(found, unit)
        return cls(amount=_number(found), unit=unit)  # type: ignore[arg-type]

    @property
    def is_off(self) -> bool:
        """Whether it never happens."""
        return self.unit == "off"

    @property
    def steps(self) -> int | None:
        """Optimizer steps, where the interval is counted in steps."""
        return int(self.amount) if self.unit == "steps" else None

    @property
    def epochs(self) -> float | None:
        """Epochs, where the interval is counted in epochs."""
        return self.amount if self.unit == "epochs" else None

    @property
    def seconds(self) -> float | None:
        """Seconds, where the interval is a time."""
        return self.amount * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def __str__(self) -> str:
        return "off" if self.is_off else _spell(self.amount, self.unit)


@attrs.frozen(kw_only=True)
class Share:
    """A part of a run: a percentage of its steps, or a number of steps."""

    amount: float
    unit: Literal["%", "steps"]

    expects: ClassVar[str] = "a share such as `10%` or `2400 steps`"
    examples: ClassVar[tuple[str, ...]] = ("10%", "2400 steps")
    code: ClassVar[str] = "bad-unit"

    @classmethod
    def parse(cls, value: str | float) -> Self:
        """Share from its text; raises UnitError with a sentence for the user."""
        units = _STEP_WORDS | {"%": "%", "percent": "%"}
        found = _quantity(value, units, "steps", "`%` or `steps`")
        unit = units[found.unit]
        if unit == "%" and found.amount > 100:
            raise UnitError(f"`{found.text}` is more than the whole", "say at most `100%`")
        _bounded(found, unit)
        return cls(amount=_number(found), unit=unit)  # type: ignore[arg-type]

    def of(self, total: int) -> int:
        """Steps of a run of `total` steps, rounded down; may exceed it when given in steps."""
        if self.unit == "steps":
            return int(self.amount)
        return int(total * Fraction(str(self.amount)) / 100)

    def __str__(self) -> str:
        return f"{_plain(self.amount)}%" if self.unit == "%" else _spell(self.amount, "steps")


@attrs.frozen(kw_only=True)
class ByteSize:
    """An amount of memory or disk in bytes."""

    bytes: int

    expects: ClassVar[str] = "a size such as `24 GiB`, `8 GB` or `512 MiB`"
    examples: ClassVar[tuple[str, ...]] = ("24 GiB", "8 GB", "512 MiB")
    code: ClassVar[str] = "bad-unit"

    @classmethod
    def parse(cls, value: str | float) -> Self:
        """Size from its text; raises UnitError with a sentence for the user."""
        nothing = ("is nothing", 'a size is at least `1 B`; for no budget write "none"')
        found = _quantity(value, _BYTES, "GiB", "`GiB`, `MiB`, `GB` or `MB`", nothing)
        count = int(found.amount * _BYTES[found.unit])
        if count == 0:
            raise UnitError(f"`{found.text}` {nothing[0]}", nothing[1])
        if count > MAX_BYTES:
            raise UnitError(f"`{found.text}` is more than any machine has")
        return cls(bytes=count)

    def __int__(self) -> int:
        return self.bytes

    def __str__(self) -> str:
        counts = [
            (self.bytes // size, unit) for unit, size in _BYTES.items() if not self.bytes % size
        ]
        count, unit = min(counts)
        return f"{count} {unit}"


@attrs.frozen(kw_only=True)
class Duration:
    """A length of time."""

    amount: float
    unit: TimeUnit

    expects: ClassVar[str] = "a time such as `90 s`, `30 min` or `2 h`"
    examples: ClassVar[tuple[str, ...]] = ("90 s", "30 min", "2 h")
    code: ClassVar[str] = "bad-unit"

    @classmethod
    def parse(cls, value: str | float) -> Self:
        """Duration from its text; raises UnitError with a sentence for the user."""
        nothing = ("is no time", "it must be more than 0")
        found = _quantity(value, _TIME_WORDS, "min", "`s`, `min`, `h` or `d`", nothing)
        unit = _TIME_WORDS[found.unit]
        _bounded(found, unit)
        return cls(amount=_number(found), unit=unit)  # type: ignore[arg-type]

    @property
    def seconds(self) -> float:
        """The same in seconds."""
        return self.amount * _SECONDS[self.unit]

    def __str__(self) -> str:
        return _spell(self.amount, self.unit)


def _quantity(
    value: str | float,
    units: dict[str, str] | dict[str, int],
    usual: str,
    known: str,
    nothing: tuple[str, str] | None = None,
) -> _Quantity:
    """Number and unit of a text; UnitError says what is wrong with either.

    `nothing`: words and advice on 0, with a unit or without, where that is refused.
    """
    text = value.strip() if isinstance(value, str) else str(value)
    clipped = _clip(text)
    if not text:
        raise UnitError("an empty string is no quantity", f"say `1 {usual}`; the unit is {known}")
    match = _QUANTITY.fullmatch(text)
    if match is None:
        advice = f"say `1 {text}`" if text in units and text != "%" else f"the unit is {known}"
        raise UnitError(f"`{clipped}` is not a number with a unit", advice)
    number, unit = match["number"], match["unit"]
    if len(number) > _MAX_DIGITS:
        raise UnitError(f"`{clipped}` has too many digits")
    if number.startswith("-"):
        raise UnitError(f"`{clipped}` is negative")
    amount = Fraction(number.replace("_", ""))
    if nothing and not amount and (not unit or unit in units):
        raise UnitError(f"`{clipped}` {nothing[0]}", nothing[1])
    if not unit:
        raise UnitError(f"`{clipped}` has no unit", _bare_hint(number, units, usual))
    if unit not in units:
        hint = _unit_hint(number, unit, units, known)
        raise UnitError(f"`{clipped}` has an unknown unit", hint)
    return _Quantity(amount=amount, unit=unit, text=clipped)


def _bare_hint(number: str, units: dict[str, str] | dict[str, int], usual: str) -> str:
    """What a number without unit most likely meant."""
    if "." in number and "%" in units and float(number) <= 1:
        return f"say `{_plain(float(Fraction(number.replace('_', '')) * 100))}%`"
    word = "epochs" if "." in number and "epochs" in units else usual
    return f"say `{number} {word}`"


def _unit_hint(number: str, unit: str, units: dict[str, str] | dict[str, int], known: str) -> str:
    if "GiB" in units and unit.upper() in ("K", "M", "G", "T"):
        big = unit.upper()
        return f"say `{number} {big}iB` (1024) or `{number} {'k' if big == 'K' else big}B` (1000)"
    same = [word for word in units if word.lower() == unit.lower()]
    return f"say `{number} {same[0]}`" if same else f"the unit is {known}"


def _bounded(found: _Quantity, unit: str) -> None:
    if unit == "steps" and found.amount.denominator != 1:
        raise UnitError(f"`{found.text}` is not a whole number of steps")
    if unit == "steps" and found.amount > MAX_STEPS:
        raise UnitError(f"`{found.text}` is more than {MAX_STEPS} steps")
    if unit == "epochs" and found.amount > MAX_EPOCHS:
        raise UnitError(f"`{found.text}` is more than {MAX_EPOCHS} epochs")
    if unit in _SECONDS and found.amount * _SECONDS[unit] > MAX_SECONDS:
        raise UnitError(f"`{found.text}` is more than ten years")


def _number(found: _Quantity) -> float:
    return int(found.amount) if found.amount.denominator == 1 else float(found.amount)


def _plain(amount: float) -> str:
    """A number without an exponent, as short as it can be."""
    return f"{Decimal(repr(amount)):f}".removesuffix(".0")


def _spell(amount: float, unit: str) -> str:
    word = unit[:-1] if amount == 1 and unit in ("steps", "epochs") else unit
    return f"{_plain(amount)} {word}"


def _clip(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
