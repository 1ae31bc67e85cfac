"""Numbers as a person reads them: one spelling for the plan, the progress and the report."""

from __future__ import annotations

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def amount(number: int) -> str:
    """A count of parameters with three digits: 8.06B, 124M, 83.8M, 512."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f}{letter}"
    return str(number)


def size(num_bytes: int) -> str:
    """Bytes with a unit: 32.3 GiB, 52.0 MiB, 812 B."""
    for unit, name in _UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"


def in_unit_of(num_bytes: int, whole: int) -> str:
    """Bytes as a bare figure in the unit that `size` takes for `whole`."""
    unit = next((unit for unit, _ in _UNITS if whole >= unit), 1)
    return f"{num_bytes / unit:.1f}" if num_bytes * 20 >= unit else "<0.1"


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 image`, `2,380 samples`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """A time in words: `20 ms`, `0.5 s`, `45 s`, `2 min 5 s`, `1 h 50 min`, `3 d 4 h`."""
    if 0.0005 <= seconds < 0.095:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for big, small, ratio, names in ((86_400, 3600, 24, "d h"), (3600, 60, 60, "h min")):
        if whole >= big:
            parts = divmod(round(whole / small), ratio)
            return _pair(parts, names.split())
    return _pair(divmod(whole, 60), ["min", "s"]) if whole >= 60 else f"{whole} s"


def clock(seconds: float) -> str:
    """A time as a counter shows it: `1:41:40`, `4:07`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(value: float) -> str:
    """A learning rate: `1.0e-04`."""
    return f"{value:.1e}"


def number(value: float) -> str:
    """A setting without noise: `0.0015`, `1e-06`, `24`."""
    return f"{value:g}"


def _pair(parts: tuple[int, int], names: list[str]) -> str:
    big, small = parts
    return f"{big:,} {names[0]}" + (f" {small} {names[1]}" if small else "")
