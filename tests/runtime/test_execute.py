"""Whole runs of tiny pipelines: resume as a law, results that Diffusers loads, nothing torn."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors import SafetensorError

from compiler import lock
from compiler.plan import Checkpoints, Layout, Plan, Precision, lock_path
from runtime import checkpoints, loop
from runtime.context import result_folder
from runtime.data import cache as caching
from runtime.errors import OutOfMemory, PlanChanged, RunFailed
from runtime.execute import execute
from runtime.methods import lora
from runtime.out_of_memory import is_out_of_memory as out_of_memory
from tests.runtime.plans import LORA, PICTURES, draw_data, source_of, tiny_plan
from tests.runtime.run_plan import Interrupting, run
from tests.runtime.tiny import make_tiny

ROOT = Path(__file__).parents[2]
SIZES = ((70, 70), (70, 70), (140, 70), (64, 64), (70, 140))
FLOAT32 = Precision(compute="float32", weights="float32", trained="float32", cache="float32")
MIXED = Precision(compute="bfloat16", weights="bfloat16", trained="float32", cache="bfloat16")
RUNNING = getattr(os, "WEXITED", 0) | getattr(os, "WNOHANG", 0) | getattr(os, "WNOWAIT", 0)
NEVER = ("", 0, signal.SIGTERM)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and POSIX signals")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny pipelines and data, made once; caches are shared by all runs, as they are in life."""
    folder = tmp_path_factory.mktemp("execute")
    for family in ("sana", "sd3"):
        make_tiny(family, folder / family)
    draw_data(folder / "dog", SIZES)
    draw_data(folder / "cat", SIZES[:2])
    return folder


@pytest.fixture
def make(place, tmp_path):
    """A maker of plans, each with a run folder of its own below this test's folder."""

    def made(family: str = "sana", method: str = "lora", name: str = "run", **changes):
        sources = (
            source_of(place / "dog", "a photo of sks dog", repeats="1.5", dropout=0.3),
            source_of(place / "cat", "a photo of sks cat"),
        )
        settings = {
            "steps": 7,
            "accumulate": 2,
            "every": 2,
            "adapter": evolve(LORA, dropout=0.2) if method == "lora" else None,
            "cache_folder": str(place / "cache"),
            **changes,
        }
        return tiny_plan(family, place / family, sources, tmp_path / name, **settings)

    return made


def final(plan: Plan):
    """Everything that a run leaves: every tensor by name, and the metrics but for the time."""
    saved = checkpoints.latest(Path(plan.run_folder) / "checkpoints")
    assert saved is not None
    snapshot = checkpoints.load(saved)
    tensors = {f"weights.{k}": v for k, v in snapshot.weights.items()}
    tensors |= {f"ema.{k}": v for k, v in (snapshot.ema or {}).items()}
    for index, states in snapshot.optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in states.items()}
    for file in sorted(result_folder(plan).rglob("*.safetensors")):
        from safetensors.torch import load_file

        tensors |= {f"{file.name}.{k}": v for k, v in load_file(file).items()}
    return snapshot.step, tensors, metrics_of(plan)


def metrics_of(plan: Plan) -> list[dict[str, object]]:
    lines = (Path(plan.run_folder) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row.pop("seconds")
    return rows


def assert_equal(plan: Plan, other: Plan) -> None:
    (step, tensors, metrics), (step_b, tensors_b, metrics_b) = final(plan), final(other)
    assert step == step_b
    assert tensors.keys() == tensors_b.keys()
    different = [k for k, v in tensors.items() if not torch.equal(v, tensors_b[k])]
    assert different == []
    assert metrics == metrics_b
    assert [row["step"] for row in metrics] == list(range(1, step + 1))


def fork(task: Callable[[], int]) -> int:
    """Runs `task` in a process of its own; returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = task()
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """The exit code of `pid`, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_run_leaves_what_it_says_and_runs_once(make):
    plan, manifest = make(validation=PICTURES, track=("tensorboard",), keep=2)
    events = Interrupting(*NEVER)
    outcome = execute(plan, manifest, events, recipe='name = "run"\n')
    folder = Path(plan.run_folder)
    assert (outcome.status, outcome.step, outcome.result) == ("finished", 7, folder / "lora")
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "events.jsonl",
        "lora",
        "measured.json",
        "metrics.jsonl",
        "plan.lock.toml",
        "recipe.toml",
        "result.json",
        "run.log",
        "samples",
        "tensorboard",
    ]
    assert [p.name for p in checkpoints.complete(folder / "checkpoints")] == [
        "step-000006",
        "step-000007",
    ]
    assert sorted(str(p.relative_to(folder)) for p in (folder / "samples").rglob("*.png")) == [
        f"samples/step-{step:06d}/dog-64x64-42.png" for step in (0, 4, 7)
    ]
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["plan"] == plan.digest
    assert measured["steps"] == 7
    assert measured["seconds"].keys() >= {"text", "latents", "load", "train", "save", "validate"}

    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    again = Interrupting(*NEVER)
    outcome = execute(plan, manifest, again)
    assert (outcome.status, outcome.result) == ("already", folder / "lora")
    assert "nothing to do" in again.texts[0]
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert after == before


@pytest.mark.parametrize("precision", [FLOAT32, MIXED], ids=["float32", "mixed"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_resume_is_bit_exact(make, family, method, precision):
    """Stopped in one process, killed in a second, finished in a third."""
    whole, manifest = make(family, method, "whole", precision=precision)
    parts, _ = make(family, method, "parts", precision=precision)
    assert run(whole, manifest, Interrupting(*NEVER)) == 0
    assert wait(fork(lambda: run(parts, manifest, Interrupting("step", 3, signal.SIGTERM)))) == 130
    latest = checkpoints.latest(Path(parts.run_folder) / "checkpoints")
    assert latest is not None
    assert latest.name == "step-000003"
    assert not result_folder(parts).exists()
    killed = fork(lambda: run(parts, manifest, Interrupting("step", 2, signal.SIGKILL)))
    assert wait(killed) == -signal.SIGKILL
    assert wait(fork(lambda: run(parts, manifest, Interrupting(*NEVER)))) == 0
    assert_equal(whole, parts)


@pytest.mark.slow
def test_in_new_interpreters_too(make, tmp_path):
    """No state of this process may matter: the same with processes started from nothing."""
    whole, manifest = make("sd3", "lora", "whole")
    parts, _ = make("sd3", "lora", "parts")
    manifest.save(tmp_path / "manifest.jsonl")

    def start(plan: Plan, *at: str) -> int:
        path = tmp_path / f"{plan.name}.toml"
        path.write_text(lock.dumps(plan))
        command = [
            sys.executable,
            "-m",
            "tests.runtime.run_plan",
            path,
            tmp_path / "manifest.jsonl",
        ]
        extra = ["--at", *at] if at else []
        done = subprocess.run([*command, *extra], cwd=ROOT, capture_output=True, text=True)
        print(done.stdout, done.stderr)  # shown if the test fails
        return done.returncode

    assert start(whole) == 0
    assert start(parts, "step", "5", "SIGKILL") == -signal.SIGKILL
    assert start(parts) == 0
    assert_equal(whole, parts)


PHASES = [("phase:text", 1), ("phase:latents", 1), ("phase:load", 1), ("phase:validate", 1)]
PHASES += [("phase:train", 1), ("phase:save", 1), ("phase:save", 2), ("phase:validate", 2)]


@pytest.mark.slow
def test_killed_at_chosen_points(make, tmp_path):
    """In caching, stepping, saving, drawing and publishing; each time the run goes on.

    After the phases, each process is killed one write to the disk later than the one before.
    """
    settings = {"validation": PICTURES, "keep": 2, "steps": 20, "every": 3}
    whole, manifest = make("sana", "lora", "whole", **settings)
    assert wait(fork(lambda: run(whole, manifest, Interrupting(*NEVER)))) == 0
    parts, _ = make("sana", "lora", "parts", **settings, cache_folder=str(tmp_path / "cache"))
    points = PHASES + [("sync", count) for count in range(1, 60)]
    for event, count in points:
        at = Interrupting(event, count, signal.SIGKILL)
        code = wait(fork(lambda at=at: run(parts, manifest, at)))
        if code == 0:
            break
        assert code == -signal.SIGKILL, (event, count)
    assert code == 0
    assert count >= 8
    assert_equal(whole, parts)
    pictures = [sorted((Path(p.run_folder) / "samples").rglob("*.png")) for p in (whole, parts)]
    assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]]
    assert not list(Path(parts.run_folder).rglob(".partial-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), [("sana", "full"), ("sd3", "lora")])
def test_killed_at_random_moments(make, family, method):
    """Some steps and a random while after the last kill, whatever the process is doing then."""
    settings = {"validation": PICTURES, "steps": 40, "every": 3, "keep": 3}
    whole, manifest = make(family, method, "whole", **settings)
    assert wait(fork(lambda: run(whole, manifest, Interrupting(*NEVER)))) == 0
    parts, _ = make(family, method, "parts", **settings)
    chance = random.Random(5)
    kills, target = 0, 0
    while True:
        target += chance.randint(1, 8)
        pid = fork(lambda: run(parts, manifest, Interrupting(*NEVER)))
        while steps_done(parts) < target < 40 and os.waitid(os.P_PID, pid, RUNNING) is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        if target < 40:
            os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        kills += code == -signal.SIGKILL
        if code == 0:
            break
    assert kills >= 3
    assert_equal(whole, parts)


def steps_done(plan: Plan) -> int:
    path = Path(plan.run_folder) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_ctrl_c_saves_and_exits_130(make, tmp_path):
    plan, manifest = make(every=0, steps=4000)
    manifest.save(tmp_path / "manifest.jsonl")
    (tmp_path / "plan.toml").write_text(lock.dumps(plan))
    metrics = Path(plan.run_folder) / "metrics.jsonl"
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.runtime.run_plan",
            tmp_path / "plan.toml",
            tmp_path / "manifest.jsonl",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(1200):
            if metrics.exists() and metrics.read_text().count("\n") >= 3:
                break
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    saved = checkpoints.complete(Path(plan.run_folder) / "checkpoints")
    assert len(saved) == 1
    step = checkpoints.read_state(saved[0])["step"]
    assert step >= 3
    assert output == f"stopped {step} None\n"
    assert [row["step"] for row in metrics_of(plan)] == list(range(1, step + 1))


def test_pictures_do_not_change_the_training(make):
    without, manifest = make(name="without")
    with_pictures, _ = make(name="with", validation=evolve(PICTURES, every=1))
    for plan in (without, with_pictures):
        assert run(plan, manifest, Interrupting(*NEVER)) == 0
    assert_equal(without, with_pictures)
    assert len(list((Path(with_pictures.run_folder) / "samples").rglob("*.png"))) == 8


def test_checkpoints_do_not_change_the_training(make):
    often, manifest = make(name="often", checkpoints=Checkpoints(every=1, keep=1))
    never, _ = make(name="never", checkpoints=Checkpoints(every=0, keep=0))
    for plan in (often, never):
        assert run(plan, manifest, Interrupting(*NEVER)) == 0
    assert_equal(often, never)


def test_another_plan_in_the_same_folder_is_refused(make):
    plan, manifest = make(steps=2)
    assert run(plan, manifest, Interrupting(*NEVER)) == 0
    with pytest.raises(PlanChanged, match=r"optimizer\.lr"):
        execute(
            evolve(plan, optimizer=evolve(plan.optimizer, lr=1.0)), manifest, Interrupting(*NEVER)
        )


def test_an_accepted_change_holds_from_the_checkpoint_on(make):
    """Of the learning rate, and of an argument that lies in the optimizer's state too."""
    from compiler.schedules import multiplier
    from tuner.run import _accept

    whole, manifest = make(name="whole")
    assert run(whole, manifest, Interrupting(*NEVER)) == 0
    ends = []
    for name, decay in (("rate", 0.01), ("both", 0.5)):
        plan, _ = make(name=name, optimizer="adamw")
        first = evolve(plan, optimizer=evolve(plan.optimizer, arguments=arguments(plan, 0.01)))
        assert run(first, manifest, Interrupting("step", 3, signal.SIGTERM)) == 130
        changed = evolve(
            first, optimizer=evolve(first.optimizer, lr=0.2, arguments=arguments(plan, decay))
        )
        with pytest.raises(PlanChanged) as caught:
            execute(changed, manifest, Interrupting(*NEVER))
        assert not _accept(changed, caught.value, ())
        assert _accept(changed, caught.value, ("optimizer.lr", "optimizer.arguments"))
        assert run(changed, manifest, Interrupting(*NEVER)) == 0
        rows = metrics_of(changed)
        assert [row["step"] for row in rows] == list(range(1, 8))
        assert rows[:3] == metrics_of(whole)[:3]
        for row in rows:
            rate = (plan.optimizer.lr if row["step"] <= 3 else 0.2) * multiplier(
                plan.schedule, row["step"] - 1
            )
            assert row["lr"] == pytest.approx(rate, rel=1e-12)
        ends.append(final(changed)[1])
    assert any(not torch.equal(ends[0][k], ends[1][k]) for k in ends[0] if k.startswith("weights"))


def test_what_can_not_be_gone_on_with_leaves_the_run_as_it_was(make, monkeypatch):
    from runtime import folder, resume

    plan, manifest = make()
    assert run(plan, manifest, Interrupting("step", 3, signal.SIGTERM)) == 130
    changed = evolve(plan, optimizer=evolve(plan.optimizer, lr=0.2))
    folder.accept(changed, "")

    def refused(*arguments, **named):
        raise RunFailed("no part of it fits")

    with monkeypatch.context() as patched:
        patched.setattr(resume, "load", refused)
        assert run(changed, manifest, Interrupting(*NEVER)) == 1
    assert lock.read(lock_path(Path(plan.run_folder))).digest == plan.digest
    assert run(plan, manifest, Interrupting(*NEVER)) == 0


def test_a_finished_run_is_given_more_steps(make):
    """It equals one that had them from the start, and so does its result."""
    from tuner.run import _accept, _at_its_end

    whole, manifest = make(name="whole")
    plan, _ = make(name="longer", steps=4, schedule=whole.schedule)
    assert run(whole, manifest, Interrupting(*NEVER)) == 0
    assert run(plan, manifest, Interrupting(*NEVER)) == 0
    for total, why in ((3, "can't go back to 3"), (4, "only be given more steps than 4"), (7, "")):
        asked = evolve(plan, steps=evolve(whole.steps, total=total))
        assert why in _at_its_end(asked) and bool(why) == bool(_at_its_end(asked))
    with pytest.raises(PlanChanged) as caught:
        execute(asked, manifest, Interrupting(*NEVER))
    assert _accept(asked, caught.value, ("steps",))
    events = Interrupting(*NEVER)
    assert run(asked, manifest, events) == 0
    assert "going on from step 4 of 7" in events.texts
    assert_equal(whole, asked)
    assert lock.read(lock_path(Path(asked.run_folder))).digest == asked.digest


def arguments(plan: Plan, decay: float) -> dict[str, object]:
    return {**plan.optimizer.arguments, "weight_decay": decay}


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(make, name):
    whole, manifest = make(name="whole")
    parts, _ = make(name="parts")
    assert run(whole, manifest, Interrupting(*NEVER)) == 0
    assert run(parts, manifest, Interrupting("step", 5, signal.SIGTERM)) == 130
    root = Path(parts.run_folder) / "checkpoints"
    newest = root / "step-000005" / name
    newest.write_bytes(newest.read_bytes()[:-8] + bytes(8))
    events = Interrupting(*NEVER)
    assert run(parts, manifest, events) == 0
    assert any(f"{newest} is damaged" in text for text in events.texts)
    assert "going on from step 4 of 7" in events.texts
    assert (root / "damaged-step-000005").is_dir()
    assert_equal(whole, parts)


def test_a_full_disk_loses_nothing_older(make, monkeypatch):
    plan, manifest = make(every=2)
    written = checkpoints._write

    def full(folder, snapshot):
        written(folder, snapshot)
        if snapshot.step == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_write", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        execute(plan, manifest, Interrupting(*NEVER))
    root = Path(plan.run_folder) / "checkpoints"
    assert [p.name for p in root.iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert run(plan, manifest, Interrupting(*NEVER)) == 0
    whole, _ = make(name="whole")
    assert run(whole, manifest, Interrupting(*NEVER)) == 0
    assert_equal(whole, plan)


def test_a_disk_that_is_full_while_pictures_are_encoded_is_said(make, monkeypatch, tmp_path):
    """With what to free and where else the cache may be; the next run goes on from what is kept."""
    plan, manifest = make(name="no-cache")
    plan = evolve(plan, cache_folder=str(tmp_path / "cache"))
    written = caching.Cache._write
    kept = []

    def full(cache, pending):
        if kept:
            raise OSError(28, "No space left on device")
        kept.append(len(pending))
        written(cache, pending)

    monkeypatch.setattr(caching.Cache, "_write", full)
    with pytest.raises(RunFailed, match="No space left on device") as caught:
        execute(plan, manifest, Interrupting(*NEVER))
    assert "MiB are free there, to write" in caught.value.message
    assert "[cache] path" in caught.value.help and "run again" in caught.value.help
    monkeypatch.undo()
    assert kept and run(plan, manifest, Interrupting(*NEVER)) == 0


def test_a_disk_that_is_full_at_the_result_is_said(make, monkeypatch):
    plan, manifest = make(name="no-room")
    save = lora.export

    def full(*given, **more):
        save(*given, **more)  # a part of it is there when the disk is full
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(lora, "export", full)
    with pytest.raises(RunFailed, match="No space left") as caught:
        execute(plan, manifest, Interrupting(*NEVER))
    assert "run again" in caught.value.help and not result_folder(plan).exists()
    monkeypatch.undo()
    assert run(plan, manifest, Interrupting(*NEVER)) == 0 and result_folder(plan).is_dir()


def test_a_run_folder_that_can_not_be_written_is_said(make):
    plan, manifest = make()
    (Path(plan.run_folder) / "run.log").mkdir(parents=True)
    with pytest.raises(RunFailed, match=r"run\.log"):
        execute(plan, manifest, Interrupting(*NEVER))


def test_trackers_are_shown_the_base_s_picture_left_of_the_trained_one(make, monkeypatch):
    import numpy as np
    from PIL import Image

    from runtime import seeing

    class Seeing:
        def __init__(self):
            self.seen = {}

        def picture(self, step, name, image):
            self.seen[step] = name, np.asarray(image)

        def metrics(self, step, values):
            pass

    real, found = seeing.painter_of, {}
    for at_start in (True, False):
        plan, manifest = make(
            name=f"run-{at_start}",
            steps=2,
            lr=2e-2,
            validation=evolve(PICTURES, every=1, at_start=at_start),
        )
        watch = found[at_start] = Seeing()
        monkeypatch.setattr(
            "runtime.execute.painter_of", lambda c, t, _, watch=watch: real(c, t, [watch])
        )
        assert run(plan, manifest, Interrupting(*NEVER)) == 0
        files = {
            int(path.parent.name[5:]): np.asarray(Image.open(path))
            for path in Path(plan.run_folder).rglob("samples/*/*.png")
        }
        assert sorted(files) == [0, 1, 2][not at_start :]
        for step, (name, shown) in watch.seen.items():
            assert name == "dog-64x64-42"
            expected = [files[0], files[step]] if at_start and step else [files[step]]
            assert np.array_equal(shown, np.concatenate(expected, 1))
    assert list(found[True].seen) == [0, 1, 2] and list(found[False].seen) == [1, 2]


def test_scores(make):
    plan, manifest = make(
        steps=2,
        validation=evolve(
            PICTURES,
            every=0,
            score="shapes",
            seeds=(1, 2),
            prompts=(
                evolve(PICTURES.prompts[0], name="red circle", text="a red circle"),
                evolve(PICTURES.prompts[0], name="a/b", text="nothing that can be scored"),
            ),
        ),
    )
    assert run(plan, manifest, Interrupting(*NEVER)) == 0
    folder = Path(plan.run_folder) / "samples" / "step-000002"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["scored"] == 2
    assert scores["prompts"].keys() == {"red circle"}
    assert 0.0 <= scores["mean"] <= 1.0
    assert scores["weights"] == "ema"
    assert (folder / "a%2Fb-64x64-1.png").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_diffusers_loads_the_result_and_draws_the_same(make, family, method):
    """Plain Diffusers, given the result, draws what the run's last validation drew."""
    import diffusers
    import numpy as np
    from PIL import Image

    plan, manifest = make(
        family, method, steps=4, lr=2e-2, validation=evolve(PICTURES, every=0, steps=4)
    )
    assert run(plan, manifest, Interrupting(*NEVER)) == 0
    cls = {"sana": diffusers.SanaPipeline, "sd3": diffusers.StableDiffusion3Pipeline}[family]
    if method == "lora":
        pipeline = cls.from_pretrained(plan.model.base)
        pipeline.load_lora_weights(plan.run_folder + "/lora")
    else:
        pipeline = cls.from_pretrained(plan.run_folder + "/model")
    extra = {"max_sequence_length": plan.text.max_length}
    if family == "sana":
        extra |= {
            "complex_human_instruction": list(plan.text.instruction),
            "use_resolution_binning": False,
        }
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline(
        prompt=plan.validation.prompts[0].text,
        negative_prompt=plan.validation.negative,
        width=64,
        height=64,
        guidance_scale=plan.validation.guidance,
        num_inference_steps=plan.validation.steps,
        generator=torch.Generator().manual_seed(42),
        **extra,
    ).images

    def drawn(step: int):
        path = Path(plan.run_folder) / "samples" / f"step-{step:06d}" / "dog-64x64-42.png"
        return np.asarray(Image.open(path), dtype=np.int16)

    ours, base = drawn(4), drawn(0)
    assert np.abs(np.asarray(image, dtype=np.int16) - ours).max() <= 1
    assert np.abs(base - ours).max() > 1


@pytest.mark.parametrize(
    ("family", "method"), [("sana", "lora"), ("sana", "full"), ("sd3", "lora")]
)
def test_measured_memory_is_what_the_simulation_says(make, family, method):
    """On the processor: live tensors of one step, against the same step on meta tensors."""
    from compiler.memory import Candidate
    from runtime.memory.simulate import RuntimeMemoryModel

    plan, manifest = make(family, method, steps=2, ema=None)
    found = RuntimeMemoryModel().simulate(
        Candidate(
            model=plan.model,
            adapter=plan.adapter,
            precision=plan.precision,
            text=plan.text,
            objective=plan.objective,
            optimizer=plan.optimizer,
            max_grad_norm=plan.max_grad_norm,
            ema_on_device=False,
            accumulate=plan.steps.accumulate,
            layout=Layout(),
            shapes=tuple((b.width, b.height, b.batch_size) for b in plan.buckets),
            device="cpu",
        )
    )
    plan = evolve(plan, memory=evolve(plan.memory, phases=found.phases))
    memory = execute(plan, manifest, Interrupting(*NEVER)).measured["memory"]["train"]
    assert memory["measured_bytes"] == pytest.approx(memory["planned_bytes"], rel=0.03)


def test_what_a_person_can_cause_is_said_in_a_sentence(make, place):
    plan, manifest = make()
    for changed, text in (
        (evolve(plan, adapter=evolve(LORA, targets=("nothing",))), "matches none of"),
        (evolve(plan, validation=evolve(PICTURES, score="taste")), "measure `taste`"),
        (evolve(plan, device="cuda"), "plan runs on cuda"),
        (evolve(plan, model=evolve(plan.model, base=str(place / "gone"))), "gone"),
    ):
        folder = Path(plan.run_folder).parent / text.replace(" ", "-").replace("`", "")
        changed = evolve(changed, run_folder=str(folder))
        with pytest.raises(RunFailed, match=text):
            execute(changed, manifest, Interrupting(*NEVER))


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shapes do not fit"))


def test_out_of_memory_in_a_step_keeps_the_last_one(make, monkeypatch):
    """The step before the one that failed is saved, though no checkpoint was due."""
    plan, manifest = make("sana", "lora", steps=6, ema=None)
    plan = evolve(plan, checkpoints=Checkpoints(every=0, keep=0))
    real, calls = loop.micro_step, []

    def too_large(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("tried to allocate 20 MiB")
        return real(*arguments)

    monkeypatch.setattr(loop, "micro_step", too_large)
    with pytest.raises(OutOfMemory, match="cpu ran out of memory in phase train") as caught:
        execute(plan, manifest, Interrupting(*NEVER))
    assert caught.value.phase == "train" and "tried to allocate" in caught.value.message
    saved = checkpoints.latest(Path(plan.run_folder) / "checkpoints")
    assert saved is not None
    assert checkpoints.read_state(saved)["step"] == 3 // plan.steps.accumulate
    monkeypatch.setattr(loop, "micro_step", real)
    execute(plan, manifest, Interrupting(*NEVER))
    whole, _ = make("sana", "lora", "whole", steps=6, ema=None)
    whole = evolve(whole, checkpoints=Checkpoints(every=0, keep=0))
    execute(whole, manifest, Interrupting(*NEVER))
    assert_equal(plan, whole)


def test_out_of_memory_in_an_update_saves_nothing_torn(make, monkeypatch):
    plan, manifest = make("sana", "lora", steps=4, ema=None)
    plan = evolve(plan, checkpoints=Checkpoints(every=0, keep=0))
    real, calls = loop.update, []

    def too_large(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("in the middle")
        real(*arguments)

    monkeypatch.setattr(loop, "update", too_large)
    with pytest.raises(OutOfMemory):
        execute(plan, manifest, Interrupting(*NEVER))
    assert checkpoints.latest(Path(plan.run_folder) / "checkpoints") is None
