"""`tuner explain CODE`: what a diagnostic's code means, and how to be rid of it."""

from __future__ import annotations

from tuner.exits import DONE, REFUSED
from tuner.layout import columns, wrapped
from tuner.screen import err, out


def explain_code(code: str) -> int:
    """One code on stdout, or a line for each without one; 2 if there is no such code."""
    from compiler.codes import CODES
    from compiler.diagnostics import nearest, shown

    if not code:
        out("\n".join(columns([(name, entry.title) for name, entry in CODES.items()], indent=0)))
        return DONE
    wanted = code.rpartition("[")[2].strip("] ").lower()  # also `error[code]`, as it was printed
    if wanted in CODES:
        out(text(wanted))
        return DONE
    guess = nearest(wanted, CODES)
    err(f"error: there is no code `{shown(code)}`")
    err(f"help: did you mean `{guess}`?" if guess else "help: `tuner explain` lists them all")
    return REFUSED


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
