"""Plans for a device that is not here: `tuner plan --device rtx-4090`, or `--device "24 GiB"`."""

from __future__ import annotations

import re

from attrs import evolve

from compiler.devices import GIB, named, names
from compiler.diagnostics import choices, nearest
from compiler.machine import COMPILER, TRITON, Machine
from compiler.units import ByteSize

HOST = 32 * GIB  # of memory that a machine with a device has at least; twice the device's, if more
EXAMPLES = ("rtx-3060", "rtx-4090", "a100-80gb", "h100-pcie")


class UnknownDevice(Exception):
    """Neither a device of the table nor an amount of memory; says what would be."""


def elsewhere(machine: Machine, word: str) -> Machine:
    """`machine` with the accelerator that `word` names, all that it offers of its memory free.

    An amount of memory stands for a device that offers just that, and whose speed is not known.
    Its host's memory is assumed; PyTorch's builds for CUDA bring triton. Raises UnknownDevice.
    """
    found = named(word)
    if found is not None:
        name, row = found
        why = f"what {name} offers of its {row.memory_bytes / GIB:.0f} GiB"
        return evolve(
            _with(machine, name, row.offered_bytes, why),
            bf16=row.bf16,
            capability=row.capability,
        )
    try:
        size = ByteSize.parse(word)
    except ValueError:
        amount = re.fullmatch(r"0*([1-9]\d{0,2}(?:\.\d+)?)\s*(?:g|gb|gib)?", word.strip(), re.I)
        guess = (
            f"{amount[1]} GiB" if amount else _like(re.sub(r"[\s_-]+", "-", word.strip().lower()))
        )
        hint = f"did you mean `{guess}`?" if guess else f"known are {choices(EXAMPLES)} and others."
        raise UnknownDevice(
            f'no device `{word}` is known: {hint} An amount of memory will do, such as "24 GiB"'
        ) from None
    name = f"a device of {size}"
    return _with(machine, name, int(size), "all of what `--device` says")


def _like(word: str) -> str | None:
    """A device that may be meant by `word`, which may lack the maker's letters or the memory."""
    words = [word, f"rtx-{word}", f"gtx-{word}"] if re.fullmatch(r"\d{4}", word) else [word]
    for each in words:
        sized = re.compile(re.escape(each) + r"-\d+gb")
        if found := next(filter(sized.fullmatch, names()), None):
            return found
    number = re.search(r"\d{4}", word)  # a card of another number is another card
    known = [name for name in names() if number is None or number[0] in name]
    near = (nearest(each, known) for each in reversed(words))
    return next(filter(None, near), None)


def _with(machine: Machine, name: str, memory_bytes: int, why: str) -> Machine:
    return evolve(
        machine,
        device="cuda",
        device_name=name,
        device_total_bytes=memory_bytes,
        device_free_bytes=memory_bytes,
        free_is=why,
        here=False,
        host_total_bytes=max(HOST, 2 * memory_bytes),
        host_free_bytes=max(HOST, 2 * memory_bytes),
        missing=tuple(name for name in machine.missing if name not in (TRITON, COMPILER)),
        bf16=True,
        capability="",
    )
