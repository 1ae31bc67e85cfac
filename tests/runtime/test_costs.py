"""Planned disk space, against the files of a real run; measured speed, kept and found again."""

import json
import math
import os
from pathlib import Path

import pytest
from attrs import evolve
from safetensors import safe_open

from compiler import costs
from compiler.data.prompts import prompts_of
from compiler.memory import Candidate
from compiler.plan import Plan, Prompt
from runtime import speeds
from runtime.data.store import INDEX, SHARDS
from runtime.events import Silent
from runtime.execute import execute
from runtime.memory.simulate import RuntimeMemoryModel
from runtime.saved import latest
from runtime.site import Here
from tests.runtime.plans import NO_PICTURES, draw_data, source_of, tiny_plan
from tests.runtime.tiny import make_tiny

SIZES = ((70, 70), (70, 70), (130, 64), (64, 130), (90, 90))
INDEX_BYTES = 64 * 1024  # pages of an SQLite file with four tables and few rows


def simulated(plan: Plan) -> Plan:
    """`plan` with the counts that the memory pass adds."""
    candidate = Candidate(
        model=plan.model,
        adapter=plan.adapter,
        precision=plan.precision,
        text=plan.text,
        objective=plan.objective,
        optimizer=plan.optimizer,
        max_grad_norm=plan.max_grad_norm,
        ema_on_device=False,
        accumulate=1,
        layout=plan.memory.layout,
        shapes=tuple({(b.width, b.height, min(b.batch_size, b.samples)) for b in plan.buckets}),
        device="cpu",
        keeps_base=any(source.target == "base" for source in plan.sources),
    )
    found = RuntimeMemoryModel().simulate(candidate)
    counts = {"trainable": found.trainable, "adapted": found.adapted_modules, "flops": found.flops}
    return evolve(plan, memory=evolve(plan.memory, counts=counts, phases=found.phases))


def tensor_bytes(folder: Path) -> int:
    """Bytes of the numbers in all safetensors files below `folder`."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module", params=["sana-full", "sd3-lora"])
def ran(request, tmp_path_factory):
    """A plan that was run, its manifest and what its folders held before."""
    family, method = request.param.split("-")
    root = tmp_path_factory.mktemp(request.param)
    data = source_of(draw_data(root / "data", SIZES), dropout=0.1)
    changes = {"adapter": None} if method == "full" else {"ema": None}
    validation = evolve(
        NO_PICTURES, prompts=(Prompt(name="long", text="a long prompt " * 9),), negative="bad"
    )
    plan, manifest = tiny_plan(
        family, make_tiny(family, root / "base"), [data], root / "runs" / "x",
        steps=12, every=4, keep=2, validation=validation, **changes,
    )  # fmt: skip
    plan = simulated(plan)
    site = Here(root / "user")
    before = site.present(plan, manifest)
    execute(plan, manifest, Silent())
    return plan, manifest, site, before


def test_the_cache_is_as_large_as_planned(ran):
    plan, manifest, _, _ = ran
    folder = Path(plan.cache_folder)
    prompts = prompts_of(plan, manifest)
    entries = len(manifest) + len(prompts)
    planned = costs.latents_bytes(plan) + costs.texts_bytes(plan, prompts)
    numbers = planned - entries * costs.ENTRY
    if plan.model.family == "sd3":
        assert tensor_bytes(folder / SHARDS) == numbers  # every prompt is padded: exact
    else:  # the tokens of a prompt are at most its bytes, here one letter each
        assert tensor_bytes(folder / SHARDS) <= numbers <= 1.25 * tensor_bytes(folder / SHARDS)
    whole = file_bytes(folder / SHARDS) + (folder / INDEX).stat().st_size
    assert numbers < whole <= planned + INDEX_BYTES


def test_checkpoints_are_as_large_as_planned(ran):
    plan, _, _, _ = ran
    newest = latest(Path(plan.run_folder) / "checkpoints")
    assert newest is not None
    planned = costs.one_checkpoint_bytes(plan)
    trainable = plan.memory.counts["trainable"]
    exact = trainable * 4 * (3 + (plan.ema is not None))  # weights, two moments, average; float32
    numbers = tensor_bytes(newest)
    assert numbers == trainable * 4 * (1 + (plan.ema is not None))
    assert (
        exact
        < file_bytes(newest)
        <= planned
        == exact + costs.TENSOR * (2 * plan.memory.counts["adapted"] or costs.TENSORS_OF_A_MODEL)
    )
    kept = len(list((Path(plan.run_folder) / "checkpoints").iterdir()))
    assert (kept, costs.kept(plan)) == (2, 3)  # the third is there before the first goes


def test_the_result_is_as_large_as_planned(ran):
    plan, _, _, _ = ran
    planned = costs.result_bytes(plan)
    folder = Path(plan.run_folder) / ("lora" if plan.adapter else "model")
    # besides the numbers: headers and metadata, and of a whole pipeline the small files
    assert planned <= file_bytes(folder) <= planned + 32 * 1024
    if plan.adapter:
        assert tensor_bytes(folder) == planned


def test_pictures_are_at_most_as_large_as_planned(ran):
    plan, manifest, _, _ = ran
    planned = costs.disk(plan, manifest, None, None).pictures_bytes
    assert planned == 64 * 64 * 3  # one prompt, one size, one seed, at the end
    assert 0 < file_bytes(Path(plan.run_folder) / "samples") <= planned + 1024


def test_nothing_is_cached_before_and_all_of_it_after(ran):
    plan, manifest, site, before = ran
    assert (before.latents.cached, before.latents.unknown, before.latents.missing) == (0, 0, 5)
    assert before.texts.missing == before.texts.total == 4  # caption, dropout, prompt, negative
    assert before.resume is None and before.run_bytes == 0
    files = sorted(Path(plan.cache_folder).rglob("*"))
    after = site.present(plan, manifest)
    assert sorted(Path(plan.cache_folder).rglob("*")) == files  # looking leaves no trace
    assert after.latents.cached == after.latents.total == 5 and after.latents.missing == 0
    assert after.texts.cached == after.texts.total == 4
    assert after.run_bytes == file_bytes(Path(plan.run_folder) / "checkpoints") + file_bytes(
        Path(plan.run_folder) / ("lora" if plan.adapter else "model")
    )


def test_a_changed_file_is_unknown_and_a_changed_format_is_missing(ran):
    plan, manifest, site, _ = ran
    path = manifest.path(0)
    status = os.stat(path)
    os.utime(path, (status.st_atime, status.st_mtime + 5))
    try:
        found = site.present(plan, manifest).latents
        assert (found.cached, found.unknown, found.missing) == (4, 1, 0)
    finally:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    other = evolve(plan, precision=evolve(plan.precision, cache="bfloat16"))
    assert site.present(other, manifest).latents.missing >= 4


def test_a_finished_run_and_a_changed_plan_are_told(ran):
    plan, _, _, _ = ran
    found = Here(Path(plan.cache_folder)).present(plan, ran[1]).resume
    assert found.finished and found.step == 12 and found.changes == () and not found.problem
    other = evolve(plan, optimizer=evolve(plan.optimizer, lr=0.5), track=("tensorboard",))
    changes = Here(Path(plan.cache_folder)).present(other, ran[1]).resume.changes
    assert changes == (("optimizer.lr", "0.001", "0.5"),)  # a tracker alters no weight


def test_a_measured_speed_is_found_again(ran, tmp_path):
    plan, manifest, _, _ = ran
    from tests.compiler.recipes import MACHINE

    path = tmp_path / speeds.SPEEDS
    assert costs.outlook(plan, manifest, MACHINE, Here(tmp_path)).duration is None
    assert speeds.remember(path, plan, MACHINE)
    seconds = speeds.step_seconds(Path(plan.run_folder) / "metrics.jsonl")
    assert len(seconds) == 12
    found = costs.outlook(plan, manifest, MACHINE, Here(tmp_path)).duration
    assert found.basis == "same-step" and "11 such steps" in found.why
    assert math.isclose(found.seconds_per_step, sum(seconds[1:]) / 11)
    assert math.isclose(found.train_seconds, 12 * found.seconds_per_step)
    wider = evolve(plan, buckets=tuple(evolve(b, batch_size=1) for b in plan.buckets))
    assert costs.outlook(wider, manifest, MACHINE, Here(tmp_path)).duration.basis == "same-device"
    assert costs.outlook(
        evolve(plan, threads=3), manifest, MACHINE, Here(tmp_path)
    ).duration is None  # fmt: skip


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "speeds": {"a": {}}}', "null"])
def test_damaged_speeds_cost_only_accuracy(text, tmp_path):
    path = tmp_path / speeds.SPEEDS
    path.write_text(text)
    assert speeds.read(path) == {}


def test_short_runs_measure_nothing(tmp_path, ran):
    plan = evolve(ran[0], run_folder=str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(json.dumps({"step": n, "seconds": 1.0}) for n in range(1, 6)) + '\n{"cut'
    )
    assert not speeds.remember(tmp_path / "s.json", plan, None)
    assert not (tmp_path / "s.json").exists()


def test_operations_of_what_the_base_predicts(tmp_path: Path) -> None:
    """The simulated step counts as one without them, and their source as a forward pass more."""
    sources = [source_of(draw_data(tmp_path / name, SIZES[:2])) for name in ("dog", "class")]
    kept = [sources[0], evolve(sources[1], target="base")]
    plain, more = (
        simulated(tiny_plan("sd3", make_tiny("sd3", tmp_path / "base"), given, tmp_path / "run")[0])
        for given in (sources, kept)
    )
    assert more.memory.counts["flops"] == plain.memory.counts["flops"] > 0
    half = costs.forward_share(plain) / 2
    assert costs.train_flops(more) == pytest.approx(costs.train_flops(plain) * (1 + half))
    assert costs.validate_flops(more) == costs.validate_flops(plain)
