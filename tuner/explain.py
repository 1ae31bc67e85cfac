"""`tuner explain CODE`: what a code means and how to be rid of it, or what a key is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.exits import DONE, REFUSED
from tuner.layout import columns, wrapped
from tuner.plan_explain import takes
from tuner.screen import err, out

if TYPE_CHECKING:
    from compiler.reference import Row


def explain_code(code: str) -> int:
    """One code (or key of the recipe) on stdout, or a line for each code without one; 2 if there is
    no such code."""
    from compiler.codes import CODES
    from compiler.diagnostics import nearest, shown

    if not code:
        out("\n".join(columns([(name, entry.title) for name, entry in CODES.items()], indent=0)))
        return DONE
    wanted = code.rpartition("[")[2].strip("] ").lower()  # also `error[code]`, as it was printed
    if wanted in CODES:
        out(text(wanted))
        return DONE
    rows = _keys(code)
    if rows:
        out("\n\n".join(key_text(row.key, row) for row in rows))
        return DONE
    guess = nearest(wanted, CODES)
    err(f"error: there is no code `{shown(code)}`")
    err(f"help: did you mean `{guess}`?" if guess else "help: `tuner explain` lists them all")
    return REFUSED


def _keys(key: str) -> list[Row]:
    """The key of the recipe language that is called so, or those that end in it."""
    from compiler.reference import all_rows, row_of

    wanted = key.strip("[] ")
    row = row_of(wanted)
    if row is not None:
        return [row]
    named = [(f".{row.key.replace('[]', '')}", row) for row in all_rows()]
    return [row for name, row in named if wanted and name.endswith(f".{wanted}")]


def key_text(key: str, row: Row) -> str:
    """What a key may be and what it means."""
    lines = [key, "", *wrapped(row.doc, "", "")]
    return "\n".join(lines if row.table else [*lines, "", *takes(row)])


def text(code: str) -> str:
    """The entry of a known code, at most 80 columns wide where its examples are."""
    from compiler.codes import CODES

    entry = CODES[code]
    return "\n".join(
        [
            *wrapped(f"{code}: {entry.title}", "", "  "),
            "",
            *wrapped(entry.meaning, "", ""),
            *_example("wrong", entry.wrong),
            *_example("right", entry.right),
        ]
    )


def _example(word: str, example: str) -> list[str]:
    return ["", f"{word}:", *(f"    {line}" for line in example.split("\n"))]
