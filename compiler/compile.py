"""Recipe to plan: read, check, resolve."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from compiler.diagnostics import Diagnostic, sort_diagnostics
from compiler.home import default_cache
from compiler.inherit import chain
from compiler.mended import blamed_by, is_echo, mended, without_miscounts
from compiler.overrides import parse_overrides
from compiler.schema import Recipe
from compiler.source import Source, merge, read_source
from compiler.structure import structure, tagged_paths
from compiler.synonyms import SYNONYMS

if TYPE_CHECKING:  # many recipes are refused before any of this is needed
    from compiler.costs import Outlook
    from compiler.data.index import Index
    from compiler.data.manifest import Manifest
    from compiler.draft import Draft
    from compiler.machine import Machine
    from compiler.memory import MemoryModel
    from compiler.plan import Decision, Plan
    from compiler.site import Site


@frozen(kw_only=True)
class Compiled:
    """What came of a recipe. `plan` and `manifest` are None exactly if there are errors."""

    plan: Plan | None
    manifest: Manifest | None
    diagnostics: tuple[Diagnostic, ...]
    texts: Mapping[str, str]  # by file name, for `render`
    outlook: Outlook | None = None  # what the plan costs here; None without a plan
    draft: Draft | None = None  # as far as the passes came; None where the tables are not there

    def decisions(self) -> tuple[Decision, ...]:
        """Every value with its origin: the plan's, or what is known of a recipe with errors."""
        if self.plan is not None:
            return self.plan.decisions
        if self.draft is None:
            return ()
        from compiler.provenance import known

        return known(self.draft)


def compile_file(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    machine: Machine | Callable[[], Machine],
    memory_model: MemoryModel | Callable[[], MemoryModel] | None = None,
    index: Index | Callable[[], Index] | None = None,
    cache_default: Path | None = None,
    presets: Path | None = None,
    site: Site | Callable[[], Site] | None = None,
    train_below: int = 0,
) -> Compiled:
    """Compile the recipe at `path`. Mistakes of the user become diagnostics; nothing is
    written. `train_below` is the most memory for training (bytes), where the budget allows other
    phases more; 0: the budget. `presets` is the folder of shipped presets; a `machine` or `site`
    that takes time to look at is handed in as a function, because many recipes are refused before
    it matters."""
    source, faults = read_source(path, _shown(path))
    layers, more = parse_overrides(overrides)
    faults = [*faults, *more]
    if source is None:
        return _refused(faults, {})
    for layer in layers:
        if "extends" in layer.data:
            faults.append(_not_here(layer))
    parents, more = chain(source, path, presets)
    faults += more
    orphaned = bool(more)  # a parent can't be read, and what it holds isn't known
    located, more = merge([*parents, *layers], tagged_paths(Recipe))
    faults += more
    recipe, more = structure(located.data, Recipe, located, SYNONYMS)
    faults += _without_echoes(more, blamed_by(faults))
    blamed = blamed_by(faults)
    if orphaned or "extends" in blamed:
        return _refused([fault for fault in faults if fault.code != "missing-key"], located.texts)
    if recipe is None:
        rest, blamed = mended(located.data, Recipe, blamed)
        recipe, _ = structure(rest, Recipe, located, SYNONYMS)
    if recipe is None:
        return _refused(faults, located.texts)
    from compiler.draft import Draft

    return _resolved(
        Draft(
            recipe=recipe,
            located=located,
            folder=path.resolve().parent,
            cache_default=cache_default or default_cache(),
            machine=machine() if callable(machine) else machine,
            memory_model=memory_model() if callable(memory_model) else memory_model,
            index=index() if callable(index) else index,
            site=site,
            train_below=train_below,
            diagnostics=list(faults),
        ),
        blamed,
    )


def _resolved(draft: Draft, blamed: frozenset[str]) -> Compiled:
    """The passes over `draft`; what they say of values that the schema refused is left out."""
    from compiler.passes import PASSES

    told = len(draft.diagnostics)
    for draft.running, resolve in PASSES:
        resolve(draft)
    draft.diagnostics[told:] = _without_echoes(draft.diagnostics[told:], blamed)
    return _finished(draft)


def _without_echoes(faults: Sequence[Diagnostic], blamed: frozenset[str]) -> list[Diagnostic]:
    if not blamed:
        return list(faults)
    return [fault for fault in faults if not is_echo(fault, blamed)]


def _not_here(layer: Source) -> Diagnostic:
    return Diagnostic(
        code="no-effect",
        message="`extends` can't be overridden: an override is laid over the finished recipe",
        span=layer.span(("extends",), "key"),
        path="extends",
        help="write a recipe of two lines that extends what you want",
    )


def _shown(path: Path) -> str:
    try:
        return os.path.relpath(path) if not path.is_absolute() else str(path)
    except ValueError:  # another drive on Windows
        return str(path)


def _refused(
    faults: Sequence[Diagnostic], texts: Mapping[str, str], draft: Draft | None = None
) -> Compiled:
    return Compiled(
        plan=None,
        manifest=None,
        draft=draft,
        diagnostics=tuple(sort_diagnostics(faults, tuple(texts))),
        texts=texts,
    )


def _finished(draft: Draft) -> Compiled:
    located = draft.located
    if any(fault.severity == "error" for fault in draft.diagnostics):
        return _refused(without_miscounts(draft.diagnostics), located.texts, draft)
    from compiler.passes.costs import judge_costs

    plan = _plan(draft)
    outlook = judge_costs(draft, plan)
    if any(fault.severity == "error" for fault in draft.diagnostics):
        return _refused(draft.diagnostics, located.texts, draft)
    return Compiled(
        plan=plan,
        manifest=draft.manifest,
        diagnostics=tuple(sort_diagnostics(draft.diagnostics, tuple(located.texts))),
        texts=located.texts,
        outlook=outlook,
        draft=draft,
    )


def _plan(draft: Draft) -> Plan:
    assert draft.precision and draft.text and draft.steps and draft.optimizer
    assert draft.schedule and draft.objective and draft.checkpoints and draft.validation
    assert draft.memory and draft.manifest
    from compiler.passes.components import model_plan
    from compiler.passes.training import max_grad_norm
    from compiler.plan import PLAN_FORMAT, Guard, Plan
    from compiler.provenance import completed

    return Plan(
        format=PLAN_FORMAT,
        name=draft.recipe.name,
        seed=draft.recipe.seed,
        run_folder=draft.run_folder,
        cache_folder=draft.cache_folder,
        device=draft.device,
        model=model_plan(draft),
        adapter=draft.adapter,
        text_training=draft.text_training,
        embeddings=draft.embeddings,
        precision=draft.precision,
        speed=draft.speed,
        text=draft.text,
        sources=draft.sources,
        buckets=draft.buckets,
        manifest=draft.manifest.digest,
        steps=draft.steps,
        sharing=draft.sharing,
        optimizer=draft.optimizer,
        schedule=draft.schedule,
        objective=draft.objective,
        sprint=draft.sprint,
        max_grad_norm=max_grad_norm(draft),
        ema=draft.ema,
        guard=Guard(skip=draft.recipe.train.guard.skip),
        checkpoints=draft.checkpoints,
        validation=draft.validation,
        evaluation=draft.evaluation,
        memory=draft.memory,
        track=draft.recipe.track.to,
        track_project=draft.recipe.track.project if draft.recipe.track.to else "",
        publish=draft.publish,
        workers=draft.workers,
        vae_batch=draft.recipe.cache.batch,
        threads=draft.threads,
        decisions=completed(draft),
    )
