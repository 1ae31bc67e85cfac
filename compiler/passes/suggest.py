"""The smallest change to a recipe that would make it fit, tried by simulation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import gcd

from attrs import evolve

from compiler import plan
from compiler.adapters import OF_THE_BASE
from compiler.draft import Draft
from compiler.memory import Candidate, MemoryModel, Simulation, gib
from compiler.optimizers import OPTIMIZERS
from compiler.passes import ladder
from compiler.passes.adapter import RANKS_AT_ONCE
from compiler.passes.fused import fused_backward_possible
from compiler.passes.optimizer import planned, suits
from compiler.passes.sharing import shardable
from compiler.quantisers import QUANTISERS
from compiler.spans import KeyPath

TRIES = 12  # simulations at most for one change
TOGETHER = 4  # changes at most
SMALLER = (0.75, 0.5, 0.25)  # of an edge

Change = tuple[str, Candidate]


def refuse(
    draft: Draft,
    candidate: Candidate,
    model: MemoryModel,
    budget: int,
    worst: plan.Phase,
    blame: KeyPath,
) -> None:
    """Add the error: what needs too much, and the smallest change that would fit.

    `candidate` is the thriftiest that the recipe allows.
    """
    over = gib(worst.device_bytes - budget)
    draft.error(
        "does-not-fit",
        blame,
        f"phase {worst.name} needs {gib(worst.device_bytes)} of device memory, {over} more than "
        f"the budget of {gib(budget)}",
        help=_advice(draft, candidate, model, budget, worst),
    )


def _advice(
    draft: Draft, candidate: Candidate, model: MemoryModel, budget: int, worst: plan.Phase
) -> str:
    """The first change that is enough; else those that save most, one on top of the other."""
    other = "a larger device, or a smaller base"
    other = other if draft.adapter else f"an [adapter] instead of the whole model, {other}"
    least = _least(draft, candidate, model)
    if least > budget:  # answered at once
        return f"with every change that was tried together it still needs {gib(least)}: {other}"
    told: list[str] = []
    phase, start = worst.name, candidate
    for _ in range(TOGETHER):
        best: tuple[int, str, Candidate, str] | None = None
        for words, changed in islice(_further(draft, start, candidate, phase), TRIES):
            try:
                needed, name = _peak(model.simulate(changed))
            except ValueError:
                continue
            if needed <= budget:
                if not told:
                    return f"{words} would fit: {gib(needed)}"
                together = ", ".join([*told, words])
                return f"no single change fits; these would together: {together}: {gib(needed)}"
            if best is None or needed < best[0]:
                best = needed, words, changed, name
        if best is None:
            break
        told.append(best[1])
        candidate, phase = best[2], best[3]
    return f"no change of a few settings that was tried fits: {other}"


def _least(draft: Draft, start: Candidate, model: MemoryModel) -> int:
    """Bytes at most with all changes at once, each as far as it goes; 0 if that is not known. Where
    one takes others back, the least of with and without it."""
    candidate, ends = start, []
    assert draft.model is not None
    phases = (*draft.model.family.text_encoders, "latents", "validate" * bool(start.pictures))
    for phase in phases:
        while further := list(_further(draft, start, candidate, phase)):
            _, changed = further[-1]
            if _takes_back(candidate, changed):
                ends.append(candidate)
            candidate = changed
    try:
        return min(_peak(model.simulate(end))[0] for end in (candidate, *ends))
    except ValueError:
        return 0


def _takes_back(candidate: Candidate, changed: Candidate) -> bool:
    """Whether some of what was saved before is not saved any more."""
    parts = bool(candidate.micro_batch) and candidate.micro_batch != changed.micro_batch
    return parts or candidate.sharing.strategy != changed.sharing.strategy


def _further(draft: Draft, start: Candidate, candidate: Candidate, phase: str) -> Iterator[Change]:
    """`changes`, without pictures made smaller that are smaller than at the `start`, and without
    what changes nothing."""
    for words, changed in changes(draft, candidate, phase):
        twice = any(
            getattr(start, name) != getattr(candidate, name) != getattr(changed, name)
            for name in ("shapes", "pictures")
        )
        if not twice and changed != candidate:
            yield words, changed


def _peak(found: Simulation) -> tuple[int, str]:
    """Bytes at most, and in which phase."""
    return max((phase.device_bytes, phase.name) for phase in found.phases)


def changes(draft: Draft, candidate: Candidate, phase: str) -> Iterator[Change]:
    """Changes that lower what `phase` needs, the smallest first."""
    assert draft.model is not None
    if phase in draft.model.family.text_encoders:
        trained = [each for each in (candidate.text_training, candidate.embeddings) if each]
        if not any(phase in each.encoders for each in trained):
            yield from _fewer_bits(draft, candidate, phase)
        return
    if phase == "latents":
        yield from _fewer_together(candidate)
        yield from _tiled(candidate)
        yield from _smaller(draft, candidate)
        return
    if phase == "validate":
        yield from _tiled(candidate)
        yield from _smaller_pictures(candidate)
    yield from _shared_out(draft, candidate)
    yield from _thriftier(draft, candidate)
    if draft.adapter is not None:
        if candidate.sharing.strategy == "ddp" and not draft.speed.fused_projections:
            yield from _fewer_bits(draft, candidate, candidate.model.trained_component)
        yield from _lower_rank(draft, candidate)
    else:
        yield from _lighter_training(draft, candidate)
    yield from _fewer_samples(draft, candidate)
    yield from _smaller(draft, candidate)


def _fewer_bits(draft: Draft, candidate: Candidate, name: str) -> Iterator[Change]:
    for kind in _kinds(draft, candidate, name):
        parts = tuple(
            evolve(part, quantize=kind) if part.name == name else part
            for part in candidate.model.components
        )
        yield (
            f'quantize = "{kind}" in [model.{name}]',
            evolve(candidate, model=evolve(candidate.model, components=parts)),
        )


def _kinds(draft: Draft, candidate: Candidate, name: str) -> Iterator[plan.Quantisation]:
    """Those with fewer bits than component `name` has, of which nothing is refused."""
    held = next(part.quantize for part in candidate.model.components if part.name == name)
    carried = candidate.adapter if name == candidate.model.trained_component else None
    if carried and carried.init in OF_THE_BASE:  # which must give its weights exactly
        return
    for kind in ladder.FEWER_BITS:
        row = QUANTISERS[kind]
        fewer = held == "none" or row.bits < QUANTISERS[held].bits
        carries = carried is None or carried.kind in row.adapters
        if fewer and carries and draft.device in row.devices:
            yield kind


def _fewer_together(candidate: Candidate) -> Iterator[Change]:
    """Smaller batches of pictures for the VAE."""
    size = max((count for *_, count in candidate.encoded), default=1)
    while size > 1:
        size //= 2
        shapes = {(width, height, min(size, n)) for width, height, n in candidate.encoded}
        yield f"batch = {size} in [cache]", evolve(candidate, encoded=tuple(sorted(shapes)))


def _tiled(candidate: Candidate) -> Iterator[Change]:
    parts = candidate.model.components
    if any(part.tiling for part in parts):
        return
    tiled = tuple(evolve(part, tiling=True) if part.name == "vae" else part for part in parts)
    yield (
        "tiling = true in [model.vae]",
        evolve(candidate, model=evolve(candidate.model, components=tiled)),
    )


def _shared_out(draft: Draft, candidate: Candidate) -> Iterator[Change]:
    """Every weight dealt out, where the recipe has each device hold all of them; what DeepSpeed
    can keep on the host."""
    sharing = candidate.sharing
    if sharing.strategy == "deepspeed" and draft.device not in ladder.ON_THE_HOST:
        if not sharing.offload_optimizer:
            yield (
                "offload_optimizer = true in [launch.deepspeed]",
                evolve(candidate, sharing=evolve(sharing, offload_optimizer=True)),
            )
        return
    if candidate.ranks == 1 or sharing.strategy != "ddp":
        return
    other = _unsettled(draft)
    if shardable(other)[0]:
        return
    shared = evolve(candidate, sharing=other.sharing)
    last = ladder.choices(other).thriftiest()[0]
    yield 'strategy = "fsdp" in [launch]', ladder.candidate_of(other, shared, last)


def _unsettled(draft: Draft) -> Draft:
    """As if the recipe said "fsdp": without what the ladder chose to save memory by itself."""
    assert draft.model is not None and draft.optimizer is not None
    name, quantize = draft.optimizer.name, dict(draft.quantize)
    if draft.recipe.train.optimizer.name == "auto":
        name = next((row.name for row in OPTIMIZERS.values() if row.eight_bit == name), name)
    if draft.trained.quantize == "auto":
        quantize[draft.model.family.trained_component] = "none"
    return evolve(
        draft,
        sharing=plan.Sharing(strategy="fsdp"),
        optimizer=planned(draft, name),
        quantize=quantize,
    )


def _thriftier(draft: Draft, candidate: Candidate) -> Iterator[Change]:
    """Settings that the recipe states, and that the ladder would have chosen otherwise."""
    layout = candidate.layout
    if layout.activation_checkpointing != 1:
        yield (
            "activation_checkpointing = 1",
            evolve(candidate, layout=evolve(layout, activation_checkpointing=1)),
        )
    sharded = candidate.sharing.strategy != "ddp"  # what can't go with it: `passes.sharing`
    if sharded:
        return
    sibling = OPTIMIZERS[candidate.optimizer.name].eight_bit
    if sibling and layout.fused_backward and OPTIMIZERS[sibling].not_in_backward:
        sibling = ""
    if sibling and draft.device != "cpu" and suits(draft, sibling):
        yield f'optimizer name = "{sibling}"', _with_optimizer(draft, candidate, sibling)
    if draft.device in ladder.ON_THE_HOST or candidate.sprint is not None:  # see `passes.sprint`
        return
    if not layout.offload_activations:
        yield (
            "offload = { activations = true }",
            evolve(candidate, layout=evolve(layout, offload_activations=True)),
        )
    blocks = ladder.depth(draft)
    fused = draft.speed.fused_projections  # see `passes.projections`
    open_ = draft.device in ladder.BLOCKS_WAIT and draft.adapter is not None and not fused
    if open_ and layout.offload_blocks < blocks:
        yield (
            f"offload = {{ blocks = {blocks} }}",
            evolve(candidate, layout=evolve(layout, offload_blocks=blocks)),
        )


def _with_optimizer(draft: Draft, candidate: Candidate, name: str) -> Candidate:
    """A distillation's discriminator has the student's optimizer, at its own learning rate."""
    made, sprint = planned(draft, name), candidate.sprint
    if sprint is not None:
        sprint = evolve(sprint, discriminator=evolve(made, lr=sprint.discriminator.lr))
    return evolve(candidate, optimizer=made, sprint=sprint)


def _lighter_training(draft: Draft, candidate: Candidate) -> Iterator[Change]:
    """Of a model that is trained whole: gradients that are not kept, weights in 16 bits."""
    if candidate.sharing.strategy != "ddp" or candidate.sprint is not None:
        return
    train, layout = draft.recipe.train, candidate.layout
    whole = 0 if draft.recipe.memory.micro_batch == "auto" else candidate.micro_batch
    unclipped = evolve(
        draft,
        recipe=evolve(draft.recipe, train=evolve(train, max_grad_norm=0.0)),
        optimizer=candidate.optimizer,
        precision=candidate.precision,
        steps=evolve(draft.steps, micro_batch=whole) if draft.steps else None,
    )
    if not layout.fused_backward and fused_backward_possible(unclipped) is None:
        words = ["max_grad_norm = 0"] if train.max_grad_norm else []
        yield (
            " and ".join([*words, "fused_backward = true"]),
            evolve(
                candidate,
                max_grad_norm=0.0,
                micro_batch=whole,
                layout=evolve(layout, fused_backward=True),
            ),
        )
    row, precision = OPTIMIZERS[candidate.optimizer.name], candidate.precision
    halved = (precision.trained, precision.compute) == ("float32", "bfloat16")
    if halved and "bfloat16" in row.weights and candidate.text_training is None:
        yield (
            'trained = "bf16" in [precision]',
            evolve(candidate, precision=evolve(precision, trained="bfloat16")),
        )


def _lower_rank(draft: Draft, candidate: Candidate) -> Iterator[Change]:
    """Halves of the rank, of those that the adapter's other keys allow: see `passes.adapter`."""
    adapter, recipe = candidate.adapter, draft.recipe.adapter
    assert adapter is not None and recipe is not None
    if adapter.start:  # whose rank the file has
        return
    apart, rank = [rule.rank for rule in adapter.ranks], adapter.rank
    while rank > 8:
        rank //= 2
        block = adapter.block_size
        if adapter.kind == "dylora":
            block = recipe.block_size or gcd(RANKS_AT_ONCE, rank, *apart)
            if rank % block or block == max(rank, *apart, 0):
                continue
        if adapter.min_rank >= rank or (adapter.init == "orthogonal" and rank % 2):
            continue
        yield (
            f"rank = {rank}",
            evolve(candidate, adapter=evolve(adapter, rank=rank, block_size=block)),
        )


def _fewer_samples(draft: Draft, candidate: Candidate) -> Iterator[Change]:
    # A discriminator judges whole batches, and an update in the backward pass knows no gradients of
    # other parts of a batch.
    if candidate.sprint is not None or candidate.layout.fused_backward:
        return
    size = candidate.micro_batch or ladder.largest_batch(draft)
    if size > 1:
        yield "micro_batch = 1", evolve(candidate, micro_batch=1)


def _smaller(draft: Draft, candidate: Candidate) -> Iterator[Change]:
    """Smaller pictures of the same shapes."""
    assert draft.model is not None
    step = draft.model.family.multiple(draft.model.configs)
    for share in SMALLER:
        shapes = tuple(
            (_scaled(width, share, step), _scaled(height, share, step), batch)
            for width, height, batch in candidate.shapes
        )
        encoded = tuple(
            (_scaled(width, share, step), _scaled(height, share, step), count)
            for width, height, count in candidate.encoded
        )
        changed = evolve(candidate, shapes=shapes, encoded=encoded)
        yield f"a resolution of {share:.0%} of it", changed


def _smaller_pictures(candidate: Candidate) -> Iterator[Change]:
    width, height = max(candidate.pictures, key=lambda size: size[0] * size[1])
    for share in SMALLER:
        size = (_scaled(width, share, 32), _scaled(height, share, 32))
        yield (
            f'validation sizes = ["{size[0]}x{size[1]}"]',
            evolve(candidate, pictures=(size,)),
        )


def _scaled(edge: int, share: float, step: int) -> int:
    return max(step, round(edge * share / step) * step)
