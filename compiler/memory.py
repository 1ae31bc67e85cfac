"""The one inversion: the compiler chooses by memory, the runtime knows what a step allocates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from attrs import field, frozen

from compiler.plan import (
    Adapter,
    AttentionKernel,
    Bucket,
    Embeddings,
    HeldOut,
    Layout,
    Model,
    Objective,
    Optimizer,
    Phase,
    Precision,
    Sharing,
    Sprint,
    Text,
    TextTraining,
)

CORRECTION = "correction"
"""The part of a phase by which earlier runs on the same machine differed from what was planned; how
many of them is in its name, too."""


@frozen(kw_only=True)
class Candidate:
    """A run to simulate: everything that the peaks of its phases depend on."""

    model: Model
    adapter: Adapter | None
    precision: Precision
    text: Text
    objective: Objective
    optimizer: Optimizer
    max_grad_norm: float
    ema_on_device: bool
    ema_on_host: bool = False
    accumulate: int
    layout: Layout
    micro_batch: int = 0  # 0: whole batches
    shapes: tuple[tuple[int, int, int], ...]  # of all buckets: width, height (pixels), batch size
    pictures: tuple[tuple[int, int], ...] = ()  # validation sizes (width, height); empty: none
    guidance: float = 0.0  # of validation
    clip_bytes: int = 0  # on the host, of what scores its pictures
    sampler: str = ""  # of validation; "": the base's own
    evaluated: tuple[tuple[int, int, int], ...] = ()  # as `shapes`, of held-out pictures
    encoded: tuple[tuple[int, int, int], ...] = ()
    """As `shapes`, of what the VAE encodes together; empty: one picture at a time of each size in
    `shapes` and `evaluated`."""
    device: str
    capability: str = ""  # of a CUDA device, "9.0"; "": not known
    tf32: bool = False  # see `plan.Speed`
    ranks: int = 1
    sharing: Sharing = field(factory=Sharing)
    masked: bool = False  # whether samples of some source have masks
    attention: AttentionKernel = "native"  # of the trained component
    channels_last: bool = False
    fused_projections: bool = False
    compiled: bool = False  # its blocks; simulated as if they were not
    sprint: Sprint | None = None
    keeps_base: bool = False  # whether samples of some source learn what the base predicts
    text_training: TextTraining | None = None
    embeddings: Embeddings | None = None


@frozen(kw_only=True)
class Simulation:
    """What the simulation of a candidate found."""

    phases: tuple[Phase, ...]
    parameters: int  # of the trained component, without adapter
    trainable: int  # parameters that the optimizer updates
    adapted_modules: int  # modules that carry an adapter; 0 without one
    flops: int
    """Operations of the forward and backward passes of one batch of the worst bucket, without those
    for what the base predicts."""
    kernels: int = 0  # of the passes of one part of a batch; an underestimate
    blocks_waiting: int = 0
    """Bytes of blocks that wait on the host: each part of a batch fetches them twice."""
    activations_waiting: int = 0
    """Bytes of activations that go to the host in each part of a batch, and come back."""
    seconds: float  # how long the simulation took


class MemoryModel(Protocol):
    """Simulates; implemented by the runtime, handed in by `tuner`."""

    def simulate(self, candidate: Candidate) -> Simulation:
        """Peak memory per phase. Raises ValueError with a sentence if the model can't be built."""
        ...


def encoded_shapes(
    buckets: Iterable[Bucket], held_out: Iterable[HeldOut], together: int
) -> tuple[tuple[int, int, int], ...]:
    """Width, height (pixels) and count of the pictures that the VAE encodes at a time, of each
    bucket's fullest batch, where it takes up to `together`."""
    every: list[Bucket | HeldOut] = [*buckets, *held_out]
    return tuple(sorted({(b.width, b.height, min(together, b.images)) for b in every}))


def gib(amount: int) -> str:
    """Bytes as a person reads them: "19.1 GiB", "312 MiB"."""
    if amount >= 2**30:
        return f"{amount / 2**30:.1f} GiB"
    if amount >= 2**20:
        return f"{amount / 2**20:.0f} MiB"
    return f"{amount / 2**10:.0f} KiB"
