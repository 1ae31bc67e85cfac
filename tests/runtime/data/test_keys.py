"""A key changes with all that an encoding depends on, part by part, and with nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve, fields
from hypothesis import given
from hypothesis import strategies as st

from compiler.data.geometry import Placement
from compiler.families import FAMILIES
from compiler.plan import Plan
from runtime.data import keys
from runtime.data.cache import Cache
from runtime.data.keys import LatentKeys, TextKeys, latent_keys, text_keys
from tests.compiler.data.pictures import settle
from tests.runtime.data.fakes import FakeFamily, fake_base
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.tiny import make_tiny

PLACED = Placement(resize_width=80, resize_height=64, crop_x=8, crop_y=0, width=64, height=64)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    base = make_tiny("sana", tmp_path / "sana")
    made, _ = tiny_plan("sana", base, draw_data(tmp_path / "dogs"), tmp_path / "run")
    return fake_base(made, tmp_path / "fake")


def bases(plan: Plan) -> tuple[str, str]:
    """What stands in every key of a text, and of a picture."""
    family: Any = FakeFamily(FAMILIES["sana"])
    cache = Cache(Path(plan.cache_folder))
    return text_keys(plan, family, cache).base, latent_keys(plan, family, cache).base


def changed(before: tuple[str, str], after: tuple[str, str]) -> tuple[bool, bool]:
    return before[0] != after[0], before[1] != after[1]


OTHERS: dict[str, Any] = {
    "resize_width": 81,
    "resize_height": 65,
    "crop_x": 9,
    "crop_y": 1,
    "width": 32,
    "height": 32,
    "mirrored": True,
    "focus": "face",
}


def digest(parts: list[Any]) -> bytes:
    """SHA-256 of canonical JSON, all of it made at once."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).digest()


@given(st.text(st.characters(exclude_categories=())), st.booleans())
def test_the_key_of_a_prompt(prompt: str, negative: bool) -> None:
    """Any text, lone surrogates and quotes included."""
    assert TextKeys("0a").key(prompt, negative=negative) == digest(["0a", prompt, negative])


def test_the_key_of_a_picture() -> None:
    made, content = LatentKeys("0a"), bytes(range(32))
    facts: dict[str, Any] = {
        "resize_width": 80,
        "resize_height": 64,
        "crop_x": 8,
        "crop_y": 0,
        "width": 64,
        "height": 64,
    }
    plain = ["0a", content.hex(), facts]
    assert made.key(content, PLACED) == digest(plain)
    masked = {"mask": "alpha", "mask_version": keys.MASK_VERSION}
    assert made.key(content, PLACED, "alpha") == digest([*plain, masked])
    seen = facts | {"mirrored": True, "focus": "face", "focus_version": keys.FOCUS_VERSION}
    placed = evolve(PLACED, mirrored=True, focus="face")
    assert made.key(content, placed) == digest(["0a", content.hex(), seen])


def test_each_part_of_the_geometry_counts() -> None:
    made = LatentKeys("base")
    placements = [PLACED, *(evolve(PLACED, **{name: other}) for name, other in OTHERS.items())]
    found = {made.key(b"1" * 32, placed) for placed in placements}
    assert len(found) == len(placements)
    assert {each.name for each in fields(Placement)} == OTHERS.keys()


def test_content_and_mask_count() -> None:
    one, other = LatentKeys("base"), LatentKeys("another")
    found = {
        one.key(b"1" * 32, PLACED),
        one.key(b"2" * 32, PLACED),
        one.key(b"1" * 32, PLACED, "alpha"),
        one.key(b"1" * 32, PLACED, "whole"),
        other.key(b"1" * 32, PLACED),
    }
    assert len(found) == 5


@pytest.mark.parametrize(
    ("name", "which"), [("TEXT_VERSION", (True, False)), ("LATENTS_VERSION", (False, True))]
)
def test_the_version_of_the_code_counts(
    plan: Plan, name: str, which: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bases(plan)
    monkeypatch.setattr(keys, name, getattr(keys, name) + 1)
    assert changed(before, bases(plan)) == which


@pytest.mark.parametrize(("name", "placed"), [("MASK_VERSION", "mask"), ("FOCUS_VERSION", "focus")])
def test_the_version_of_what_is_not_always_done_counts_where_it_is(
    name: str, placed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(with_it: bool) -> bytes:
        if placed == "mask":
            return LatentKeys("base").key(b"1" * 32, PLACED, "alpha" if with_it else "")
        return LatentKeys("base").key(b"1" * 32, evolve(PLACED, focus="face" if with_it else ""))

    plain, done = made(False), made(True)
    monkeypatch.setattr(keys, name, getattr(keys, name) + 1)
    assert made(False) == plain and made(True) != done


@pytest.mark.parametrize(
    ("folder", "which"),
    [
        ("vae", (False, True)),
        ("text_encoder", (True, False)),
        ("tokenizer", (True, False)),
        ("transformer", (False, False)),
    ],
)
def test_weights_of_the_encoder_that_is_asked_count(
    plan: Plan, folder: str, which: tuple[bool, bool]
) -> None:
    """Two files of one length, and no other's."""
    weights = Path(plan.model.base) / folder / "model.safetensors"
    weights.write_bytes(b"1")
    settle()
    before = bases(plan)
    weights.write_bytes(b"2")
    settle()
    assert changed(before, bases(plan)) == which


def test_the_number_format_of_the_cache_counts(plan: Plan) -> None:
    half = evolve(plan, precision=evolve(plan.precision, cache="float16"))
    assert changed(bases(plan), bases(half)) == (True, True)


def test_what_only_training_depends_on_does_not_count(plan: Plan) -> None:
    other = evolve(
        plan,
        seed=plan.seed + 1,
        name="other",
        optimizer=evolve(plan.optimizer, lr=0.5),
        precision=evolve(plan.precision, compute="bfloat16"),
    )
    assert bases(plan) == bases(other)
