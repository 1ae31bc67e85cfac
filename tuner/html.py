"""What the pages that we write have in common: one file each, without script or network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from tuner import __version__

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, body: str, *styles: str) -> str:
    """A whole page; `styles` are names of style sheets in this folder."""
    folder = Path(__file__).parent
    style = "".join((folder / f"{name}.css").read_text(encoding="utf-8") for name in styles)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{body}"
        f"<footer>Written by tuner {__version__}</footer></body></html>\n"
    )


def table(titles: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of finished HTML cells; each title comes with the class of its column."""
    head = "".join(f'<th class="{name}">{title}</th>' for title, name in titles)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{name}">{cell}</td>' for (_, name), cell in zip(titles, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    thead = f"<thead><tr>{head}</tr></thead>" if any(title for title, _ in titles) else ""
    return f'<div class="scroll"><table class="{kind}">{thead}<tbody>{body}</tbody></table></div>'
