"""What is planned for a rank under DeepSpeed: what each stage shares out, by its definition."""

from __future__ import annotations

import pytest
from attrs import evolve

from compiler.plan import Sharing
from tests.runtime.memory_cases import SANA, candidate, known
from tests.runtime.test_memory_sharing import MODEL, wide


def planned(ranks: int, stage: int, *, offload: bool = False, device: str = "cuda"):
    sharing = Sharing(strategy="deepspeed", stage=stage, offload_optimizer=offload)
    step = evolve(wide("sana", ranks), sharing=sharing, device=device)
    found = MODEL.simulate(step)
    return found.trainable, {phase.name: phase for phase in found.phases}


@pytest.mark.parametrize("ranks", [2, 8])
def test_states_and_float32_weights_are_a_share_in_each_stage(ranks: int) -> None:
    """AdamW: 4 bytes of weight, 8 of state (arXiv 1910.02054, section 3.1: K = 12)."""
    for stage in (1, 2, 3):
        count, phases = planned(ranks, stage)
        assert phases["train"].parts["optimizer"] == pytest.approx(12 * count / ranks, rel=0.01)
        weights = phases["train"].parts["weights"]
        if stage < 3:
            assert weights == pytest.approx(4 * count, rel=0.01)
        else:
            assert 4 * count / ranks < weights < 4 * count


def test_gradients_are_a_share_from_stage_2_on() -> None:
    gradients = {ranks: planned(ranks, 2)[1]["train"].parts["gradients"] for ranks in (2, 4)}
    assert gradients[2] == pytest.approx(2 * gradients[4], rel=0.01)
    assert planned(2, 1)[1]["train"].parts["gradients"] > gradients[2]
    assert planned(2, 3)[1]["train"].parts["gradients"] == gradients[2]


def test_an_update_needs_less_in_each_stage() -> None:
    """The more is shared out. Sana 1.6B: the buffer for sums, which has one size, is small beside
    it."""
    needed = []
    for stage in (1, 2, 3):
        sharing = Sharing(strategy="deepspeed", stage=stage)
        step = evolve(candidate(known(SANA), checkpointing=1), ranks=4, sharing=sharing)
        found = MODEL.simulate(step)
        needed.append(next(p.device_bytes for p in found.phases if p.name == "update"))
    assert needed == sorted(needed, reverse=True)


def test_what_waits_on_the_host_is_not_on_the_device() -> None:
    count, here = planned(2, 2)
    _, there = planned(2, 2, offload=True)
    assert "optimizer" not in there["train"].parts
    assert here["train"].device_bytes - there["train"].device_bytes >= 12 * count // 2
    more = there["train"].host_bytes - here["train"].host_bytes
    assert more == pytest.approx(16 * count / 2, rel=0.01), "gradients are copied there, too"


def test_phases_come_in_the_order_of_a_run() -> None:
    """As for one device: pictures and losses before what is saved."""
    sharing = Sharing(strategy="deepspeed", stage=2)
    whole = wide("sana", 2, pictures=((64, 64),), evaluated=((128, 128, 1),))
    step = evolve(whole, sharing=sharing)
    orders = [[phase.name for phase in MODEL.simulate(each).phases] for each in
              (step, evolve(step, ranks=1, sharing=Sharing()))]  # fmt: skip
    assert orders[0] == orders[1]
