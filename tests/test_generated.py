"""Pages that are generated say what the code says, and families are named in their own rooms."""

from __future__ import annotations

import re
from pathlib import Path

from compiler.families import FAMILIES
from tuner import families_page, reference

ROOT = Path(__file__).parent.parent


def test_the_reference_is_the_schema_s() -> None:
    assert (ROOT / "docs/reference.md").read_text(encoding="utf-8") == reference.text()


def test_the_families_are_the_cards() -> None:
    assert (ROOT / "docs/families.md").read_text(encoding="utf-8") == families_page.text()


def test_nothing_but_its_own_module_asks_for_a_family() -> None:
    """No `if family == "sana"`: what differs stands in the card, or in the module."""
    names = "|".join(map(re.escape, FAMILIES))
    compared = re.compile(rf"""(==|!=|\bin\b|\bcase\b)\s*[(\[{{]?\s*["']({names})["']""")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for room in ("compiler", "runtime", "tuner")
        for path in sorted((ROOT / room).rglob("*.py"))
        if "families" not in path.parts
        for line in path.read_text(encoding="utf-8").splitlines()
        if compared.search(line)
    ]
    assert not found
