"""The ladder of settings by which a run is made to fit: each rung saves more.

Only what the recipe leaves on "auto" is on it. Every rung keeps what the one above chose and adds
the next cheapest saving, in this order: recompute some blocks, then all; update weights in the
backward pass; keep the optimizer's state in 8 bits; the base in 8, then 4 bits; activations on the
host; blocks of the base on the host; a batch in parts. How much slower a rung is, is modelled (see
`seconds`). `quicker` has rungs beside the ladder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrs import asdict, evolve, frozen

from compiler import plan
from compiler.adapters import OF_THE_BASE
from compiler.devices import peak_flops
from compiler.draft import Draft, spelt
from compiler.families.card import FamilyCard
from compiler.memory import Candidate, Simulation
from compiler.optimizers import OPTIMIZERS
from compiler.passes.fused import fused_backward_possible
from compiler.passes.optimizer import planned, suits
from compiler.quantisers import QUANTISERS
from compiler.schema import OffloadRecipe

INTERVALS = (4, 3, 2, 1)  # every n-th block is recomputed
FEWER_BITS: tuple[plan.Quantisation, ...] = ("int8", "nf4")
APART = (4, 3, 2, 1)  # every n-th block waits on the host
MOST = 0.75  # of the blocks, between every second and each

# The model of time. A device does matrix products at a share of its peak; memory moves one byte in
# the time of so many operations at the peak (data sheets of current accelerators at 16 bits: 200);
# what waits on the host crosses a PCIe 3.0 x16 or 4.0 x8 link (15.8e9 bytes a second, some 80 % of
# it reached), while the device computes.
UTILISATION = 0.35
FLOPS_PER_BYTE = 200.0
LINK_BYTES = 12.6e9
UNKNOWN_DEVICE = 100e12  # operations a second; only ratios of times are used


@frozen(kw_only=True)
class Rung:
    """One setting of everything that the ladder may choose."""

    checkpointing: int
    fused_backward: bool
    optimizer: str
    quantize: plan.Quantisation
    activations: bool
    blocks: int
    micro_batch: int  # 0: whole batches

    @property
    def layout(self) -> plan.Layout:
        """What of it alters no result."""
        return plan.Layout(
            activation_checkpointing=self.checkpointing,
            fused_backward=self.fused_backward,
            offload_activations=self.activations,
            offload_blocks=self.blocks,
        )


def depth(draft: Draft) -> int:
    """Blocks of the trained component."""
    assert draft.model is not None
    family = draft.model.family
    config = draft.model.configs[family.trained_component]
    return family.depth(config)


def largest_batch(draft: Draft) -> int:
    """Samples of the largest batch."""
    return max((min(b.batch_size, b.samples) for b in draft.buckets), default=1)


def offload_of(draft: Draft) -> OffloadRecipe:
    """The recipe's table, where a word may stand for it."""
    asked = draft.recipe.memory.offload
    if isinstance(asked, OffloadRecipe):
        return asked
    return OffloadRecipe() if asked == "auto" else OffloadRecipe(activations=False, blocks=0)


def first(draft: Draft) -> Rung:
    """What the recipe states; what it leaves open, at its fastest."""
    assert draft.model is not None and draft.optimizer is not None
    memory, offload = draft.recipe.memory, offload_of(draft)
    interval = memory.activation_checkpointing
    return Rung(
        checkpointing=0 if interval in ("auto", "off") else int(interval),
        fused_backward=memory.fused_backward is True,
        optimizer=draft.optimizer.name,
        quantize=draft.quantize.get(draft.model.family.trained_component, "none"),
        activations=offload.activations is True,
        blocks=0 if offload.blocks == "auto" else int(offload.blocks),
        micro_batch=0 if memory.micro_batch == "auto" else _parted(draft, memory.micro_batch),
    )


def _parted(draft: Draft, size: int) -> int:
    return size if size < largest_batch(draft) else 0


def rungs(draft: Draft) -> list[Rung]:
    """The whole ladder; one rung where the recipe leaves nothing open."""
    found = [first(draft)]

    def add(**changes: Any) -> None:
        found.append(evolve(found[-1], **changes))

    memory = draft.recipe.memory
    if memory.activation_checkpointing == "auto":
        for interval in INTERVALS:
            if interval == 1 or interval <= depth(draft) // 2:
                add(checkpointing=interval)
    if memory.fused_backward == "auto" and fused_backward_possible(draft) is None:
        add(fused_backward=True)
    sibling = _eight_bit(draft)
    if sibling:
        apart = OPTIMIZERS[sibling].not_in_backward
        add(optimizer=sibling, fused_backward=found[-1].fused_backward and not apart)
    for kind in _fewer_bits(draft):
        add(quantize=kind)
    if draft.sprint is not None:  # its networks take turns in one pass, and judge whole batches
        return found
    if draft.device != "cpu" and not _sharded(draft):
        _offload(draft, add)
    if memory.micro_batch == "auto":
        size = largest_batch(draft)
        while size > 1:
            size = -(-size // 2)
            add(micro_batch=size, fused_backward=False)
    return found


def _sharded(draft: Draft) -> bool:
    """Whether the weights are dealt out: some savings don't go with that, see `passes.sharing`."""
    return draft.sharing.strategy != "ddp"


def _eight_bit(draft: Draft) -> str:
    assert draft.optimizer is not None
    sibling = OPTIMIZERS[draft.optimizer.name].eight_bit
    open_ = draft.recipe.train.optimizer.name == "auto" and draft.device != "cpu"
    open_ = open_ and not _sharded(draft) and draft.sprint is None
    return sibling if open_ and sibling and suits(draft, sibling) else ""


def _fewer_bits(draft: Draft) -> tuple[plan.Quantisation, ...]:
    assert draft.model is not None
    recipe = getattr(draft.recipe.model, draft.model.family.trained_component)
    if recipe.quantize != "auto" or draft.adapter is None or _sharded(draft):
        return ()
    if draft.adapter.init in OF_THE_BASE:  # which must give its weights exactly
        return ()
    if draft.speed.fused_projections:  # see `passes.projections`
        return ()
    kind = draft.adapter.kind
    return tuple(
        name
        for name in FEWER_BITS
        if kind in QUANTISERS[name].adapters and draft.device in QUANTISERS[name].devices
    )


def _offload(draft: Draft, add: Callable[..., None]) -> None:
    offload = offload_of(draft)
    if offload.activations == "auto":
        add(activations=True)
    fused = draft.speed.fused_projections  # see `passes.projections`
    if offload.blocks == "auto" and draft.adapter is not None and not fused:
        assert draft.model is not None
        family = draft.model.family
        for count in waiting(family, draft.model.configs[family.trained_component]):
            add(blocks=count)


def waiting(family: FamilyCard, config: Mapping[str, Any]) -> list[int]:
    """How many blocks wait, rung by rung: every n-th one, from half as far in on.

    Most of them, but not all, do not repeat themselves along the model. A row of equal blocks is
    simulated much quicker where they do, so that only UNets, which gain little by it, have that.
    """
    blocks = family.depth(config)
    counts = {len(range(apart // 2, blocks, apart)) for apart in APART}
    if family.runs is None or family.places is not None:
        counts.add(round(MOST * blocks))
    return sorted(counts - {0})


def candidate_of(draft: Draft, base: Candidate, rung: Rung) -> Candidate:
    """`base` with the settings of `rung`."""
    trained = base.model.trained_component
    components = tuple(
        evolve(part, quantize=rung.quantize) if part.name == trained else part
        for part in base.model.components
    )
    return evolve(
        base,
        model=evolve(base.model, components=components),
        optimizer=planned(draft, rung.optimizer),
        layout=rung.layout,
        micro_batch=rung.micro_batch,
    )


def seconds(draft: Draft, rung: Rung, found: Simulation, start: Simulation) -> float:
    """Time of one step of `rung`, by the model above; `start` is the first rung's simulation.

    Only the ratio of two of them means anything.
    """
    assert draft.precision is not None
    known = peak_flops(draft.machine.device_name, draft.precision.compute)
    peak = known or UNKNOWN_DEVICE
    passes = 2 + (1 / rung.checkpointing if rung.checkpointing else 0)
    parts = -(-largest_batch(draft) // rung.micro_batch) if rung.micro_batch else 1
    row = QUANTISERS.get(rung.quantize)
    traffic = row.traffic if row else 2.0  # a plain weight is read: 16 bits
    moved = traffic * found.parameters * passes * parts
    computing = found.flops / (UTILISATION * peak) + moved * FLOPS_PER_BYTE / peak
    crossing = (
        2 * max(waiting_bytes(found) - waiting_bytes(start), 0) * parts / LINK_BYTES
    )  # there and back
    return max(computing, crossing)


def waiting_bytes(found: Simulation) -> int:
    """Bytes on the host in a step."""
    return next((p.host_bytes for p in found.phases if p.name == "train"), 0)


def alters(above: Rung, below: Rung) -> bool:
    """Whether other weights come out of it: by other arithmetic, or in the last bits."""
    names = ("optimizer", "quantize", "micro_batch")
    return any(getattr(above, name) != getattr(below, name) for name in names)


def settings(draft: Draft, rung: Rung) -> dict[str, str]:
    """Keys of the recipe that the ladder may choose, with the values of `rung`."""
    assert draft.model is not None
    keys = {
        "checkpointing": "memory.activation_checkpointing",
        "fused_backward": "memory.fused_backward",
        "optimizer": "train.optimizer.name",
        "quantize": f"model.{draft.model.family.trained_component}.quantize",
        "activations": "memory.offload.activations",
        "blocks": "memory.offload.blocks",
        "micro_batch": "memory.micro_batch",
    }
    values = asdict(rung)
    values["checkpointing"] = rung.checkpointing or "off"
    values["micro_batch"] = rung.micro_batch or largest_batch(draft)
    return {key: spelt(values[name]) for name, key in keys.items()}
