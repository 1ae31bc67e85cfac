"""`extends`: a recipe that holds only differences from another one, or from a shipped preset.

The chain is read from the recipe upwards and laid the other way round: the furthest parent is the
weakest layer. A preset is named `preset:NAME` and lies in the shelf of shipped recipes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compiler.diagnostics import Diagnostic, choices, nearest
from compiler.migrate import migrated
from compiler.source import Source, read_source

PRESET = "preset:"
KEY = ("extends",)
LONGEST = 8  # recipes in one chain; a person can't follow more


def chain(
    source: Source, path: Path, presets: Path | None
) -> tuple[list[Source], list[Diagnostic]]:
    """`source` (read from `path`) and its parents, weakest first, in the present language."""
    layers: list[Source] = []
    faults: list[Diagnostic] = []
    seen = [path.resolve()]
    while True:
        source, more = migrated(source)
        faults += more
        layers.append(source)
        parent = source.data.get("extends")
        if not isinstance(parent, str) or not parent:
            break  # a wrong type is told by the schema
        found = _place(source, parent, seen[-1].parent, presets, faults)
        if found is None:
            break
        place, name = found
        if place.resolve() in seen or len(seen) >= LONGEST:
            faults.append(_circle(source, parent, len(seen)))
            break
        kind = "preset" if parent.startswith(PRESET) else "recipe"
        read, more = read_source(place, name, kind)  # type: ignore[arg-type]
        faults += more
        if read is None:
            break
        seen.append(place.resolve())
        source = read
    return layers[::-1], faults


def preset_names(presets: Path | None) -> list[str]:
    """The names of all shipped presets."""
    return sorted(path.stem for path in presets.glob("*.toml")) if presets is not None else []


def _place(
    source: Source, parent: str, folder: Path, presets: Path | None, faults: list[Diagnostic]
) -> tuple[Path, str] | None:
    """Where the parent's file is, and what it is called in messages."""
    if parent.startswith(PRESET):
        name = parent.removeprefix(PRESET)
        names = preset_names(presets)
        if presets is not None and name in names:
            return presets / f"{name}.toml", parent
        faults.append(_no_preset(source, name, names))
        return None
    try:
        place = (folder / Path(parent).expanduser()).absolute()
        if place.is_file():
            return place, parent
        why = "is a folder" if place.is_dir() else "does not exist"
    except (OSError, ValueError, RuntimeError) as error:
        why = f"is no path: {error}"
    faults.append(
        Diagnostic(
            code="missing-path",
            message=f"the recipe `{parent}` that this one extends {why}",
            span=source.span(KEY),
            path="extends",
            help=f'write `extends = "{PRESET}{parent}"`'
            if parent in preset_names(presets)
            else "give a file (relative to this recipe) or `preset:NAME`",
        )
    )
    return None


def _no_preset(source: Source, name: str, names: Sequence[str]) -> Diagnostic:
    guess = nearest(name, names)
    known = f"known presets: {choices(names)}" if names else "no presets are installed"
    return Diagnostic(
        code="unknown-preset",
        message=f"there is no preset `{name}`",
        span=source.span(KEY),
        path="extends",
        help=f"did you mean `preset:{guess}`?" if guess else known,
    )


def _circle(source: Source, parent: str, length: int) -> Diagnostic:
    return Diagnostic(
        code="extends-circle",
        message=f"`{parent}` extends this recipe itself, or the chain is longer than {LONGEST}",
        span=source.span(KEY),
        path="extends",
        label=f"recipe number {length} of the chain",
    )
