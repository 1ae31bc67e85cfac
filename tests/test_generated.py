"""Pages that are generated say what the code says, and families are named in their own rooms."""

from __future__ import annotations

import re
from pathlib import Path

from compiler.families import FAMILIES
from tuner import families_page, reference

ROOT = Path(__file__).parent.parent
LATER = FAMILIES.keys() - {"sana", "sd3"}  # whose tests lie in files for both


def test_the_reference_is_the_schema_s() -> None:
    assert (ROOT / "docs/reference.md").read_text(encoding="utf-8") == reference.text()


def test_the_families_are_the_cards() -> None:
    assert (ROOT / "docs/families.md").read_text(encoding="utf-8") == families_page.text()


def test_the_page_on_adding_a_family_names_every_place() -> None:
    """Each file that names a family, but for examples of recipes, is one that the page tells of."""
    page = (ROOT / "docs/add-a-family.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`((?:compiler|runtime|tests|recipes|tuner)/[\w./-]+\.py)`", page))
    assert all((ROOT / path.replace("NAME", name)).is_file() for name in LATER for path in told)
    for name in FAMILIES:
        named = re.compile(rf"""(?<!family = )["']{name}["']""")
        for room in ("compiler", "runtime", "tuner"):
            for path in sorted((ROOT / room).rglob("*.py")):
                if named.search(path.read_text(encoding="utf-8")):
                    place = path.relative_to(ROOT).as_posix()
                    assert place.replace(f"/{name}.py", "/NAME.py") in told, (name, place)


def test_nothing_but_its_own_module_asks_for_a_family() -> None:
    """No `if family == "sana"`: what differs stands in the card, or in the module."""
    names = "|".join(map(re.escape, FAMILIES))
    before = r"(==|!=|\bin\b|\bcase\b|startswith)\s*[(\[{]?\s*"
    compared = re.compile(rf"""{before}["']({names})|["']({names})["'] *[=!]=""")
    for line in ('if family == "sd3":', 'if name in ("flux", "x")', 'if "sana" != family:'):
        assert compared.search(line)
    assert not compared.search('"flux": lora_keys.kohya_flux,')
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for room in ("compiler", "runtime", "tuner")
        for path in sorted((ROOT / room).rglob("*.py"))
        if "families" not in path.parts
        for line in path.read_text(encoding="utf-8").splitlines()
        if compared.search(line)
    ]
    assert not found
