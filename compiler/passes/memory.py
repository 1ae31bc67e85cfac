"""Peak device memory of every phase, and the settings by which it fits the budget."""

from __future__ import annotations

from attrs import evolve

from compiler import plan
from compiler.draft import Draft
from compiler.memory import Candidate, MemoryModel, Simulation, gib
from compiler.passes import ladder, quicker
from compiler.passes.components import model_plan, settle
from compiler.passes.ladder import Rung
from compiler.passes.optimizer import resolve_optimizer
from compiler.passes.refused import refused
from compiler.passes.sharing import choose_sharded, decide_sharing
from compiler.passes.suggest import refuse
from compiler.passes.text_training import trains
from compiler.schema import OffloadRecipe
from compiler.spans import KeyPath
from compiler.units import ByteSize

BUDGET: KeyPath = ("memory", "budget")


def resolve_memory(draft: Draft) -> None:
    """Fill in `draft.memory`, by simulation where a memory model is at hand, and what of the other
    passes' choices is left to it."""
    if draft.optimizer is None or draft.objective is None or not draft.buckets:
        return
    _judge_offload(draft)
    if any(diagnostic.severity == "error" for diagnostic in draft.diagnostics):
        return  # a recipe that is refused anyway is answered at once
    budget = _budget(draft)
    shared = "the whole model fits each device" if budget else "no budget to fit"
    if draft.memory_model is None:
        rung = ladder.first(draft)
        _settle(draft, rung, "nothing was simulated")
        decide_sharing(draft, "nothing was simulated")
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
        if search.fits(chosen):
            chosen = search.encoders(chosen)
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
    )
    worst = peak(found)
    if budget and worst.device_bytes > budget:
        refuse(draft, search.candidate(chosen), draft.memory_model, budget, worst, blame(draft))


def peak(found: Simulation) -> plan.Phase:
    """The phase that needs most."""
    return max(found.phases, key=lambda phase: phase.device_bytes)


ROOM = 0.7
"""Of a host's memory, what may be taken by what waits there: the system, the libraries and the
data's own buffers need the rest."""


class Search:
    """Looks for a rung that fits and is quick, by simulating as few as it can."""

    def __init__(self, *, draft: Draft, model: MemoryModel, base: Candidate, budget: int) -> None:
        self.draft, self.model, self.base, self.budget = draft, model, base, budget
        self.rungs = ladder.rungs(draft)
        self._found: dict[Rung, Simulation] = {}

    def run(self) -> Rung:
        """The first rung that fits, or one beside the ladder that fits and is quicker; the last
        one if none does. Raises ValueError."""
        chosen = self._first_that_fits()
        if chosen == self.rungs[0] or not self.fits(chosen):
            return chosen
        best, tries = chosen, quicker.TRIES
        largest = ladder.largest_batch(self.draft)
        for other in quicker.beside(self.rungs, chosen, self._room, largest):
            enough = quicker.WORTH * self._seconds(best)
            if not tries or self._at_least(other, chosen) > enough:
                continue
            tries -= 1
            if self.fits(other) and self._waits(other) and self._seconds(other) <= enough:
                best = other
        if best != chosen:
            self._insert(best, self.rungs.index(chosen))
        return best

    def _first_that_fits(self) -> Rung:
        low, high = 0, len(self.rungs) - 1
        if not self.budget or self.fits(self.rungs[0]) or not high:
            return self.rungs[0]
        if not self.fits(self.rungs[high]):
            return self.rungs[high]
        while high - low > 1:  # rung `low` does not fit, rung `high` does
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(self.rungs[middle]) else (middle, high)
        return self.rungs[high]

    def _room(self, rung: Rung) -> quicker.Room:
        phases = [p for p in self.look(rung).phases if p.name not in self.apart]
        train = next(p for p in phases if p.name == "train")
        activations = train.parts.get("activations", 0)
        others = max((p.device_bytes for p in phases if p is not train), default=0)
        left = self.budget - (train.device_bytes - activations)
        return quicker.Room(
            activations=activations, left=left if others <= self.budget else self.budget - others
        )

    def _waits(self, rung: Rung) -> bool:
        """Whether what waits on the host in a step finds room there, as far as its size is known:
        a rung of the ladder may need much less of it."""
        total = self.draft.machine.host_total_bytes
        return not total or ladder.waiting_bytes(self.look(rung)) <= ROOM * total

    def _seconds(self, rung: Rung) -> float:
        start = self.look(self.rungs[0])
        return ladder.seconds(self.draft, rung, self.look(rung), start)

    def _at_least(self, rung: Rung, like: Rung) -> float:
        """What the computing of `rung`, which has the weights of `like` or of the first rung, will
        take."""
        start = self.look(self.rungs[0])
        known = start if rung.checkpointing == self.rungs[0].checkpointing else self.look(like)
        return ladder.seconds(self.draft, rung, evolve(known, phases=()), start)

    def _insert(self, rung: Rung, place: int) -> None:
        """Put `rung` on the ladder; what is below it there is to need less."""
        below = (r for r in self.rungs[place:] if r not in self._found or self._less(r, rung))
        self.rungs[place:] = [rung, *below]

    def _less(self, rung: Rung, other: Rung) -> bool:
        return self._peak(rung) < self._peak(other)

    def encoders(self, chosen: Rung) -> Rung:
        """Quantise text encoders that are left open, where they would not fit."""
        for name in _open_encoders(self.draft):
            for kind in ladder.FEWER_BITS:
                needed = (p.device_bytes for p in self.look(chosen).phases if p.name == name)
                if not self.budget or max(needed, default=0) <= self.budget:
                    break
                why = f"the fewest bits saved that fit {gib(self.budget)} while it encodes"
                settle(self.draft, name, kind, why=why)
                self.base = _candidate(self.draft)
                del self._found[chosen]  # other rungs are judged by what comes after
        return chosen

    def candidate(self, rung: Rung) -> Candidate:
        """What is simulated for `rung`."""
        return ladder.candidate_of(self.draft, self.base, rung)

    def look(self, rung: Rung) -> Simulation:
        """The simulation of `rung`; each is run once."""
        if rung not in self._found:
            self._found[rung] = self.model.simulate(self.candidate(rung))
        return self._found[rung]

    def fits(self, rung: Rung) -> bool:
        """Whether no phase that the ladder has a say in exceeds the budget."""
        return not self.budget or self._peak(rung) <= (self.draft.train_below or self.budget)

    def _peak(self, rung: Rung) -> int:
        return max(p.device_bytes for p in self.look(rung).phases if p.name not in self.apart)

    @property
    def apart(self) -> frozenset[str]:
        """Phases that the ladder has no say in: those of text encoders, and of the latents."""
        assert self.draft.model is not None
        return frozenset({*self.draft.model.family.text_encoders, "latents"})

    def why(self, chosen: Rung) -> str:
        """The reason for `chosen`."""
        if not self.budget:
            return "no budget to fit"
        if not self.fits(chosen):
            return "the least memory there is; it still does not fit"
        if chosen == self.rungs[0]:
            return f"nothing has to be saved to fit {gib(self.budget)}"
        return f"the fastest tried that fits {gib(self.budget)}"

    def seen(self, chosen: Rung) -> tuple[plan.Rung, ...]:
        """The ladder, as far as it was looked at, with the rungs next to `chosen`."""
        if len(self.rungs) == 1 or not self.budget:
            return ()
        place = self.rungs.index(chosen)
        for neighbour in self.rungs[max(place - 1, 0) : place + 2]:
            self.look(neighbour)
        known = [rung for rung in self.rungs if rung in self._found]
        start = self.look(self.rungs[0])
        fastest = ladder.seconds(self.draft, self.rungs[0], start, start)
        return tuple(
            plan.Rung(
                settings=ladder.settings(self.draft, rung),
                peak_bytes=self._peak(rung),
                relative_time=round(
                    ladder.seconds(self.draft, rung, self.look(rung), start) / fastest, 3
                ),
                alters=ladder.alters(self.rungs[0], rung),
                chosen=rung == chosen,
            )
            for rung in known
        )


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
    decided: dict[KeyPath, object] = {
        ("memory", "activation_checkpointing"): rung.checkpointing or "off",
        ("memory", "fused_backward"): rung.fused_backward,
        ("memory", "offload", "activations"): rung.activations,
        ("memory", "offload", "blocks"): rung.blocks,
        ("memory", "micro_batch"): rung.micro_batch or "whole batches",
        ("memory", "on_oom"): draft.recipe.memory.on_oom,
    }
    if not isinstance(draft.recipe.memory.offload, OffloadRecipe):
        decided["memory", "offload"] = _offloaded(rung)
    for path, value in decided.items():
        draft.decide(path, value, by="decided", why=why)


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
        elif offload.blocks > ladder.depth(draft):
            draft.error(
                "out-of-range",
                where,
                f"{offload.blocks} is out of range",
                label=f"the {draft.model.family.trained_component} has {ladder.depth(draft)} "
                "blocks",
            )
    if draft.device == "cpu":
        _judge_idle_offload(draft, offload)
    size = draft.recipe.memory.micro_batch
    if isinstance(size, int) and size > ladder.largest_batch(draft):
        draft.warn(
            "no-effect",
            ("memory", "micro_batch"),
            f"no batch has {size} samples: the largest has {ladder.largest_batch(draft)}",
        )


def _judge_idle_offload(draft: Draft, offload: OffloadRecipe) -> None:
    """Warn of what would wait where it is anyway."""
    asked = {
        "activations": offload.activations is True,
        "blocks": offload.blocks not in ("auto", 0),
    }
    for key in (key for key, on in asked.items() if on):
        draft.warn(
            "no-effect",
            ("memory", "offload", key),
            f"where the processor trains, {key} are in host memory anyway: offloading them saves "
            "nothing and takes time",
            help=f"leave `{key}` out",
            of="key",
        )


def _budget(draft: Draft) -> int:
    asked = draft.recipe.memory.budget
    if isinstance(asked, ByteSize):
        draft.decide(BUDGET, asked)
        _judge_budget(draft, int(asked))
        return int(asked)
    if asked == "none":
        draft.decide(BUDGET, "none")
        return 0
    if draft.device != draft.machine.device:
        draft.decide(BUDGET, "none", by="decided", why=f"no {draft.device} device here to ask")
        return 0
    free = draft.machine.device_free_bytes
    draft.decide(BUDGET, gib(free), by="this machine", why="free on the device now")
    return free


def _judge_budget(draft: Draft, budget: int) -> None:
    """Warn of more than the device has, where it is this machine's."""
    total = draft.machine.device_total_bytes
    if draft.device == draft.machine.device and 0 < total < budget:
        draft.warn(
            "budget-too-large",
            BUDGET,
            f"{draft.machine.device_name} has {gib(total)}: a plan that fits {gib(budget)} may not "
            "fit it",
            help='leave `budget` out, or `--device "80 GiB"` to plan for another device',
        )


def _candidate(draft: Draft) -> Candidate:
    assert draft.precision and draft.text and draft.objective and draft.optimizer and draft.steps
    drawn = draft.validation if draft.validation and draft.validation.prompts else None
    groups = draft.evaluation.groups if draft.evaluation else ()
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
        device=draft.device,
        attention=draft.speed.attention,
        channels_last=draft.speed.channels_last,
        fused_projections=draft.speed.fused_projections,
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
