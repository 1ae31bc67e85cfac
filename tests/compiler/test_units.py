"""Quantities: what they mean, how they print, and what is refused with which words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.units import ByteSize, Duration, Interval, Share

HOSTILE = [
    "",
    "   ",
    "-1 steps",
    "1e400 steps",
    "inf steps",
    "nan steps",
    "\u0664\u0660\u0660 steps",
    "\uff14 GiB",
    "9" * 5000 + " steps",
    "1." + "0" * 5000 + " GiB",
    "0x10 steps",
    "1,000 steps",
    "steps",
    "400 steps 3",
    "400\x00steps",
    "400 bananas",
    "1 2 steps",
    ".5 h",
    "%",
    400,
    400.0,
    -3,
    float("inf"),
    float("nan"),
    1e300,
    2**63,
]


@pytest.mark.parametrize(
    ("text", "steps", "epochs", "seconds", "spelled"),
    [
        ("400 steps", 400, None, None, "400 steps"),
        ("1 step", 1, None, None, "1 step"),
        ("1steps", 1, None, None, "1 step"),
        ("1_000 steps", 1000, None, None, "1000 steps"),
        ("400.0 steps", 400, None, None, "400 steps"),
        ("1 epoch", None, 1, None, "1 epoch"),
        ("0.5 epochs", None, 0.5, None, "0.5 epochs"),
        ("30 min", None, None, 1800, "30 min"),
        ("2 h", None, None, 7200, "2 h"),
        ("1.5 hours", None, None, 5400, "1.5 h"),
        ("90 s", None, None, 90, "90 s"),
        ("off", None, None, None, "off"),
    ],
)
def test_interval(
    text: str, steps: int | None, epochs: float | None, seconds: float | None, spelled: str
) -> None:
    interval = Interval.parse(text)
    assert (interval.steps, interval.epochs, interval.seconds) == (steps, epochs, seconds)
    assert interval.is_off == (text == "off")
    assert str(interval) == spelled
    assert Interval.parse(str(interval)) == interval


@pytest.mark.parametrize(
    ("text", "of_24000", "spelled"),
    [
        ("10%", 2400, "10%"),
        ("10 %", 2400, "10%"),
        ("2400 steps", 2400, "2400 steps"),
        ("0%", 0, "0%"),
        ("0 steps", 0, "0 steps"),
        ("100%", 24000, "100%"),
        ("0.1%", 24, "0.1%"),
        ("33.3%", 7992, "33.3%"),
    ],
)
def test_share(text: str, of_24000: int, spelled: str) -> None:
    share = Share.parse(text)
    assert share.of(24000) == of_24000
    assert str(share) == spelled
    assert Share.parse(str(share)) == share


@pytest.mark.parametrize(
    ("text", "count", "spelled"),
    [
        ("24 GiB", 24 * 2**30, "24 GiB"),
        ("24GiB", 24 * 2**30, "24 GiB"),
        ("8 GB", 8 * 10**9, "8 GB"),
        ("512 MiB", 512 * 2**20, "512 MiB"),
        ("1024 MiB", 2**30, "1 GiB"),
        ("1.5 GiB", 3 * 2**29, "1536 MiB"),
        ("0.1 GiB", 107374182, "107374182 B"),
        ("1 B", 1, "1 B"),
        ("7 kB", 7000, "7 kB"),
    ],
)
def test_byte_size(text: str, count: int, spelled: str) -> None:
    size = ByteSize.parse(text)
    assert (size.bytes, int(size), str(size)) == (count, count, spelled)
    assert ByteSize.parse(str(size)) == size


def test_duration() -> None:
    assert Duration.parse("30 min").seconds == 1800
    assert Duration.parse("1 day").seconds == 86_400
    assert str(Duration.parse("2 hours")) == "2 h"


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Interval, "400", "`400` has no unit: say `400 steps`"),
        (Interval, 400, "`400` has no unit: say `400 steps`"),
        (Interval, "0 steps", "`0 steps` is no interval: say `off` for never"),
        (Interval, "-5 steps", "`-5 steps` is negative"),
        (Interval, "2.5 steps", "`2.5 steps` is not a whole number of steps"),
        (Interval, "3 Steps", "`3 Steps` has an unknown unit: say `3 steps`"),
        (Interval, "10%", "`10%` has an unknown unit: the unit is `steps`, `epochs`, `min` or `h`"),
        (Interval, "never", "`never` is not a number with a unit: the unit is `steps`, `epochs`,"
         " `min` or `h`"),
        (Interval, "99999999999999 steps",
         "`99999999999999 steps` is more than 1000000000000 steps"),
        (Interval, "99999999 h", "`99999999 h` is more than ten years"),
        (Share, "0.1", "`0.1` has no unit: say `10%`"),
        (Share, 2400, "`2400` has no unit: say `2400 steps`"),
        (Interval, 0.5, "`0.5` has no unit: say `0.5 epochs`"),
        (Share, "101%", "`101%` is more than the whole: say at most `100%`"),
        (Share, "1 epoch", "`1 epoch` has an unknown unit: the unit is `%` or `steps`"),
        (ByteSize, "24G", "`24G` has an unknown unit: say `24 GiB` (1024) or `24 GB` (1000)"),
        (ByteSize, "24k", "`24k` has an unknown unit: say `24 KiB` (1024) or `24 kB` (1000)"),
        (ByteSize, "24 gib", "`24 gib` has an unknown unit: say `24 GiB`"),
        (ByteSize, 24, "`24` has no unit: say `24 GiB`"),
        (Interval, 0, "`0` is no interval: say `off` for never"),
        (Share, 0, "`0` has no unit: say `0 steps`"),
        (Share, "0.0", "`0.0` has no unit: say `0%`"),
        *(
            (ByteSize, zero, f'`{zero}` is nothing: a size is at least `1 B`; for no budget write '
             '"none"')
            for zero in ("0 GiB", 0, "0", "0.1 B")
        ),
        (ByteSize, "0 bananas",
         "`0 bananas` has an unknown unit: the unit is `GiB`, `MiB`, `GB` or `MB`"),
        (ByteSize, "9999999 TiB", "`9999999 TiB` is more than any machine has"),
        (Duration, "0 s", "`0 s` is no time: it must be more than 0"),
        (Duration, "0", "`0` is no time: it must be more than 0"),
        (Duration, "", "an empty string is no quantity: say `1 min`; the unit is `s`, `min`, `h`"
         " or `d`"),
        (Duration, "1" * 30 + " s", "`" + "1" * 30 + " s` has too many digits"),
    ],
)  # fmt: skip
def test_messages(kind: type[Interval], value: str | int, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        kind.parse(value)
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", [Interval, Share, ByteSize, Duration])
@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_are_refused(kind: type[Interval], value: str | float) -> None:
    with pytest.raises(ValueError) as caught:
        kind.parse(value)
    assert len(str(caught.value)) < 200


@given(st.integers(1, 10**12))
def test_steps_round_trip(steps: int) -> None:
    assert Interval.parse(str(Interval.parse(f"{steps} steps"))).steps == steps


@given(st.integers(1, 2**60))
def test_bytes_round_trip(count: int) -> None:
    assert ByteSize.parse(str(ByteSize(bytes=count))).bytes == count


@given(st.decimals(0, 100, places=6), st.integers(0, 10**9))
def test_share_is_exact(percent: object, total: int) -> None:
    share = Share.parse(f"{percent:f}%")
    assert Share.parse(str(share)) == share
    assert 0 <= share.of(total) <= total


@given(st.text(max_size=20))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for kind in (Interval, Share, ByteSize, Duration):
        try:
            value = kind.parse(text)
        except ValueError as error:
            assert str(error)
        else:
            assert kind.parse(str(value)) == value
