"""A memory model in a process of its own: its answers, its errors, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from compiler.memory import Candidate, Simulation
from compiler.plan import Phase
from runtime.memory.apart import Apart
from tests.runtime.memory_cases import small

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not hasattr(os, "sched_getaffinity"), reason="no fork here"
)

HERE = os.getpid()
CANDIDATE = small("sana")


class Model:
    """Tells which process simulated."""

    def simulate(self, candidate: Candidate) -> Simulation:
        assert candidate == CANDIDATE
        return answer(os.getpid())


class Refusing:
    """Raises what it is told to."""

    def __init__(self, error: Exception):
        self.error = error

    def simulate(self, candidate: Candidate) -> Simulation:
        raise self.error


def answer(number: int) -> Simulation:
    phase = Phase(name="train", device_bytes=number, host_bytes=0, parts={"weights": number})
    return Simulation(
        phases=(phase,), parameters=1, trainable=1, adapted_modules=0, flops=1, seconds=0.0
    )


def process_of(found: Simulation) -> int:
    return found.phases[0].device_bytes


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a command: one thread, two cores (test runners have threads of their own)."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


def test_one_other_process_answers_every_question() -> None:
    with Apart(Model) as model:
        found = {process_of(model.simulate(CANDIDATE)) for _ in range(3)}
    assert len(found) == 1
    assert found != {HERE}
    with pytest.raises(ChildProcessError):  # no process is left to wait for
        os.waitpid(-1, os.WNOHANG)


def test_what_the_model_refuses_is_refused_in_its_words() -> None:
    with Apart(lambda: Refusing(ValueError("no such block"))) as model:
        for _ in range(2):  # the process goes on
            with pytest.raises(ValueError, match="no such block"):
                model.simulate(CANDIDATE)


@pytest.mark.parametrize("error", [KeyError("a fault of ours"), SystemExit(3)])
def test_any_other_error_is_raised_here(error: Exception) -> None:
    def made() -> Model | Refusing:
        return Model() if os.getpid() == HERE else Refusing(error)

    with Apart(made) as model:
        assert process_of(model.simulate(CANDIDATE)) == HERE


def test_a_lost_process_costs_only_time() -> None:
    def made() -> Model:
        if os.getpid() != HERE:
            os.kill(os.getpid(), signal.SIGKILL)
        return Model()

    with Apart(made) as model:
        assert [process_of(model.simulate(CANDIDATE)) for _ in range(2)] == [HERE, HERE]


def test_it_is_gone_when_nobody_asks(tmp_path: Path) -> None:
    def made() -> Model:
        (tmp_path / "begun").touch()
        threading.Event().wait(600)
        return Model()

    with pytest.raises(KeyError), Apart(made):
        while not (tmp_path / "begun").exists():
            pass
        raise KeyError
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_where_there_can_be_none_the_model_is_asked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with Apart(Model) as model:
        assert process_of(model.simulate(CANDIDATE)) == HERE


def test_who_asks_needs_no_torch() -> None:
    script = "import sys, runtime.memory.apart; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
