"""Prompts that are longer than what the text encoders read are counted when they are encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compiler.data.prompts import Prompt
from runtime.data.cache import Cache
from runtime.data.encoders import Encoders
from runtime.data.fill import fill_text
from runtime.events import Silent
from runtime.families import family_of
from tests.runtime.families.test_sd import objective
from tests.runtime.plans import draw_data, source_of, tiny_plan
from tests.runtime.tiny import make_tiny


class Messages(Silent):
    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def message(self, text: str, level: str = "info") -> None:
        """Keeps it."""
        self.said.append((text, level))


@pytest.mark.parametrize("family", ["sd", "sd3", "pixart", "sana"])
def test_what_is_cut_is_said_once(family: str, tmp_path: Path) -> None:
    base = make_tiny(family, tmp_path / "base")
    draw_data(tmp_path / "dogs", [(64, 64)])

    changes: dict[str, Any] = {} if family != "sd" else {"objective": objective()}
    source = source_of(tmp_path / "dogs", prompt="long " * 90)
    plan, manifest = tiny_plan(family, base, [source], tmp_path / "run", **changes)
    own = family_of(family)
    limit = {"sd": 77, "sd3": max(77, plan.text.max_length), "pixart": plan.text.max_length}.get(
        family, 0
    )
    events = Messages()
    fill_text(plan, manifest, own, Cache(tmp_path / "cache"), events)
    if not limit:  # Gemma's prompts stand in a template
        assert not events.said
        return
    ((text, level),) = events.said
    assert level == "warning"
    assert text.startswith("1 of ") and f"longer than the {limit} tokens" in text
    again = Messages()
    fill_text(plan, manifest, own, Cache(tmp_path / "cache"), again)
    assert not again.said


def test_the_length_is_the_tokenizer_s(tmp_path: Path) -> None:
    """With the marks of begin and end, to the token."""
    base = make_tiny("sd", tmp_path / "base")
    draw_data(tmp_path / "dogs", [(64, 64)])
    plan, _ = tiny_plan("sd", base, tmp_path / "dogs", tmp_path / "run")
    encoders = Encoders(plan, family_of("sd"), lambda name: None, waiting=False)  # type: ignore[arg-type,return-value]
    tokenizer: Any = family_of("sd").load(plan.model, "tokenizer", None, None)  # type: ignore[arg-type]
    counts = {}
    for words in range(1, 80):
        text = " ".join(["a"] * words)
        counts[len(tokenizer(text).input_ids)] = text
    assert {77, 78} <= counts.keys()
    for length, cut in ((77, 0), (78, 1)):
        assert encoders.cut([Prompt(counts[length], False)]) == (cut, 77)
    assert encoders.cut([Prompt(text, False) for text in counts.values()])[0] == sum(
        length > 77 for length in counts
    )
