"""Two and three processes train as one does with the same global batch, and end together."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from attrs import evolve

from compiler.plan import Checkpoints, Ema, Plan, Speed
from runtime import ema as averaging
from runtime import loop, training, validate
from runtime.context import saved_step
from runtime.errors import PlanChanged, RunFailed
from runtime.events import Silent
from runtime.execute import execute
from runtime.ranks import RanksLost, buckets, join
from tests.runtime.forked import start_worker
from tests.runtime.plans import LORA, PICTURES, draw_data, source_of, tiny_plan
from tests.runtime.tiny import make_tiny
from tests.runtime.whole_runs import MIXED, final, fork, metrics_of, wait
from tuner import launch, worker

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")
SIZES = ((70, 70), (70, 70), (140, 70), (64, 64), (70, 140))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for family in ("sana", "sd3"):
        make_tiny(family, folder / family)
    draw_data(folder / "dog", SIZES)
    return folder


@pytest.fixture
def make(place, tmp_path):
    """A maker of pairs of plans: of `ranks` processes, and of one that accumulates as much."""

    def made(family, method, ranks, accumulate, name="run", **changes):
        source = source_of(place / "dog", repeats="1.5", dropout=0.3)
        settings = {
            "steps": 5,
            "accumulate": ranks * accumulate,
            "adapter": evolve(LORA, dropout=0.2) if method == "lora" else None,
            "cache_folder": str(place / "cache"),
            **changes,
        }
        alone, manifest = tiny_plan(
            family, place / family, [source], tmp_path / f"{name}-alone", **settings
        )
        together = evolve(
            alone,
            name=name,
            run_folder=str(tmp_path / name),
            steps=evolve(alone.steps, ranks=ranks, accumulate=accumulate),
        )
        return together, alone, manifest

    return made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(jobs, ranks, before=lambda rank: None) -> list[int]:
    """Processes that do `jobs` (plan, manifest), one after the other, together. They end with 0, 1
    if a job fails, 3 if only another rank's does; what failed is in the run folder."""
    port = free_port()

    def work(rank):
        torch.set_num_threads(1)
        places = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in places.items()}}
        group = join()
        before(rank)
        for plan, manifest in jobs:
            try:
                execute(plan, manifest, Silent(), ranks=group)
            except RanksLost:
                return 3
            except RunFailed as error:
                said = f"{error.message}\n{error.help}"
                (Path(plan.run_folder) / f"failed-{rank}").write_text(said)
                group.fail()
                return 1
        return 0

    return [fork(lambda rank=rank: work(rank)) for rank in range(ranks)]


def assert_close(together: Plan, alone: Plan, tolerance: float) -> None:
    """Each tensor's difference is at most `tolerance` of its largest value.

    Of the optimizer's state it is the largest of its kind that counts: the gradient of a key's bias
    is zero but for rounding, and so is all that is made of it.
    """
    (step, tensors, metrics), (step_b, tensors_b, metrics_b) = final(together), final(alone)
    assert step == step_b == together.steps.total
    assert tensors.keys() == tensors_b.keys()
    sizes = {name: float(tensor.float().abs().max()) for name, tensor in tensors_b.items()}
    kinds = {name: name.rpartition(".")[2] for name in sizes if name.startswith("optimizer.")}
    for name, kind in kinds.items():
        sizes[name] = max(sizes[other] for other, its in kinds.items() if its == kind)
    for name, tensor in tensors.items():
        far = float((tensor.float() - tensors_b[name].float()).abs().max())
        assert far <= tolerance * sizes[name], (name, far, sizes[name])
    assert [row["step"] for row in metrics] == list(range(1, step + 1))
    for row, row_b in zip(metrics, metrics_b, strict=True):
        assert row.pop("loss") == pytest.approx(row_b.pop("loss"), rel=1e-5)
        assert row.pop("grad_norm") == pytest.approx(row_b.pop("grad_norm"), rel=1e-4)
        assert row == row_b


CASES = {
    2: [("sana", "lora", 1, {}), ("sd3", "full", 2, {"optimizer": "sgd"})],
    3: [("sana", "full", 2, {"optimizer": "sgd"}), ("sd3", "lora", 1, {"validation": PICTURES})],
}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_as_one_process_does(make, ranks):
    pairs = [
        make(family, method, ranks, accumulate, f"{family}-{method}", **changes)
        for family, method, accumulate, changes in CASES[ranks]
    ]
    assert any(p.steps.batches_per_epoch % (p.steps.accumulate * ranks) for p, _, _ in pairs)
    processes = start([(together, manifest) for together, _, manifest in pairs], ranks)
    assert [wait(pid) for pid in processes] == [0] * ranks
    for together, alone, manifest in pairs:
        execute(alone, manifest, Silent())
        assert_close(together, alone, 1e-5)


def test_gradients_of_fused_projections_are_summed_one_by_one(make):
    """They lie in one piece of memory, and each is a part of it."""
    together, alone, manifest = make("sd3", "full", 2, 1, "fused", optimizer="sgd")
    fused = evolve(together, speed=Speed(fused_projections=True))
    assert [wait(pid) for pid in start([(fused, manifest)], 2)] == [0, 0]
    execute(alone, manifest, Silent())
    assert_close(fused, alone, 1e-5)


def test_copies_of_masters_are_fresh_in_a_rank_that_had_no_batch(make):
    """A fused optimizer changes float32 masters without a trace of it; no gradient came."""
    together, alone, manifest = make(
        "sana", "full", 3, 1, "mixed", precision=MIXED, lr=1e-2, steps=9
    )
    shares = together.steps.batches_per_epoch % 3
    assert shares, "the last window of an epoch leaves a rank without a batch"
    assert [wait(pid) for pid in start([(together, manifest)], 3)] == [0] * 3
    execute(alone, manifest, Silent())
    assert_close(together, alone, 1e-5)


def launched(plan, manifest, folder: Path, *, anew: bool) -> int:
    """A process that launches `plan`, noting its workers' pids and how it ended in `folder`. They
    are interpreters started `anew`, or forks."""

    def work():
        begin = launch._start if anew else start_worker

        def noted(where, rank, *others):
            worker = begin(where, rank, *others)
            (folder / f"pid-{rank}").write_text(str(worker.pid))
            return worker

        launch._start = noted
        try:
            outcome = launch.launch(plan, manifest, "")
        except RunFailed as error:
            (folder / "said").write_text(error.message)
            return 1
        (folder / "said").write_text(f"{outcome.status} {outcome.step}")
        return 130 if outcome.status == "stopped" else 0

    return fork(work)


def until_step(plan: Plan, count: int) -> None:
    path = Path(plan.run_folder) / "metrics.jsonl"
    for _ in range(1200):
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError("no steps")


def test_ctrl_c_saves_and_a_killed_rank_ends_the_run(make, tmp_path):
    plan, _, manifest = make("sana", "lora", 2, 1, steps=40000)
    pid = launched(plan, manifest, tmp_path, anew=True)
    until_step(plan, 3)
    os.kill(pid, signal.SIGINT)
    assert wait(pid) == 130
    stopped = saved_step(Path(plan.run_folder))
    assert (tmp_path / "said").read_text() == f"stopped {stopped}"
    assert [row["step"] for row in metrics_of(plan)] == list(range(1, stopped + 1))

    pid = launched(plan, manifest, tmp_path, anew=False)
    until_step(plan, stopped + 3)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    began = time.monotonic()
    assert wait(pid) == 1
    assert time.monotonic() - began < 15
    assert "rank 1 was killed (SIGKILL)" in (tmp_path / "said").read_text()
    saved = saved_step(Path(plan.run_folder))
    assert saved >= stopped + 3, "rank 0 saved what was done"
    assert [row["step"] for row in metrics_of(plan)] == list(range(1, saved + 1))


def test_others_do_not_wait_for_a_rank_0_that_failed(make, place, tmp_path):
    """Its own failure (a picture that is gone) is told by rank 0, and ends them all."""
    plan, _, manifest = make("sana", "lora", 2, 1, cache_folder=str(tmp_path / "cache"))
    picture = place / "dog" / "03.png"
    content = picture.read_bytes()
    picture.unlink()
    try:
        assert [wait(pid) for pid in start([(plan, manifest)], 2)] == [1, 3]
    finally:
        picture.write_bytes(content)
    assert "03.png" in (Path(plan.run_folder) / "failed-0").read_text()


def test_a_loss_that_is_no_number_in_one_rank(make):
    """With leave to pass over one such step, all do; at the next all stop, and all know why."""
    plan, _, manifest = make("sana", "lora", 2, 1, steps=6)
    plan = evolve(plan, guard=evolve(plan.guard, skip=1))

    def poisoned(rank: int) -> None:
        real, calls = loop.micro_step, []

        def micro_step(family, model, batch, *others):
            calls.append(1)
            if rank == 1 and len(calls) in (2, 4):
                batch = evolve(batch, latents=batch.latents * torch.nan)
            return real(family, model, batch, *others)

        loop.micro_step = micro_step

    assert [wait(pid) for pid in start([(plan, manifest)], 2, poisoned)] == [1, 1]
    rows = metrics_of(plan)
    (skipped,) = (row for row in rows if "skipped" in row)
    assert len(skipped["names"]) == skipped["samples"], "of the whole window"
    folder = Path(plan.run_folder)
    failures = [(folder / f"failed-{rank}").read_text() for rank in range(2)]
    assert failures[0] == failures[1]
    assert "loss nan; the weights were not updated" in failures[0]


@pytest.mark.parametrize(
    ("who", "where"), [(1, "step"), (1, "average"), (0, "step"), (0, "drawing"), (0, "copying")]
)
def test_one_rank_without_memory_ends_all_and_loses_nothing(make, who, where):
    """Whichever it is and whatever the others wait for: rank 0 saves what all have made."""
    every = 3 if where == "copying" else 0
    plan, _, manifest = make(
        "sana",
        "lora",
        2,
        1,
        steps=6,
        ema=Ema(decay=0.9, device="same", every=1),
        validation=evolve(PICTURES, every=3, at_start=False),
        checkpoints=Checkpoints(every=every, keep=0),
    )
    calls: list[int] = []

    def scarce(rank: int) -> None:
        if rank != who:
            return
        module, name, call = {
            "step": (loop, "_changing", 4),  # before the gradients are summed
            "average": (averaging.Ema, "update", 3),
            "drawing": (validate, "_embeddings", 1),
            "copying": (training, "_copied", 1),
        }[where]
        real = getattr(module, name)

        def called(*arguments, **options):
            calls.append(1)
            if len(calls) == call:
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            return real(*arguments, **options)

        setattr(module, name, called)

    codes = [1, 3] if who == 0 else [3, 1]
    assert [wait(pid) for pid in start([(plan, manifest)], 2, scarce)] == codes
    said = (Path(plan.run_folder) / f"failed-{who}").read_text()
    assert "cpu ran out of memory in phase" in said and "tried to allocate 2 GiB" in said
    assert saved_step(Path(plan.run_folder)) == 3
    assert [row["step"] for row in metrics_of(plan)] == [1, 2, 3]


def test_as_processes_of_another_launcher(make):
    """Rank 0 brings the plan; the other one takes it, and its samples from the run folder."""
    plan, alone, manifest = make("sd3", "lora", 2, 1, steps=2)
    port = free_port()
    folder = Path(plan.run_folder)
    folder.mkdir()
    manifest.save(folder / worker.MANIFEST)

    def work(rank):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if rank:
            return worker.follow()
        return 0 if worker.lead(plan, manifest, "").status == "finished" else 1

    assert [wait(pid) for pid in [fork(lambda r=rank: work(r)) for rank in range(2)]] == [0, 0]
    execute(alone, manifest, Silent())
    assert_close(plan, alone, 1e-5)


def test_buckets_hold_all_in_order():
    tensors = [torch.empty(size) for size in (3, 4, 20, 1, 9)]
    sizes = [[t.numel() for t in bucket] for bucket in buckets(tensors, most=10)]
    assert sizes == [[3, 4], [20], [1, 9]]
    assert list(buckets([])) == []


def test_ranks_go_on_from_what_one_process_saved(make):
    """A checkpoint does not know how many ranks made it; the folder's plan guards the rest."""
    plan, alone, manifest = make("sana", "lora", 2, 1, every=3)
    execute(alone, manifest, Silent())
    folder = Path(plan.run_folder)
    for part in ("checkpoints/step-000003", "metrics.jsonl"):
        source, target = Path(alone.run_folder) / part, folder / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    assert [wait(pid) for pid in start([(plan, manifest)], 2)] == [0, 0]
    assert_close(plan, alone, 1e-5)

    (folder / "measured.json").unlink()
    with pytest.raises(PlanChanged, match=r"steps\.ranks: 2 -> 1"):
        execute(evolve(alone, name=plan.name, run_folder=str(folder)), manifest, Silent())
