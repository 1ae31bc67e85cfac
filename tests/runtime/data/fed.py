"""A plan of two sources of pictures; its cache, filled without models, and windows of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compiler.data.manifest import Manifest
from compiler.families import FAMILIES
from compiler.plan import DataSource, Plan
from runtime.data.cache import Cache
from runtime.data.feed import Feed, Window
from runtime.data.fill import (
    fill_latents,
    fill_text,
)
from runtime.events import Silent
from tests.runtime.data.fakes import FakeFamily, fake_base
from tests.runtime.plans import draw_data, source_of, tiny_plan
from tests.runtime.tiny import make_tiny

CPU = torch.device("cpu")
SIZES = [(70, 70)] * 5 + [(120, 60)] * 3


def set_up(
    tmp_path: Path,
    *,
    dropout: float = 0.0,
    batch_size: int = 2,
    accumulate: int = 2,
    edit: Callable[[DataSource], DataSource] = lambda source: source,
    **changes: Any,
) -> tuple[Plan, Manifest, FakeFamily]:
    """A plan with two sources: eight pictures 1.5 times, four pictures once."""
    base = tmp_path.parent / "sana-base"  # one for all tests of a session
    if not base.exists():
        make_tiny("sana", base)
    if not (tmp_path / "dogs").exists():
        draw_data(tmp_path / "dogs", SIZES)
        draw_data(tmp_path / "cats", [(64, 64)] * 3 + [(64, 65)])
    sources = [
        edit(source_of(tmp_path / "dogs", prompt="a dog", repeats="1.5", dropout=dropout)),
        edit(source_of(tmp_path / "cats", prompt="a grey cat")),
    ]
    plan, manifest = tiny_plan(
        "sana",
        base,
        sources,
        tmp_path / "run",
        batch_size=batch_size,
        accumulate=accumulate,
        steps=12,
        **changes,
    )
    return fake_base(plan, tmp_path / "fake"), manifest, FakeFamily(FAMILIES["sana"])


def filled(tmp_path: Path, **changes: Any) -> tuple[Plan, Manifest, FakeFamily, Cache]:
    plan, manifest, family = set_up(tmp_path, **changes)
    cache = Cache(Path(plan.cache_folder))
    fill_text(plan, manifest, family, cache, Silent())
    fill_latents(plan, manifest, family, cache, Silent())
    return plan, manifest, family, cache


def all_windows(feed: Feed, start: int = 0) -> list[Window]:
    return list(feed.windows(start))


def same_windows(one: Window, other: Window) -> bool:
    same = (one.step, one.epoch, one.samples, one.names) == (
        other.step,
        other.epoch,
        other.samples,
        other.names,
    )
    for a, b in zip(one.batches, other.batches, strict=True):
        same &= torch.equal(a.latents, b.latents) and torch.equal(a.noise, b.noise)
        same &= torch.equal(a.sigmas, b.sigmas) and a.text.keys() == b.text.keys()
        same &= all(torch.equal(a.text[name], b.text[name]) for name in a.text)
    return same
