"""Recipe to plan: read, check, resolve."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from compiler.diagnostics import Diagnostic, sort_diagnostics
from compiler.inherit import chain
from compiler.schema import Recipe
from compiler.source import Source, dotted, merge, parse_overrides, read_source
from compiler.spans import KeyPath
from compiler.structure import structure, tagged_paths
from compiler.synonyms import SYNONYMS

if TYPE_CHECKING:  # many recipes are refused before any of this is needed
    from compiler.costs import Outlook
    from compiler.data.index import Index
    from compiler.data.manifest import Manifest
    from compiler.draft import Draft
    from compiler.machine import Machine
    from compiler.memory import MemoryModel
    from compiler.plan import Plan
    from compiler.site import Site


@frozen(kw_only=True)
class Compiled:
    """What came of a recipe. `plan` and `manifest` are None exactly if there are errors."""

    plan: Plan | None
    manifest: Manifest | None
    diagnostics: tuple[Diagnostic, ...]
    texts: Mapping[str, str]  # by file name, for `render`
    outlook: Outlook | None = None  # what the plan costs here; None without a plan


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
) -> Compiled:
    """Compile the recipe at `path`. Mistakes of the user become diagnostics; nothing is
    written. `presets` is the folder of shipped presets; a `machine` or `site` that takes time to
    look at is handed in as a function, because many recipes are refused before it matters."""
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
    located, more = merge([*parents, *layers], tagged_paths(Recipe))
    faults += more
    recipe, more = structure(located.data, Recipe, located, SYNONYMS)
    faults += more
    blamed = frozenset(fault.path for fault in faults if fault.severity == "error")
    if recipe is None:
        recipe, _ = structure(_without(located.data, blamed), Recipe, located, SYNONYMS)
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
    draft.diagnostics[told:] = [
        fault
        for fault in draft.diagnostics[told:]
        if not any(_below(fault.path, path) for path in blamed)
    ]
    return _finished(draft)


def _not_here(layer: Source) -> Diagnostic:
    return Diagnostic(
        code="no-effect",
        message="`extends` can't be overridden: an override is laid over the finished recipe",
        span=layer.span(("extends",), "key"),
        path="extends",
        help="write a recipe of two lines that extends what you want",
    )


def _without(data: dict[str, Any], blamed: frozenset[str]) -> dict[str, Any]:
    """`data` without the keys at the dotted paths `blamed`: what is left is judged all the same, so
    that a person sees every mistake at once."""

    def kept(node: Any, path: KeyPath) -> Any:
        if isinstance(node, dict):
            rows = ((key, (*path, key), value) for key, value in node.items())
            return {key: kept(value, at) for key, at, value in rows if dotted(at) not in blamed}
        if isinstance(node, list):
            return [kept(value, (*path, number)) for number, value in enumerate(node)]
        return node

    found = kept(data, ())
    assert isinstance(found, dict)
    return found


def _below(path: str, blamed: str) -> bool:
    """Whether `path` is `blamed` or inside it."""
    return path == blamed or path.startswith((f"{blamed}.", f"{blamed}["))


def default_cache() -> Path:
    """The user's cache folder, by the XDG rule."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base).resolve() / "tuner"


def _shown(path: Path) -> str:
    try:
        return os.path.relpath(path) if not path.is_absolute() else str(path)
    except ValueError:  # another drive on Windows
        return str(path)


def _refused(faults: Sequence[Diagnostic], texts: Mapping[str, str]) -> Compiled:
    return Compiled(
        plan=None,
        manifest=None,
        diagnostics=tuple(sort_diagnostics(faults, tuple(texts))),
        texts=texts,
    )


def _finished(draft: Draft) -> Compiled:
    located = draft.located
    if any(fault.severity == "error" for fault in draft.diagnostics):
        return _refused(draft.diagnostics, located.texts)
    from compiler.passes.costs import judge_costs

    plan = _plan(draft)
    outlook = judge_costs(draft, plan)
    if any(fault.severity == "error" for fault in draft.diagnostics):
        return _refused(draft.diagnostics, located.texts)
    return Compiled(
        plan=plan,
        manifest=draft.manifest,
        diagnostics=tuple(sort_diagnostics(draft.diagnostics, tuple(located.texts))),
        texts=located.texts,
        outlook=outlook,
    )


def _plan(draft: Draft) -> Plan:
    assert draft.precision and draft.text and draft.steps and draft.optimizer
    assert draft.schedule and draft.objective and draft.checkpoints and draft.validation
    assert draft.memory and draft.manifest
    from compiler.passes.components import model_plan
    from compiler.plan import PLAN_FORMAT, Plan
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
        precision=draft.precision,
        text=draft.text,
        sources=draft.sources,
        buckets=draft.buckets,
        manifest=draft.manifest.digest,
        steps=draft.steps,
        optimizer=draft.optimizer,
        schedule=draft.schedule,
        objective=draft.objective,
        max_grad_norm=float(draft.recipe.train.max_grad_norm),
        ema=draft.ema,
        checkpoints=draft.checkpoints,
        validation=draft.validation,
        memory=draft.memory,
        track=draft.recipe.track.to,
        workers=draft.workers,
        threads=draft.threads,
        decisions=completed(draft),
    )
