"""Simulations are kept by what they depend on."""

from pathlib import Path

import pytest
from attrs import evolve

from compiler.memory import Candidate, Simulation
from compiler.plan import Phase
from tests.tuner.examples import sd35_large_lora
from tuner import simulations
from tuner.simulations import KeptSimulations, key_of


@pytest.fixture
def candidate() -> Candidate:
    plan = sd35_large_lora()
    return Candidate(
        model=plan.model,
        adapter=plan.adapter,
        precision=plan.precision,
        text=plan.text,
        objective=plan.objective,
        optimizer=plan.optimizer,
        max_grad_norm=1.0,
        ema_on_device=False,
        accumulate=1,
        activation_checkpointing=1,
        shapes=((1024, 1024, 6),),
        device="cuda",
    )


ANSWER = Simulation(
    phases=(Phase(name="train", device_bytes=3, host_bytes=1, parts={"weights": 3}),),
    parameters=5,
    trainable=4,
    adapted_modules=2,
    flops=10**18,
    seconds=1.5,
)


def test_the_second_answer_is_the_first_and_is_not_simulated(
    candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Candidate] = []
    monkeypatch.setattr(simulations, "_simulate", lambda c: asked.append(c) or ANSWER)
    for _ in range(2):
        assert KeptSimulations(tmp_path / "kept").simulate(candidate) == ANSWER
    assert len(asked) == 1
    (file,) = (tmp_path / "kept").iterdir()
    file.write_text('{"phases": 3}')
    assert KeptSimulations(tmp_path / "kept").simulate(candidate) == ANSWER
    assert len(asked) == 2


def test_an_answer_is_found_by_everything_that_it_depends_on(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {
        key_of(candidate),
        key_of(evolve(candidate, shapes=((1024, 1024, 5),))),
        key_of(evolve(candidate, adapter=None)),
        key_of(evolve(candidate, activation_checkpointing=2)),
    }
    monkeypatch.setattr("runtime.machine.versions", lambda: {"torch": "0"})
    keys.add(key_of(candidate))
    monkeypatch.setattr(simulations, "_code", lambda: "another step")
    keys.add(key_of(candidate))
    assert len(keys) == 6


def test_a_folder_that_cannot_be_written_costs_only_time(
    candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulations, "_simulate", lambda _: ANSWER)
    (tmp_path / "file").touch()
    assert KeptSimulations(tmp_path / "file" / "kept").simulate(candidate) == ANSWER
