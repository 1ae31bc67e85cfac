"""The settings by which a run is made to fit, and all that may be combined of them.

Only what the recipe leaves on "auto" is open. By the order of the savings, the cheapest first:
recompute some blocks, then all; update weights in the backward pass; keep the optimizer's state in
8 bits; the base in 8, then 4 bits; activations on the host; blocks of the base on the host; a batch
in parts. How quick each combination is, and what it needs, is for `estimates` to tell; which of
them is chosen, for `search`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from attrs import asdict, evolve, fields, frozen

from compiler import plan
from compiler.adapters import OF_THE_BASE
from compiler.draft import Draft, spelt
from compiler.families.card import FamilyCard
from compiler.memory import Candidate
from compiler.optimizers import OPTIMIZERS
from compiler.passes.fused import fused_backward_possible
from compiler.passes.optimizer import planned, suits
from compiler.quantisers import QUANTISERS
from compiler.schema import OffloadRecipe

INTERVALS = (4, 3, 2, 1)  # every n-th block is recomputed
FEWER_BITS: tuple[plan.Quantisation, ...] = ("int8", "nf4")
APART = (4, 3, 2, 1)  # every n-th block waits on the host
MOST = 0.75  # of the blocks, between every second and each
ON_THE_HOST: Mapping[plan.Device, str] = {"cpu": "the processor", "mps": "an Apple device"}
"""Devices whose memory is the host's."""
BLOCKS_WAIT: tuple[plan.Device, ...] = ("cpu", "cuda")
"""Where PyTorch can take a tensor's memory away and give it back (`resize_storage_bytes_`)."""


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


@frozen(kw_only=True)
class Choices:
    """What each setting may be: first as the recipe has it, or at its fastest, the thriftiest last.

    Names are those of `Rung`.
    """

    checkpointing: tuple[int, ...]
    fused_backward: tuple[bool, ...]
    optimizer: tuple[str, ...]
    quantize: tuple[plan.Quantisation, ...]
    activations: tuple[bool, ...]
    blocks: tuple[int, ...]
    micro_batch: tuple[int, ...]

    @property
    def first(self) -> Rung:
        """Nothing saved that the recipe does not state."""
        return Rung(**{name: values[0] for name, values in self._named().items()})

    def every(self) -> Iterator[Rung]:
        """All combinations that can be."""
        named = self._named()
        for values in product(*named.values()):
            rung = Rung(**dict(zip(named, values, strict=True)))
            if possible(rung):
                yield rung

    def thriftiest(self) -> tuple[Rung, ...]:
        """Every saving at once; two rungs, where an update in the backward pass is one of them: it
        can't go with a batch in parts."""
        last = Rung(**{name: values[-1] for name, values in self._named().items()})
        apart = evolve(last, fused_backward=self.fused_backward[0])
        whole = evolve(last, micro_batch=self.micro_batch[0])
        light = evolve(whole, optimizer=self.optimizer[0])
        ends = [rung for rung in (last, apart, whole, light) if possible(rung)]
        fused = [rung for rung in ends if rung.fused_backward][:1]
        return tuple(dict.fromkeys([*ends[:1], *fused]))

    def in_turn(self) -> Iterator[Rung]:
        """The first rung with the first saving of each setting alone."""
        for name, values in self._named().items():
            if len(values) > 1:
                rung = evolve(self.first, **{name: values[1]})
                if possible(rung):
                    yield rung

    def place(self, rung: Rung) -> tuple[int, ...]:
        """How late the savings of `rung` are in their order, the latest saving first."""
        named = self._named()
        return tuple(named[name].index(getattr(rung, name)) for name in reversed(named))

    def _named(self) -> dict[str, tuple[Any, ...]]:
        return {each.name: getattr(self, each.name) for each in fields(type(self))}


def possible(rung: Rung) -> bool:
    """Whether its settings go together: an update in the backward pass knows no gradients of other
    parts of a batch, and updates one weight at a time."""
    apart = OPTIMIZERS[rung.optimizer].not_in_backward
    return not (rung.fused_backward and (rung.micro_batch or apart))


def choices(draft: Draft) -> Choices:
    """All that the recipe leaves open; one value each where it leaves nothing."""
    start, memory = first(draft), draft.recipe.memory
    fused = memory.fused_backward == "auto" and fused_backward_possible(draft) is None
    sibling = _eight_bit(draft)
    if sibling and start.fused_backward and OPTIMIZERS[sibling].not_in_backward:
        sibling = ""
    # The networks of a distillation take turns in one pass, and judge whole batches.
    alone = draft.sprint is not None
    # Only there copies are made beside the computing; Apple's devices share the host's memory.
    moves = not alone and draft.device == "cuda" and not _sharded(draft)
    parted = not alone and memory.micro_batch == "auto" and not start.fused_backward
    return Choices(
        checkpointing=(start.checkpointing, *_intervals(draft)),
        fused_backward=(start.fused_backward, *([True] if fused else [])),
        optimizer=(start.optimizer, *([sibling] if sibling else [])),
        quantize=(start.quantize, *_fewer_bits(draft)),
        activations=(
            start.activations,
            *([True] if moves and offload_of(draft).activations == "auto" else []),
        ),
        blocks=(start.blocks, *(_blocks(draft) if moves else [])),
        micro_batch=(start.micro_batch, *(_halves(largest_batch(draft)) if parted else [])),
    )


def _intervals(draft: Draft) -> list[int]:
    if draft.recipe.memory.activation_checkpointing != "auto":
        return []
    return [each for each in INTERVALS if each == 1 or each <= depth(draft) // 2]


def _halves(size: int) -> list[int]:
    """Ever smaller parts of a batch."""
    found = []
    while size > 1:
        size = -(-size // 2)
        found.append(size)
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


def _blocks(draft: Draft) -> list[int]:
    assert draft.model is not None
    fused = draft.speed.fused_projections  # see `passes.projections`
    if offload_of(draft).blocks != "auto" or draft.adapter is None or fused:
        return []
    family = draft.model.family
    return waiting(family, draft.model.configs[family.trained_component])


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
