"""Which recipes fit this machine: each is planned with what its device has free as the budget.

A shipped recipe names data that is yours to bring. Where that is missing, the recipe is planned
beside a folder of plain square pictures of its resolution, so that memory is judged all the same.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from compiler.compile import Compiled
from compiler.diagnostics import Diagnostic
from compiler.plan import Plan
from tuner.compiling import UNFIT_CODES, compile_here
from tuner.formats import size
from tuner.plan_memory import peak

SECONDS = 15.0
"""No further recipe is simulated after this time; answers are kept, so the next call goes on."""
WHAT_IS_FREE = 'memory.budget="auto"'
PICTURES = 64  # more than any shipped batch
EDGE = 1024  # pixels


@frozen(kw_only=True)
class Judgement:
    """One recipe on this machine. `fits` None: not judged, `words` says why."""

    recipe: str
    fits: bool | None
    words: str
    peak_bytes: int | None
    device: str


def judge_all(recipes: Sequence[Path], device: str) -> list[Judgement]:
    """Every recipe; those that time does not allow are named as not judged."""
    end = time.monotonic() + SECONDS
    return [
        judge(path, device)
        if time.monotonic() < end
        else Judgement(
            recipe=path.name, fits=None, words="not judged yet: run it again", peak_bytes=None,
            device="",
        )
        for path in recipes
    ]  # fmt: skip


def judge(path: Path, device: str) -> Judgement:
    """Whether the recipe at `path` fits what this machine has free; `device` is its first one.

    Where its device is not here, it is told what the recipe needs within its own budget.
    """
    stated = _compiled(path, [])
    if stated.plan is not None and stated.plan.device not in ("cpu", device):
        return judged(path.name, stated, device)
    return judged(path.name, _compiled(path, [WHAT_IS_FREE]), device)


def judged(name: str, found: Compiled, device: str) -> Judgement:
    """The judgement on a compilation."""
    errors = [fault for fault in found.diagnostics if fault.severity == "error"]
    plan = found.plan
    if plan is None:
        unfit = bool(errors) and all(fault.code in UNFIT_CODES for fault in errors)
        return Judgement(
            recipe=name, fits=False if unfit else None, words=_first(errors), peak_bytes=None,
            device="",
        )  # fmt: skip
    lacking = next((fault for fault in found.diagnostics if fault.code == "missing-package"), None)
    if lacking is not None:
        return Judgement(
            recipe=name, fits=False, words=f"{lacking.message}: {lacking.help}", peak_bytes=None,
            device=plan.device,
        )  # fmt: skip
    top = peak(plan)
    needed = top.device_bytes if top else None
    here = plan.device in ("cpu", device)
    words = _fit_words(plan, needed) if here else _absent(plan, needed)
    return Judgement(recipe=name, fits=here, words=words, peak_bytes=needed, device=plan.device)


def _fit_words(plan: Plan, needed: int | None) -> str:
    budget = plan.memory.budget_bytes
    of = f" of {size(budget)} free" if budget else ""
    blocks = plan.memory.layout.activation_checkpointing
    how = f", recomputing every {blocks} blocks" if blocks > 1 else ", recomputing every block"
    return f"needs {size(needed or 0)}{of}" + (how if blocks else "")


def _absent(plan: Plan, needed: int | None) -> str:
    return f"needs {size(needed or 0)} on a {plan.device} device; there is none here"


def _first(errors: Sequence[Diagnostic]) -> str:
    """The message that says most: missing data is yours to bring, the rest is the recipe's."""
    ordered = sorted(errors, key=_is_missing_data)
    return ordered[0].message if ordered else "can't be planned"


def _is_missing_data(fault: Diagnostic) -> bool:
    return fault.code == "missing-path" and fault.path.startswith("data.source")


def _compiled(path: Path, options: Sequence[str]) -> Compiled:
    """The recipe in its place, or beside made-up pictures where its data is missing."""
    found = compile_here(path, options, simulate=False)
    faults = [fault for fault in found.diagnostics if fault.severity == "error"]
    missing = list(filter(_is_missing_data, faults))
    if not missing or len(missing) < len(faults):
        return compile_here(path, options)
    with tempfile.TemporaryDirectory(prefix="tuner-doctor-") as folder:
        return compile_here(_beside(path, Path(folder)), options)


def _beside(path: Path, folder: Path) -> Path:
    """A copy of the recipe in `folder`, with pictures and captions where it looks for them."""
    import tomllib

    text = path.read_text(encoding="utf-8-sig")
    copy = folder / path.name
    copy.write_text(text, encoding="utf-8")
    data: dict[str, Any] = tomllib.loads(text)
    sources = data.get("data", {}).get("source", [])
    for place in {str(source["path"]) for source in sources}:
        target = (folder / place).resolve()
        if target.is_relative_to(folder.resolve()):
            _pictures(target)
    return copy


def _pictures(folder: Path) -> None:
    """Equal square pictures with captions; links to one file, so that they cost nothing."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    first = folder / "0000.png"
    Image.new("RGB", (EDGE, EDGE), (128, 128, 128)).save(first)
    first.with_suffix(".txt").write_text("a picture", encoding="utf-8")
    for number in range(1, PICTURES):
        for original in (first, first.with_suffix(".txt")):
            _link(original, folder / f"{number:04}{original.suffix}")


def _link(original: Path, name: Path) -> None:
    try:
        os.link(original, name)
    except OSError:  # a file system without links
        name.write_bytes(original.read_bytes())
