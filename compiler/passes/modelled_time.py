"""How long a step takes with one setting or another, by a model, until a run has measured it.

A device does matrix products at a share of its peak; memory moves one byte in the time of so many
operations at the peak (data sheets of current accelerators at 16 bits: 200). But no kernel begins
sooner than the processor can send it off: small models on fast devices wait for that. What waits on
the host crosses a PCIe 3.0 x16 or 4.0 x8 link (15.8e9 bytes a second, some 80 % of it reached),
while the device computes.
"""

from __future__ import annotations

from attrs import frozen

from compiler.devices import peak_flops
from compiler.draft import Draft
from compiler.memory import Simulation
from compiler.passes.ladder import Rung, largest_batch
from compiler.quantisers import QUANTISERS

UTILISATION = 0.35
FLOPS_PER_BYTE = 200.0
LINK_BYTES = 12.6e9
UNKNOWN_DEVICE = 100e12  # operations a second
# Seconds of the processor's work for one kernel: a launch alone takes 2 to 5 microseconds (CUDA C++
# best practices guide; NVIDIA's notes on CUDA graphs), to which PyTorch adds its own.
LAUNCH = 5e-6


@frozen(kw_only=True)
class Clock:
    """What the time of a step depends on, besides its settings."""

    peak: float  # operations a second
    largest: int  # samples of the largest batch
    parameters: int  # of the trained component

    def seconds(self, rung: Rung, flops: float, waiting: float, kernels: float = 0) -> float:
        """Of one step of `rung`, of `flops` operations a batch and `kernels` in each part of it;
        `waiting` bytes cross to the host and back, or twice from there, in each part."""
        passes = 2 + (1 / rung.checkpointing if rung.checkpointing else 0)
        parts = -(-self.largest // rung.micro_batch) if rung.micro_batch else 1
        row = QUANTISERS.get(rung.quantize)
        traffic = row.traffic if row else 2.0  # a plain weight is read: 16 bits
        moved = traffic * self.parameters * passes * parts
        computing = flops / (UTILISATION * self.peak) + moved * FLOPS_PER_BYTE / self.peak
        return max(computing, kernels * parts * LAUNCH, 2 * max(waiting, 0) * parts / LINK_BYTES)

    def overhead(self, rung: Rung, found: Simulation) -> float:
        """That time over the time of the operations alone."""
        alone = found.flops / (UTILISATION * self.peak)
        return self.taken(rung, found) / alone if alone else 1.0

    def taken(self, rung: Rung, found: Simulation) -> float:
        """Of one step of `rung`, as it was simulated."""
        crossing = found.blocks_waiting + found.activations_waiting
        return self.seconds(rung, found.flops, crossing, found.kernels)


def clock(draft: Draft, parameters: int) -> Clock:
    """For the draft's device and batches."""
    known = known_peak(draft)
    return Clock(peak=known or UNKNOWN_DEVICE, largest=largest_batch(draft), parameters=parameters)


def known_peak(draft: Draft) -> float | None:
    """Operations a second of the draft's device at most; None where that is not known."""
    assert draft.precision is not None
    here = draft.device == draft.machine.device == "cuda"
    return peak_flops(draft.machine.device_name, draft.precision.compute) if here else None
