"""Several processes fill one cache: together what one does alone, and they end together."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from compiler.data.manifest import Manifest
from compiler.families import FAMILIES
from compiler.plan import Plan
from runtime import ranks as ranks_module
from runtime.data import cache as cache_module
from runtime.data.cache import Cache
from runtime.data.fill import BrokenData, fill_latents, fill_text
from runtime.data.keys import text_keys
from runtime.data.located import sample_keys
from runtime.data.sharing import Team, team_of
from runtime.errors import RunFailed
from runtime.events import Silent
from runtime.families import family_of
from runtime.families.base import Family
from runtime.ranks import RanksLost, join
from tests.runtime.data.fakes import FakeFamily, fake_base
from tests.runtime.plans import draw_data, source_of, tiny_plan
from tests.runtime.test_ranks_run import free_port
from tests.runtime.tiny import make_tiny
from tests.runtime.whole_runs import fork, wait

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")
SIZES = [(70 + n, 70) for n in range(8)] + [(140, 70)] * 4


def made(tmp_path: Path, name: str = "run", *, fake: bool = True) -> tuple[Plan, Manifest, Any]:
    if not (tmp_path / "base").exists():
        make_tiny("sana", tmp_path / "base")
        for number in range(3):
            draw_data(tmp_path / f"pictures-{number}", SIZES)
    sources = [
        source_of(tmp_path / f"pictures-{n}", prompt=f"prompt {n}", dropout=0.5) for n in range(3)
    ]
    plan, manifest = tiny_plan("sana", tmp_path / "base", sources, tmp_path / name)
    plan = evolve(plan, cache_folder=str(tmp_path / f"{name}-cache"))
    if not fake:
        return plan, manifest, family_of("sana")
    return fake_base(plan, tmp_path / "fake"), manifest, FakeFamily(FAMILIES["sana"])


def together(count: int, work: Callable[[int, Team], int]) -> list[int]:
    """Processes that do `work`. They end with what it gives, 3 where another one is lost, and 4 by
    a failure of their own."""
    port = free_port()

    def one(rank: int) -> int:
        torch.set_num_threads(1)
        places = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in places.items()}}
        group = join()
        try:
            with group.alive():
                code = work(rank, team_of(group))
                if rank:
                    group.offer(f"left-{rank}", "")
                else:  # it holds the store
                    [group.wanted(f"left-{other}") for other in range(1, count)]
                return code
        except RanksLost as error:
            group.fail()
            assert error.message
            return 3
        except RunFailed:
            return 4

    return [fork(lambda rank=rank: one(rank)) for rank in range(count)]  # type: ignore[misc]


def content(plan: Plan, manifest: Manifest, family: Family) -> dict[bytes, dict[str, Any]]:
    """All entries of a plan's cache, by key."""
    cache = Cache(Path(plan.cache_folder))
    keys = text_keys(plan, family, cache)
    names = [keys.key(text) for text in manifest.captions] + [keys.key("", negative=True)]
    every = {*names, *sample_keys(plan, manifest, family, cache)}
    return {key: {n: t.clone() for n, t in cache.get(key).items()} for key in every}


@pytest.mark.parametrize("fake", [True, False], ids=["fake", "sana"])
def test_the_cache_is_that_of_one_process(
    tmp_path: Path, fake: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.data.fill.WORTH_LOADING", 1)
    plan, manifest, family = made(tmp_path, fake=fake)

    def work(rank: int, team: Team) -> int:
        cache, told = Cache(Path(plan.cache_folder)), []
        events = Silent()
        events.advance = lambda done, **_: told.append(done)  # type: ignore[method-assign]
        torch.set_num_threads(plan.threads)
        fill_text(plan, manifest, family, cache, events, team=team)
        fill_latents(plan, manifest, family, cache, events, team)
        assert told == [] or max(told) <= len(manifest)
        if fake:
            (tmp_path / f"did-{rank}").write_text(f"{family.pictures} {len(family.prompts)}")
        return 0

    assert [wait(pid) for pid in together(2, work)] == [0, 0]
    alone, _, _ = made(tmp_path, "alone", fake=fake)
    fill_text(alone, manifest, family, Cache(Path(alone.cache_folder)), Silent())
    fill_latents(alone, manifest, family, Cache(Path(alone.cache_folder)), Silent())
    found, expected = content(plan, manifest, family), content(alone, manifest, family)
    assert found.keys() == expected.keys() and len(found) > 12
    for key, entry in expected.items():
        assert found[key].keys() == entry.keys()
        assert all(torch.equal(found[key][name], tensor) for name, tensor in entry.items())
    if fake:
        did = [tuple(map(int, (tmp_path / f"did-{r}").read_text().split())) for r in range(2)]
        assert all(pictures > 0 and prompts > 0 for pictures, prompts in did)
        assert sum(pictures for pictures, _ in did) == family.pictures
        assert sum(prompts for _, prompts in did) == len(family.prompts)


def test_a_killed_one_loses_nothing_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one notices without any launcher, and ends; the next run does what is missing."""
    monkeypatch.setattr(cache_module, "SHARD_SECONDS", 0.0)  # each entry is written at once
    monkeypatch.setattr(ranks_module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(ranks_module, "SILENCE_SECONDS", 1.5)
    plan, manifest, family = made(tmp_path)

    def work(rank: int, team: Team) -> int:
        encode = family.encode_pixels

        def encode_pixels(vae: Any, pixels: Any) -> Any:
            if rank == 1 and family.pictures == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(vae, pixels)

        family.encode_pixels = encode_pixels
        fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent(), team)
        return 0

    began = time.monotonic()
    assert [wait(pid) for pid in together(2, work)] == [3, -signal.SIGKILL]
    assert time.monotonic() - began < 30
    cache = Cache(Path(plan.cache_folder))
    keys = set(sample_keys(plan, manifest, family, cache))
    left = cache.missing(keys)
    mine = {key for key in keys if int.from_bytes(key[:8], "big") % 2 == 1}
    assert left < mine and len(mine) - len(left) == 4
    fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent())
    assert family.pictures == len(left) and not cache.missing(keys)


def test_all_tell_of_pictures_that_can_not_be_decoded(tmp_path: Path) -> None:
    """Each rank meets some of them; the message has all, and what is whole is cached."""
    plan, manifest, family = made(tmp_path)
    keys = sample_keys(plan, manifest, family, Cache(Path(plan.cache_folder)))
    names = {}
    for rank in range(2):
        row = next(r for r, key in enumerate(keys) if int.from_bytes(key[:8], "big") % 2 == rank)
        names[rank] = row

    def work(rank: int, team: Team) -> int:
        from runtime.data import decode, fill

        real = decode._ready

        def broken(plan: Any, manifest: Any, row: int, *rest: Any) -> Any:
            if row in names.values():
                return fill.BrokenPicture("torn")
            return real(plan, manifest, row, *rest)

        decode._ready = broken
        try:
            fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent(), team)
        except BrokenData as error:
            (tmp_path / f"said-{rank}").write_text(error.message)
            return 7
        return 0

    assert [wait(pid) for pid in together(2, work)] == [7, 7]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert (
        said[0] == said[1] and "6 pictures can't be decoded" in said[0]
    )  # each lies in three folders
    left = Cache(Path(plan.cache_folder)).missing(keys)
    assert left == {keys[row] for row in names.values()}


def test_whose_a_key_is() -> None:
    group = type("Group", (ranks_module.Ranks,), {"count": 3})
    teams = []
    for rank in range(3):
        ranks = group()
        ranks.rank = rank
        teams.append(Team(ranks, (0, 1, 2)))
    for number in range(300):
        key = number.to_bytes(8, "big") + bytes(24)
        assert sum(team.takes(key, 300) for team in teams) == 1
        assert teams[0].takes(key, 20, least=32), "too few to load an encoder for"
        assert [team.takes(key, 70, least=32) for team in teams].count(True) == 1
        assert not teams[2].takes(key, 70, least=32)
    elsewhere = Team(teams[1].ranks, (0, 2))
    assert not any(elsewhere.takes(bytes(7) + bytes([n]) + bytes(24), 300) for n in range(9))
