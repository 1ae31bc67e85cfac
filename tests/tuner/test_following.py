"""Ranks of another launcher whose rank 0 has refused: all end at once, alike, and one says why."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from runtime import ranks
from runtime.ranks import Group, RanksLost
from tests.runtime.test_ranks_run import free_port
from tuner import worker
from tuner.exits import BUG, DONE, FAILED, REFUSED, STOPPED


def processes(folder: Path, count: int, *command: str) -> list[tuple[int, str]]:
    """Exit code and all output of each rank of `tuner run`."""
    port, started = str(free_port()), []
    for rank in range(count):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
        given = {name: str(value) for name, value in places.items()}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tuner", "run", *command],
                cwd=folder,
                env=os.environ | given | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        return [(p.wait(timeout=120), p.stdout.read() if p.stdout else "") for p in started]
    finally:
        for process in started:
            process.kill()


def test_a_refused_recipe_ends_all_ranks_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('name = "x"\nrnk = 3\n')
    (code, said), (code_b, said_b) = processes(tmp_path, 2, "recipe.toml")
    assert code == code_b == REFUSED
    assert "unknown-key" in said and said_b == ""


def test_those_that_wait_end_with_the_code_that_they_are_told() -> None:
    store = HashStore()
    leader, follower = Group(store, 0, 2, 0), Group(store, 1, 2, 1)
    telling = threading.Thread(target=leader.dismiss, args=(REFUSED,))
    telling.start()
    with pytest.raises(RanksLost) as lost:
        follower.wanted("plan")
    telling.join(timeout=5)
    assert lost.value.code == REFUSED and not telling.is_alive()


def test_the_first_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "STARTING_SECONDS", 0.0)
    store = HashStore()
    leader, follower = Group(store, 0, 3, 0), Group(store, 1, 3, 1)
    leader.fail()
    leader.dismiss(FAILED)
    with pytest.raises(RanksLost) as lost:
        follower.wanted("plan")
    assert lost.value.code is None


def test_nobody_waits_for_one_that_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had joined, and hears nothing any more; one that is being started may yet."""
    monkeypatch.setattr(ranks, "HEARING_SECONDS", 0.1)
    store = HashStore()
    leader = Group(store, 0, 2, 0)
    leaving = threading.Thread(target=leader.dismiss, args=(FAILED,), daemon=True)
    leaving.start()
    leaving.join(timeout=0.5)
    assert leaving.is_alive()
    store.add(ranks.JOINED, 1)
    leaving.join(timeout=30)
    assert not leaving.is_alive()


@pytest.mark.parametrize("code", [DONE, STOPPED, REFUSED, FAILED])
def test_rank_0_tells_only_what_ended_badly(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(worker, "_dismiss", told.append)
    with worker.leading() as ending:
        assert ending(code) == code
    assert told == ([] if code in (DONE, STOPPED) else [code])
    with pytest.raises(ZeroDivisionError), worker.leading():
        raise ZeroDivisionError
    assert told[-1] == BUG
    told.clear()
    with pytest.raises(KeyboardInterrupt), worker.leading():
        raise KeyboardInterrupt
    assert told == []
