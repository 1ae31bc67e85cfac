"""The optimizers, one row of facts each; used by the plan (memory, checks) and by the run.

A row is all that a new optimizer needs here: its class, the package that holds it, what it keeps
per parameter and which arguments it takes.
"""

from __future__ import annotations

from collections.abc import Mapping

from compiler.optimizers.facts import OptimizerFacts
from compiler.optimizers.names import called_here
from compiler.optimizers.packaged import BITSANDBYTES, PACKAGED
from compiler.optimizers.stock import STOCK
from compiler.plan import Dtype

__all__ = [
    "DEFAULT",
    "OPTIMIZERS",
    "OptimizerFacts",
    "called_here",
    "packages",
    "saved_bytes",
    "state_bytes",
]

OPTIMIZERS: Mapping[str, OptimizerFacts] = {
    row.name: row for row in (*STOCK, *PACKAGED, *BITSANDBYTES)
}
DEFAULT = "adamw"  # what "auto" means


def state_bytes(name: str, trained: Dtype, parameters: int) -> int:
    """Bytes of optimizer state for `parameters` trained parameters. KeyError: no such optimizer."""
    return round(OPTIMIZERS[name].state_bytes[trained] * parameters)


def saved_bytes(name: str, trained: Dtype, parameters: int) -> int:
    """Bytes of optimizer state in a checkpoint: what is on the device and what is on the host."""
    return state_bytes(name, trained, parameters) + round(OPTIMIZERS[name].host_bytes * parameters)


def packages() -> tuple[str, ...]:
    """The packages that some row needs, each once."""
    return tuple(sorted({row.package for row in OPTIMIZERS.values() if row.package}))
