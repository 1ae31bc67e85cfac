"""What is planned for one of several ranks against what one really allocates."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from attrs import evolve

from compiler.memory import Candidate
from compiler.plan import Sharing
from runtime.build import build
from runtime.families import family_of
from runtime.memory.primed import prime
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.memory.tracker import Tracker
from runtime.ranks import BUCKET
from runtime.sharded import pieces_of, shard
from runtime.step import gradient_norm, micro_step, update
from tests.runtime.memory_cases import BASES, SMALL, SMALL_PARTS, candidate, known
from tests.runtime.whole_runs import fork, wait

MODEL = RuntimeMemoryModel()
WIDE = {
    "sana": {"num_layers": 6, "num_attention_heads": 16, "num_cross_attention_heads": 16,
             "cross_attention_dim": 256},
    "sd3": {"num_layers": 8, "num_attention_heads": 8, "caption_projection_dim": 256},
}  # fmt: skip


def wide(family: str, ranks: int, reshard: bool = True, **changes) -> Candidate:
    """A model whose weights matter more than its activations."""
    given = {
        "device": "cpu",
        "shapes": ((128, 128, 1),),
        "tokens": 32,
        "compute": "float32",
        "checkpointing": 1,
        **changes,
    }
    model = known(BASES[family], SMALL_PARTS[family], **(SMALL[family] | WIDE[family]))
    sharing = Sharing(strategy="fsdp", reshard=reshard)
    return evolve(candidate(model, **given), ranks=ranks, sharing=sharing)


def phases(step: Candidate) -> dict[str, int]:
    return {phase.name: phase.device_bytes for phase in MODEL.simulate(step).phases}


def highest(run) -> int:
    """Bytes that `run` allocates at most on top of what is there, by its allocator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    told = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, nbytes in told:
        now += nbytes
        most = max(most, now)
    return most


def real(step: Candidate) -> dict[str, int]:
    """The step in rank 0 of a group whose other ranks are not there: it gathers, but no numbers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=step.ranks)
    family, cpu = family_of(step.model.family), torch.device("cpu")
    given = (step.model, step.adapter, step.precision, step.layout, family, cpu)
    built = build(*given, empty=True, seed=0, sharded=True)
    lists = family.card.blocks
    shard(built.model, lists, step.precision, cpu, step.ranks, reshard=step.sharing.reshard)
    pieces = pieces_of(built.model)
    rows = {name: piece.mine for name, piece in pieces.items()}
    optimizer = prime(step, rows, Tracker({"cpu"}))
    held = [*(p.to_local() for p in built.model.parameters()), *built.model.buffers()]
    held += [t for s in optimizer.state.values() for t in s.values()]
    resident = sum(t.untyped_storage().nbytes() for t in held)
    width, height, size = step.shapes[0]
    batch = family.example_batch(step.model, width, height, size, step.text, cpu)
    batch_bytes = sum(t.nbytes for t in (batch.latents, batch.noise, *batch.text.values()))

    def passes() -> None:
        micro_step(family, built.model, batch, step.objective, step.precision, 1)
        for piece in pieces.values():
            gradient, piece.whole.grad = piece.whole.grad, None
            piece.mine.grad = gradient.to_local()

    passes()  # the first one makes what stays
    for piece in pieces.values():
        piece.mine.grad = None
    peak = {"train": resident + batch_bytes + highest(passes)}
    gradients = sum(piece.mine.grad.nbytes for piece in pieces.values())

    def updating() -> None:
        update(optimizer, gradient_norm(rows.values()), step.max_grad_norm)

    peak["update"] = resident + batch_bytes + gradients + highest(updating)
    return peak


CASES = [
    ("sana", 2, {}),
    ("sana", 4, {"rank": 4}),
    ("sd3", 2, {"rank": 8, "reshard": False}),
    ("sd3", 3, {"compute": "bfloat16"}),
]


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize(("family", "ranks", "changes"), CASES)
def test_a_rank_needs_what_is_planned_or_a_little_less(
    family: str, ranks: int, changes, tmp_path: Path
) -> None:
    """Never more than planned, but for a hundredth; and at least four fifths of it."""
    step = wide(family, ranks, **changes)

    def work() -> int:
        torch.set_num_threads(1)
        (tmp_path / "found.json").write_text(json.dumps(real(step)))
        return 0

    assert wait(fork(work)) == 0
    measured, planned = json.loads((tmp_path / "found.json").read_text()), phases(step)
    for name, nbytes in measured.items():
        assert 0.8 * planned[name] <= nbytes <= 1.01 * planned[name], (name, measured, planned)


@pytest.mark.parametrize("rank", [0, 4])
def test_more_ranks_need_less_each_and_whole_models_all(rank: int) -> None:
    one, two, four = (phases(wide("sana", ranks, rank=rank)) for ranks in (1, 2, 4))
    assert all(one[name] > two[name] > four[name] for name in ("update", "save"))
    kept = phases(wide("sana", 2, reshard=False, rank=rank))
    assert kept["train"] > two["train"]


def test_what_is_loaded_is_no_average() -> None:
    """It comes once the model is there, as of one device."""
    for ranks in (1, 2):
        step = evolve(wide("sana", ranks), ema_on_device=True)
        parts = {phase.name: phase.parts for phase in MODEL.simulate(step).phases}
        assert not {"ema", "optimizer", "gradients"} & parts["load"].keys()
        assert parts["save"]["ema"] > 0


def test_whole_models_add_up_their_gradients_in_a_buffer() -> None:
    """Of 32 MiB, or of all gradients where these are fewer bytes; none for one device alone."""
    step = wide("sana", 1, trained="bfloat16", compute="bfloat16", optimizer="sgd", fused=False)
    several = evolve(step, ranks=2, sharing=Sharing())
    trained = MODEL.simulate(step).trainable
    update, alone = (
        next(p for p in MODEL.simulate(one).phases if p.name == "update") for one in (several, step)
    )
    buffer = 4 * min(trained, BUCKET)
    after = sum(n for name, n in update.parts.items() if name != "sums over devices")
    assert update.parts["sums over devices"] == pytest.approx(buffer, abs=512)
    assert update.device_bytes == after + update.parts["sums over devices"] >= alone.device_bytes
