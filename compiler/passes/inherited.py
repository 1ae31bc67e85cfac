"""Values that a source may leave to `[data]`, and settings that nothing makes use of."""

from __future__ import annotations

from typing import Any

from attrs import Factory, define

from compiler.draft import Draft
from compiler.spans import KeyPath


def path_of(draft: Draft, where: KeyPath, *keys: str) -> KeyPath:
    """Where the value of a source's key is from: the source's own entry, or that of `[data]`."""
    own = (*where, *keys)
    return own if draft.given(own) else ("data", *keys)


def inherited(draft: Draft, where: KeyPath, table: str, key: str, name: str = "") -> Any:
    """A value of a source's table, else of `[data]`'s table of that name, key by key."""
    number = where[2]
    assert isinstance(number, int)
    path = path_of(draft, where, table, key)
    own = getattr(draft.recipe.data.source[number], table)
    holder = own if own is not None and path[: len(where)] == where else None
    value = getattr(holder or getattr(draft.recipe.data, table), name or key)
    draft.decide(path, value)
    return value


def own_or_data(draft: Draft, where: KeyPath, key: str) -> Any:
    """A plain value of a source, else of `[data]`."""
    number = where[2]
    assert isinstance(number, int)
    own = getattr(draft.recipe.data.source[number], key)
    value = getattr(draft.recipe.data, key) if own is None else own
    draft.decide((*where, key) if own is not None else ("data", key), value)
    return value


@define
class Effects:
    """Which stated settings matter to a source. What stands in `[data]` matters if it matters to
    any of them."""

    used: set[KeyPath] = Factory(set)
    idle: dict[KeyPath, tuple[str, str]] = Factory(dict)  # (why, help)

    def note(
        self, draft: Draft, where: KeyPath, *keys: str, used: bool, why: str, help: str = ""
    ) -> None:
        """Whether the setting has an effect on the source at `where`; if not, why not."""
        path = path_of(draft, where, *keys)
        if used:
            self.used.add(path)
        elif draft.given(path):
            self.idle.setdefault(path, (why, help))

    def report(self, draft: Draft) -> None:
        """An error for each setting that was stated and matters nowhere."""
        for path, (why, help) in self.idle.items():
            if path not in self.used:
                draft.error(
                    "no-effect", path, f"`{path[-1]}` has no effect: {why}", of="key", help=help
                )
