"""Host memory of a plan's phases, against what the run's own parts take there."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve

from compiler.memory import Candidate
from compiler.plan import Ema as EmaFacts
from compiler.plan import Layout
from runtime.build import state
from runtime.ema import Ema
from runtime.families import family_of
from runtime.host_copy import HostCopy
from runtime.memory import step
from runtime.memory.pieces import tensors_in
from runtime.memory.primed import prime
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.tracker import Tracker
from runtime.offload import activations
from runtime.offload.blocks import chosen
from runtime.offload.host import packed
from tests.runtime.memory_cases import SANA, candidate, known, small

CPU = torch.device("cpu")
MODEL = RuntimeMemoryModel()


def host(given: Candidate) -> dict[str, int]:
    return {phase.name: phase.host_bytes for phase in MODEL.simulate(given).phases}


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-offload"])
def test_checkpoint_copy_is_planned(rank: int, optimizer: str) -> None:
    """Of the weights, the optimizer's state and the average, wherever these two lie."""
    given = small("sana", rank=rank, optimizer=optimizer, fused=False)
    built = step._build(given, family_of("sana"), CPU, None)
    made = prime(given, built.trainable, Tracker({"cpu"}))
    facts = EmaFacts(decay=0.9, device="cpu", every=1)
    tree = (state(built), made.state_dict(), Ema(facts, built.trainable.items()).average)
    room = HostCopy(CPU)
    room.take(tree)
    assert room._room is not None
    planned = host(evolve(given, ema_on_device=True))["save"]  # on the processor: this copy alone
    rounding = 512 * len(list(tensors_in(tree)))
    assert planned == pytest.approx(len(room._room), abs=rounding)


@pytest.mark.parametrize("on_host", [False, True])
def test_weights_wait_on_the_host_while_the_average_is_judged(on_host: bool) -> None:
    given = evolve(
        candidate(known(SANA, num_layers=2), checkpointing=1, pictures=((512, 512),)),
        evaluated=((512, 512, 1),),
    )
    trained = MODEL.simulate(given).trainable
    plain = host(given)
    found = host(evolve(given, ema_on_device=not on_host, ema_on_host=on_host))
    average = 4 * trained * (2 if on_host else 1)  # its checkpoint's copy, and itself
    grown = {name: found[name] - plain[name] for name in found}
    slack = 512 * 200  # of rounding
    assert grown["train"] == pytest.approx(average, abs=slack)
    assert grown["save"] == pytest.approx(average, abs=slack)
    for phase in ("evaluate", "validate"):
        assert grown[phase] == pytest.approx(average + 4 * trained, abs=slack)
    assert grown["load"] == 0


def test_weights_wait_on_the_host_while_a_schedule_free_average_is_judged() -> None:
    """What is trained is put back as it was: `kept_weights`."""
    plain = evolve(small("sana", rank=4, device="cuda"), evaluated=((256, 256, 1),))
    given = evolve(plain, optimizer=evolve(plain.optimizer, name="adamw-schedulefree"))
    other = evolve(plain, optimizer=evolve(plain.optimizer, fused=False))
    found, without = host(given), host(other)
    trained = 4 * MODEL.simulate(given).trainable
    assert found["evaluate"] - found["train"] >= trained
    assert without["evaluate"] == without["train"]


def test_no_activations_wait_on_the_host_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SMALLEST", 0)
    layout = Layout(offload_activations=True, offload_blocks=2)
    given = small("sd3", rank=4, device="cuda", compute="bfloat16", layout=layout)
    whole = MODEL.whole(given, given.shapes[0])
    away = {f".{number}." for number in chosen(4, 2)}
    built = step._build(
        evolve(given, layout=Layout(), device="cpu"), family_of("sd3"), CPU, None
    ).model
    weights = sum(
        512 * -(-size // 512)
        for part in away
        for size in packed(
            [
                p.nbytes
                for name, p in built.named_parameters()
                if f"transformer_blocks{part}" in name and "lora" not in name
            ]
        )[1]
    )
    assert whole.parked == weights
    found = host(given)
    assert found["load"] == whole.largest + weights + whole.load["weights"]
    assert found["train"] - found["save"] == whole.host - weights > 0  # activations


def test_parked_weights_of_a_deep_model_are_counted_from_a_shallow_one() -> None:
    layout = Layout(offload_activations=True, offload_blocks=6)
    given = candidate(known(SANA), rank=4, shapes=((512, 512, 2),), layout=layout)
    found, whole = (run(given, given.shapes[0]) for run in (MODEL.course, MODEL.whole))
    assert (found.parked, found.host) == (whole.parked, whole.host)
