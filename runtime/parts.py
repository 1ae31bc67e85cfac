"""Parts of a CUDA device that is divided up (MIG), as nvidia-smi tells of them. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from attrs import frozen

ON = "Enabled"  # what nvidia-smi says of a divided device
PREFIX = "MIG-"  # how a part's UUID begins
_CARD = re.compile(r"GPU \d+: .*\(UUID: ([^)]+)\)")
_PART = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: ([^)]+)\)")


@frozen(kw_only=True)
class Part:
    """One part, which CUDA counts as a device. Bytes are 0 where they are not told."""

    card: str  # UUID of the whole device
    uuid: str
    profile: str  # sevenths of the processors, and nominal memory: "3g.40gb"
    total_bytes: int
    free_bytes: int


def parts_of(listed: str, told: str) -> list[Part]:
    """All parts in CUDA's order, from what `nvidia-smi -L` and `nvidia-smi -q -x` answer: the first
    has their names, the second their memory."""
    memory = dict(_memory(told))
    found: list[Part] = []
    card = ""
    for line in listed.splitlines():
        if whole := _CARD.match(line):
            card = whole[1]
        elif part := _PART.match(line):
            profile, index, uuid = part.groups()
            total, free = memory.get((card, index), (0, 0))
            found.append(
                Part(card=card, uuid=uuid, profile=profile, total_bytes=total, free_bytes=free)
            )
    return found


def _memory(told: str) -> Iterator[tuple[tuple[str, str], tuple[int, int]]]:
    """(UUID of the whole device, number of the part in it) and the part's total and free bytes."""
    from xml.etree import ElementTree

    try:
        cards = ElementTree.fromstring(told).findall("gpu")
    except ElementTree.ParseError:  # no answer
        return
    for card in cards:
        for part in card.iterfind("mig_devices/mig_device"):
            words = (part.findtext(f"fb_memory_usage/{name}", "") for name in ("total", "free"))
            total, free = map(_mib, words)
            yield (card.findtext("uuid", ""), part.findtext("index", "")), (total, free)


def _mib(words: str) -> int:
    """Bytes of "9728 MiB"; 0 of "N/A"."""
    number, _, unit = words.partition(" ")
    return int(number) << 20 if number.isdigit() and unit == "MiB" else 0
