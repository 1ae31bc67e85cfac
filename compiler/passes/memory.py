"""Peak device memory of every phase, and the settings by which it fits the budget."""

from __future__ import annotations

from attrs import evolve

from compiler import plan
from compiler.draft import Draft
from compiler.memory import Candidate, Simulation, encoded_shapes, gib
from compiler.passes import ladder
from compiler.passes.components import model_plan, settle
from compiler.passes.host_memory import judge_host
from compiler.passes.ladder import Rung
from compiler.passes.optimizer import resolve_optimizer
from compiler.passes.refused import refused
from compiler.passes.search import Search
from compiler.passes.sharing import choose_sharded, decide_sharing
from compiler.passes.suggest import refuse
from compiler.passes.text_training import trains
from compiler.schema import OffloadRecipe
from compiler.spans import KeyPath
from compiler.units import ByteSize

BUDGET: KeyPath = ("memory", "budget")
MICRO_BATCH: KeyPath = ("memory", "micro_batch")


def resolve_memory(draft: Draft) -> None:
    """Fill in `draft.memory`, by simulation where a memory model is at hand, and what of the other
    passes' choices is left to it."""
    if draft.optimizer is None or draft.objective is None or not draft.buckets:
        return
    _judge_offload(draft)
    _judge_checkpointing(draft)
    if any(diagnostic.severity == "error" for diagnostic in draft.diagnostics):
        return  # a recipe that is refused anyway is answered at once
    budget = _budget(draft)
    shared = "the whole model fits each device" if budget else "no budget to fit"
    if draft.memory_model is None:
        rung = ladder.first(draft)
        _settle(draft, rung, "nothing was simulated")
        decide_sharing(draft, "nothing was simulated")
        _judge_budget(draft, 0)
        draft.memory = plan.Memory(
            budget_bytes=budget,
            layout=rung.layout,
            on_oom=draft.recipe.memory.on_oom,
            phases=(),
        )
        return
    search = Search(draft=draft, model=draft.memory_model, base=_candidate(draft), budget=budget)
    try:
        chosen = search.run()
        if not search.fits(chosen) and choose_sharded(draft):
            shared = "the model does not fit each device whole"
            search = Search(
                draft=draft, model=draft.memory_model, base=_candidate(draft), budget=budget
            )
            chosen = search.run()
        _fit_encoders(search, chosen)  # also of what is refused: its advice is of what is left
        found = search.look(chosen)
    except ValueError as error:
        refused(draft, str(error))
        return
    _settle(draft, chosen, search.why(chosen))
    decide_sharing(draft, shared)
    draft.memory = plan.Memory(
        budget_bytes=budget,
        layout=chosen.layout,
        on_oom=draft.recipe.memory.on_oom,
        phases=found.phases,
        ladder=search.seen(chosen),
        counts={
            "parameters": found.parameters,
            "trainable": found.trainable,
            "adapted": found.adapted_modules,
            "flops": found.flops,
        },
        overhead=search.overhead(chosen),
    )
    worst = peak(found)
    if budget and worst.device_bytes > budget:
        refuse(draft, search.candidate(chosen), draft.memory_model, budget, worst, blame(draft))
    else:
        _judge_budget(draft, worst.device_bytes)
        judge_host(draft, chosen.layout, found.phases)


def peak(found: Simulation) -> plan.Phase:
    """The phase that needs most."""
    return max(found.phases, key=lambda phase: phase.device_bytes)


def _fit_encoders(search: Search, chosen: Rung) -> None:
    """Quantise text encoders that are left open, where they would not fit; those that none makes
    fit, as the last kind."""
    budget = search.budget
    for name in _open_encoders(search.draft):
        for kind in ladder.FEWER_BITS:
            needed = (p.device_bytes for p in search.look(chosen).phases if p.name == name)
            if not budget or max(needed, default=0) <= budget:
                break
            why = f"the fewest bits saved that fit {gib(budget)} while it encodes; it alters the "
            why += "result a little"
            settle(search.draft, name, kind, why=why)
            search.base = _candidate(search.draft)
            del search.found[chosen]  # other rungs are judged by what comes after


def _open_encoders(draft: Draft) -> list[str]:
    assert draft.model is not None
    return [
        name
        for name in draft.model.family.text_encoders
        if getattr(draft.recipe.model, name).quantize == "auto" and not _learns(draft, name)
    ]


def _learns(draft: Draft, name: str) -> bool:
    """Whether text encoder `name` is there in each step."""
    words = draft.embeddings
    return trains(draft, name) or (words is not None and name in words.encoders)


def _settle(draft: Draft, rung: Rung, why: str) -> None:
    """Put what the rung says where the other passes left it open."""
    assert draft.model is not None and draft.optimizer is not None and draft.steps is not None
    trained = draft.model.family.trained_component
    if getattr(draft.recipe.model, trained).quantize == "auto":
        words = f"{why}; it alters the result a little" if rung.quantize != "none" else why
        settle(draft, trained, rung.quantize, why=words)
    if rung.optimizer != draft.optimizer.name:
        words = f"{why}; it alters the result a little"
        draft.optimizer = resolve_optimizer(draft, rung.optimizer, why=words)
    draft.steps = evolve(draft.steps, micro_batch=rung.micro_batch)
    parted = rung.micro_batch and rung.micro_batch != ladder.first(draft).micro_batch
    decided: dict[KeyPath, object] = {
        ("memory", "activation_checkpointing"): rung.checkpointing or "off",
        ("memory", "fused_backward"): rung.fused_backward,
        ("memory", "offload", "activations"): rung.activations,
        ("memory", "offload", "blocks"): rung.blocks,
    }
    if not isinstance(draft.recipe.memory.offload, OffloadRecipe):
        decided["memory", "offload"] = _offloaded(rung)
    for path, value in decided.items():
        draft.decide(path, value, by="decided", why=why)
    words = f"{why}; it alters the result a little" if parted else why
    draft.decide(MICRO_BATCH, rung.micro_batch or "whole batches", by="decided", why=words)
    draft.decide(("memory", "on_oom"), draft.recipe.memory.on_oom)


def _offloaded(rung: Rung) -> str:
    parts = ["activations"] if rung.activations else []
    parts += [f"{rung.blocks} blocks"] if rung.blocks else []
    return ", ".join(parts) or "none"


def _judge_offload(draft: Draft) -> None:
    """What can't wait on the host, or can't be cut smaller."""
    if draft.model is None:
        return
    offload, where = ladder.offload_of(draft), ("memory", "offload", "blocks")
    if offload.blocks != "auto" and offload.blocks > 0:
        if draft.adapter is None:
            draft.error(
                "conflict",
                where,
                "all blocks are trained, and weights that are trained can't wait on the host",
                help="train an adapter, or leave `blocks` out",
            )
        elif draft.device not in ladder.BLOCKS_WAIT:
            draft.error(
                "conflict",
                where,
                f"blocks can't wait on the host where {draft.device} trains, only where cuda does",
                help="leave `blocks` out",
            )
        elif offload.blocks > ladder.depth(draft):
            draft.error(
                "out-of-range",
                where,
                f"{offload.blocks} is out of range",
                label=f"the {draft.model.family.trained_component} has {ladder.depth(draft)} "
                "blocks",
            )
    if draft.device in ladder.ON_THE_HOST:
        _judge_idle_offload(draft, offload)
    size = draft.recipe.memory.micro_batch
    if isinstance(size, int) and size > ladder.largest_batch(draft):
        draft.warn(
            "no-effect",
            ("memory", "micro_batch"),
            f"no batch has {size} samples: the largest has {ladder.largest_batch(draft)}",
        )


def _judge_checkpointing(draft: Draft) -> None:
    """An interval has to end within the model."""
    if draft.model is None:
        return
    interval, blocks = draft.recipe.memory.activation_checkpointing, ladder.depth(draft)
    if isinstance(interval, int) and interval > blocks:
        draft.error(
            "out-of-range",
            ("memory", "activation_checkpointing"),
            f"{interval} is out of range",
            label=f"the {draft.model.family.trained_component} has {blocks} blocks",
        )


def _judge_idle_offload(draft: Draft, offload: OffloadRecipe) -> None:
    """Warn of what would wait where it is anyway."""
    asked = {
        "activations": offload.activations is True,
        "blocks": offload.blocks not in ("auto", 0) and draft.device in ladder.BLOCKS_WAIT,
    }
    whose = ladder.ON_THE_HOST[draft.device]
    for key in (key for key, on in asked.items() if on):
        draft.warn(
            "no-effect",
            ("memory", "offload", key),
            f"where {whose} trains, {key} are in host memory anyway: offloading them saves "
            "nothing and takes time",
            help=f"leave `{key}` out",
            of="key",
        )


def _budget(draft: Draft) -> int:
    asked = draft.recipe.memory.budget
    if isinstance(asked, ByteSize):
        draft.decide(BUDGET, asked)
        return int(asked)
    if asked == "none":
        draft.decide(BUDGET, "none")
        return 0
    if draft.device != draft.machine.device:
        draft.decide(BUDGET, "none", by="decided", why=f"no {draft.device} device here to ask")
        return 0
    free = draft.machine.device_free_bytes
    if not draft.machine.device_total_bytes:
        why = f"{draft.machine.device_name} does not tell how much memory it has"
        draft.decide(BUDGET, "none", by="decided", why=why)
        return 0
    draft.decide(BUDGET, gib(free), by="this machine", why=draft.machine.free_is)
    return free


def _judge_budget(draft: Draft, needed: int) -> None:
    """Warn of more than the device has, where that is known. `needed` 0: nothing was simulated."""
    asked, total = draft.recipe.memory.budget, draft.machine.device_total_bytes
    stated = int(asked) if isinstance(asked, ByteSize) else 0
    if draft.device != draft.machine.device or asked == "auto" or not total:
        return
    if max(stated, needed) <= total or (needed > total and draft.device == "cpu"):
        return  # in the second case `judge_host` says so
    name = draft.machine.device_name
    if needed > total:
        words = f"this plan needs {gib(needed)}, and {name} has {gib(total)}: the run would end "
        if gib(needed) == gib(total):
            words = f"this plan needs {gib(needed - total)} more than the {gib(total)} of {name}: "
            words += "the run would end "
        words += "for want of memory"
    elif needed:
        words = f"the budget is more than the {gib(total)} of {name}; this plan needs {gib(needed)}"
    else:
        words = f"{name} has {gib(total)}: a plan that fits {gib(stated)} may not fit it"
    draft.warn(
        "budget-too-large",
        BUDGET,
        words,
        help="leave `budget` out: what is open is then chosen by what the device has",
    )


def _candidate(draft: Draft) -> Candidate:
    assert draft.precision and draft.text and draft.objective and draft.optimizer and draft.steps
    drawn = draft.validation if draft.validation and draft.validation.prompts else None
    groups = draft.evaluation.groups if draft.evaluation else ()
    together = draft.recipe.cache.batch
    return Candidate(
        model=model_plan(draft),
        adapter=draft.adapter,
        precision=draft.precision,
        text=draft.text,
        objective=draft.objective,
        sprint=draft.sprint,
        optimizer=draft.optimizer,
        max_grad_norm=draft.recipe.train.max_grad_norm,
        ema_on_device=draft.ema is not None
        and (draft.ema.device == "same" or draft.device == "cpu"),
        ema_on_host=draft.ema is not None and draft.ema.device == "cpu" != draft.device,
        accumulate=draft.steps.accumulate,
        ranks=draft.steps.ranks,
        sharing=draft.sharing,
        layout=plan.Layout(),
        shapes=tuple(
            sorted({(b.width, b.height, min(b.batch_size, b.samples)) for b in draft.buckets})
        ),
        pictures=drawn.sizes if drawn else (),
        guidance=drawn.guidance if drawn else 0.0,
        clip_bytes=draft.clip_bytes if drawn else 0,
        sampler=drawn.scheduler if drawn else "",
        evaluated=tuple(sorted({(g.width, g.height, min(g.batch_size, g.images)) for g in groups})),
        encoded=encoded_shapes(draft.buckets, groups, together) if together > 1 else (),
        device=draft.device,
        capability=draft.machine.capability if draft.device == draft.machine.device else "",
        tf32=draft.speed.tf32,
        attention=draft.speed.attention,
        channels_last=draft.speed.channels_last,
        fused_projections=draft.speed.fused_projections,
        compiled=draft.speed.compile != "off",
        masked=any(source.mask for source in draft.sources),
        text_training=draft.text_training,
        embeddings=draft.embeddings,
        keeps_base=any(source.target == "base" for source in draft.sources),
    )


def blame(draft: Draft) -> KeyPath:
    """The key that a run which does not fit is blamed on."""
    for path in (BUDGET, ("train", "batch_size"), ("model", "base")):
        if draft.given(path):
            return path
    return ("model",)
