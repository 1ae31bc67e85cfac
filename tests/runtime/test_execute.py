"""Whole runs of tiny pipelines: what they leave, and results that Diffusers loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from attrs import evolve

from compiler.plan import Checkpoints, Layout
from runtime import checkpoints
from runtime.execute import execute
from tests.runtime.plans import PICTURES
from tests.runtime.run_plan import Interrupting, run
from tests.runtime.whole_runs import (
    NEVER,
    assert_equal,
    make,
    place,
)

__all__ = ["make", "place"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and POSIX signals")


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
