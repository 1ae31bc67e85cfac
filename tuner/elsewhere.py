"""Plans for a device that is not here: `tuner plan --device rtx-4090`, or `--device "24 GiB"`."""

from __future__ import annotations

from attrs import evolve

from compiler.devices import named, names
from compiler.diagnostics import choices, nearest
from compiler.machine import Machine
from compiler.units import ByteSize

EXAMPLES = ("rtx-3060", "rtx-4090", "a100-80gb", "h100-pcie")


class UnknownDevice(Exception):
    """Neither a device of the table nor an amount of memory; says what would be."""


def elsewhere(machine: Machine, word: str) -> Machine:
    """`machine` with the accelerator that `word` names, all of its memory free.

    An amount of memory stands for a device of that size whose speed is not known. Raises
    UnknownDevice.
    """
    found = named(word)
    if found is not None:
        name, row = found
        return _with(machine, name, row.memory_bytes, bf16=row.bf16)
    try:
        size = ByteSize.parse(word)
    except ValueError:
        guess = nearest(word.lower(), names())
        hint = f"did you mean `{guess}`?" if guess else f"known are {choices(EXAMPLES)} and others."
        raise UnknownDevice(
            f'no device `{word}` is known: {hint} An amount of memory will do, such as "24 GiB"'
        ) from None
    return _with(machine, f"a device of {size}", int(size), bf16=True)


def _with(machine: Machine, name: str, memory_bytes: int, *, bf16: bool) -> Machine:
    return evolve(
        machine,
        device="cuda",
        device_name=name,
        device_total_bytes=memory_bytes,
        device_free_bytes=memory_bytes,
        host_total_bytes=0,
        bf16=bf16,
        capability="",
    )
