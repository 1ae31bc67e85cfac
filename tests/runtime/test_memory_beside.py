"""Work in a forked process: its result, its failures, and what is left behind."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from runtime.memory import beside as module
from runtime.memory.beside import beside, possible

forking = pytest.mark.skipif(
    not hasattr(os, "fork") or not hasattr(os, "sched_getaffinity"), reason="no fork here"
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a command: one thread, two cores (test runners have threads of their own)."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


@forking
def test_the_result_comes_from_another_process() -> None:
    with beside(lambda: (os.getpid(), torch.bfloat16, [3.0] * 100_000)) as result:
        process, dtype, numbers = result()
    assert process != os.getpid()
    assert (dtype, len(numbers)) == (torch.bfloat16, 100_000)


@forking
def test_an_error_is_raised_here(tmp_path: Path) -> None:
    def work() -> int:
        (tmp_path / str(os.getpid())).touch()
        raise ValueError("as in the other process")

    with pytest.raises(ValueError, match="as in the other"), beside(work) as result:
        result()
    assert len(list(tmp_path.iterdir())) == 2  # tried there, then here


@forking
def test_a_killed_process_costs_only_time() -> None:
    here = os.getpid()

    def work() -> int:
        if os.getpid() != here:
            os.kill(os.getpid(), 9)
        return 7

    with beside(work) as result:
        assert result() == 7


@forking
def test_what_nobody_asks_for_is_ended() -> None:
    with pytest.raises(KeyError), beside(lambda: threading.Event().wait(600)):
        raise KeyError
    with pytest.raises(ChildProcessError):  # no process is left to wait for
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (module.sys, "platform", "darwin"),
        (threading, "active_count", lambda: 2),
        (os, "sched_getaffinity", lambda _: {0}),
        (torch.cuda, "is_initialized", lambda: True),
    ],
    ids=["no fork", "threads", "one core", "a context"],
)
def test_where_it_cannot_be_the_work_is_done_here(
    owner: object, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, value, raising=False)
    assert not possible()
    with beside(os.getpid) as result:
        assert result() == os.getpid()
