"""`tuner cache`: what it tells, finds damaged and removes."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from pathlib import Path

import pytest

from runtime.data.cache import Cache, CacheIncomplete
from runtime.data.keep import ORPHAN_SECONDS, Shard, Use, disposable, shards
from runtime.data.store import INDEX, SHARDS, Store
from tests.runtime.data.test_cache import entry, key, same
from tuner.cli import run_command
from tuner.exits import DONE, FAILED, REFUSED

DAY = 86_400.0


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = run_command(["cache", *words])
    found = capsys.readouterr()
    return code, found.out + found.err


def made(folder: Path) -> Cache:
    """Three shards, of 0, 10 and 20 days ago; the run `a` reads the first two."""
    cache = Cache(folder / "cache")
    for number in range(3):
        cache.put(key(number), entry(number, size=1000 * (number + 1)))
        cache.flush()
        with cache.store.writing() as database:
            old = time.time() - 10 * DAY * number - (0 if number == 0 else 60)
            database.execute("UPDATE shards SET written = ? WHERE id = ?", (old, number + 1))
    (folder / "a").mkdir()
    cache.used_by(str(folder / "a"), cache.locate([key(0), key(1)]))
    cache.used_by(str(folder / "gone"), cache.locate([key(2)]))
    return cache


def test_it_tells_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "list", "--path", str(tmp_path / "cache"))[1].startswith("nothing is")
    assert not (tmp_path / "cache").exists()
    cache = made(tmp_path)
    code, text = told(capsys, "list", "--path", str(cache.folder))
    assert code == DONE and "3 shards, 3 entries" in text
    assert str(tmp_path / "a") in text and "used by no run" in text and "gone" not in text
    found = json.loads(told(capsys, "list", "--path", str(cache.folder), "--json")[1])
    assert [list(shard["runs"]) for shard in found["shards"]] == [
        [], [str(tmp_path / "a")], [str(tmp_path / "a")],
    ]  # fmt: skip
    files = [p.stat().st_size for p in cache.folder.rglob("*.safetensors")]
    assert found["bytes"] == sum(files) and sorted(s["bytes"] for s in found["shards"]) == sorted(
        files
    )


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = made(tmp_path)
    assert told(capsys, "verify", "--path", str(cache.folder))[0] == DONE
    path = sorted(cache.folder.rglob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    code, text = told(capsys, "verify", "--path", str(cache.folder))
    assert code == FAILED and path.name in text


def test_prune_says_first_and_removes_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = made(tmp_path)
    where = ("--path", str(cache.folder))
    reader = Cache(cache.folder)
    located = reader.locate([key(2)])
    code, text = told(capsys, "prune", *where, "--unused")
    assert code == DONE and text.startswith("would remove 1 shard of 3")
    assert len(shards(cache.store)) == 3 and len(list(cache.folder.rglob("*.safetensors"))) == 3
    assert told(capsys, "prune", *where, "--unused", "--yes")[1].startswith("removed 1 shard")
    assert Cache(cache.folder).missing(map(key, range(3))) == {key(2)}
    assert len(list(cache.folder.rglob("*.safetensors"))) == 2
    assert same(reader.read(located, 0), entry(2, size=3000))  # who had it mapped goes on
    with pytest.raises(CacheIncomplete):
        Cache(cache.folder).locate([key(2)])
    assert "0 shards" in told(capsys, "prune", *where, "--older", "5 d", "--yes")[1]  # just used


@pytest.mark.parametrize("words", [(), ("--older", "5"), ("--size", "20"), ("--older", "x d")])
def test_what_may_go_must_be_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    code, text = told(capsys, "prune", "--path", str(made(tmp_path).folder), *words)
    assert code == REFUSED and "help: " in text


def test_a_cache_that_noted_no_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = made(tmp_path)
    with cache.store.writing() as database:
        database.execute("DROP TABLE uses")
    cache.close()
    assert "used by no run" in told(capsys, "list", "--path", str(cache.folder))[1]


def test_prune_sweeps_lost_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = made(tmp_path)
    lost = next(cache.folder.rglob("*.safetensors")).parent / "lost.safetensors"
    lost.write_bytes(b"x")
    os.utime(lost, (1, 1))
    told(capsys, "prune", "--path", str(cache.folder), "--unused", "--yes")
    assert not lost.exists()


def shard(number: int, size: int, written: float, used: float | None = None) -> Shard:
    uses = (Use(run="r", used=used),) if used is not None else ()
    return Shard(number=number, name=str(number), bytes=size, written=written, entries=1, uses=uses)


def test_which_go() -> None:
    now = 1e9
    every = [
        shard(1, 10, now - 30 * DAY),
        shard(2, 20, now - 20 * DAY, used=now - DAY),
        shard(3, 40, now - 10 * DAY),
        shard(4, 80, now - ORPHAN_SECONDS / 2),
    ]

    def gone(**asked: object) -> list[int]:
        return [each.number for each in disposable(every, now, **asked)]  # type: ignore[arg-type]

    assert gone(older=15 * DAY) == [1] and gone(older=5 * DAY) == [1, 3]
    assert gone(unused=True) == [1, 3]  # the youngest may still be written
    assert gone(size=150) == [] and gone(size=145) == [1] and gone(size=100) == [1, 3]
    assert gone(size=0) == [1, 3, 2] and gone(size=130, older=15 * DAY) == [1, 3]


def test_listing_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; import runtime.data.keep, tuner.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("verb", ["list", "verify", "prune"])
def test_a_damaged_index_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    (tmp_path / INDEX).write_bytes(b"rubbish" * 500)
    words = ("--unused", "--yes") if verb == "prune" else ()
    code, text = told(capsys, verb, "--path", str(tmp_path), *words)
    assert code == FAILED and text.startswith(f"error: the cache's index {tmp_path / INDEX} is dam")
    assert f"\nhelp: delete the folder {tmp_path}" in text and "Traceback" not in text


@pytest.mark.parametrize("verb", ["list", "verify", "prune"])
def test_an_index_of_something_else_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    with sqlite3.connect(tmp_path / INDEX) as database:
        database.execute("CREATE TABLE letters (text TEXT)")
    database.close()
    words = ("--unused",) if verb == "prune" else ()
    code, text = told(capsys, verb, "--path", str(tmp_path), *words)
    assert code == FAILED and text.startswith("error: the cache can't be read: no such table")


def test_a_cache_that_cant_be_written_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made(tmp_path)

    def full(_: object) -> None:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(Store, "_open_to_write", full)
    code, text = told(capsys, "prune", "--path", str(cache.folder), "--unused", "--yes")
    assert code == FAILED and f"error: the cache {cache.folder} can't be written: attempt" in text


@pytest.mark.parametrize("rows", [0, None])
def test_lost_files_of_a_cache_without_rows_go_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int | None
) -> None:
    """Where nothing else is left, and where the index itself was deleted."""
    if rows is not None:
        cache = Cache(tmp_path)
        with cache.store.writing():
            pass
        cache.close()
    lost = tmp_path / SHARDS / "lost.safetensors"
    lost.parent.mkdir()
    lost.write_bytes(b"x")
    os.utime(lost, (1, 1))
    code, text = told(capsys, "prune", "--path", str(tmp_path), "--unused", "--yes")
    assert code == DONE and "and 1 lost file" in text and not lost.exists()
