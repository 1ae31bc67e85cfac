"""Every recipe and preset on the shelf plans, simulated, without its device or data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from compiler.compile import Compiled, compile_file
from compiler.families import FAMILIES
from compiler.plan import Plan
from tests.compiler.recipes import MACHINE, held_file
from tests.runtime.forked import Forked
from tuner.cli import run_command
from tuner.shelf import presets, shipped_recipes
from tuner.simulations import memory_model

WHOLE = bool(os.environ.get("TUNER_WHOLE_SHELF"))  # simulate all of it: many minutes
SIMULATED = {  # in any case; the others are compiled
    "quickstart",
    "quickstart-full",
    "sana-1.6b-full",
    "sana-1.6b-lora",
    "sana-sprint-0.6b",
    "sd15-lora",
    "sd35-large-lora",
    "sprint-quickstart",
    "sana-1.6b-lora-8g",
    "sana-1.6b-full-24g",
    "sd35-large-lora-16g",
    "z-image-lora-12g",
}
PICTURE = (1024, 1024)
WITH_THEIR_DATA = ("quickstart", "quickstart-full", "sprint-quickstart")
SHARDS = ("data/train_000.parquet", "data/train_001.parquet", "data/train_002.parquet")
RECIPES = shipped_recipes()
PRESETS = sorted((presets() or Path()).glob("*.toml"))
CHILD = """\
extends = "preset:{name}"
name = "child"
[[data.source]]
path = "pictures"
captions = {{ from = "instance", prompt = "a photo of sks dog" }}
[train]
epochs = 1
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 1024 pixels with captions; as little as a header needs."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", PICTURE).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text("a plain picture")
    return folder


@pytest.fixture(scope="module")
def shards(pictures: Path) -> Path:
    """The same pictures in the shards that recipes name, with captions in a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = pictures.parent / "shards"
    rows = [path.read_bytes() for path in sorted(pictures.glob("*.png"))[:4]]
    for name in SHARDS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": rows, "llava": ["a plain picture"] * 4}), folder / name)
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulations")


def plan_of(result: Compiled) -> Plan:
    assert result.plan is not None, [fault.message for fault in result.diagnostics]
    return result.plan


def simulated(path: Path) -> bool:
    return WHOLE or path.stem in SIMULATED


def peak(plan: Plan) -> int:
    return max(phase.device_bytes for phase in plan.memory.phases)


def test_the_shelf_holds_what_is_promised() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {
        "quickstart",
        "quickstart-full",
        "sana-1.6b-full",
        "sana-1.6b-lora",
        "sd35-large-lora",
        "sd35-medium-lora",
        "sd3-medium-full",
        "sana-sprint-0.6b",
        "sana-sprint-1.6b",
        "sprint-quickstart",
        "sd15-inversion",
        "sd35-medium-streamed",
        "sdxl-file-lora",
    }
    assert PRESETS


def test_the_streamed_recipe_lacks_nothing_but_a_look(tmp_path: Path) -> None:
    """Its data lie elsewhere, and a plan opens no connection."""
    path = next(path for path in RECIPES if path.stem == "sd35-medium-streamed")
    result = compile_file(path, machine=MACHINE, memory_model=None, cache_default=tmp_path)
    assert [fault.code for fault in result.diagnostics] == ["not-downloaded"]


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_plans(
    path: Path, pictures: Path, shards: Path, answers: Path, tmp_path: Path
) -> None:
    own = path.stem in WITH_THEIR_DATA
    sources = path.read_text().count("[[data.source]]")
    text = path.read_text()
    place = shards if SHARDS[0] in text or "streaming = true" in text else pictures
    overrides = [] if own else [f"data.source.{n}.path={place}" for n in range(sources)]
    if "streaming = true" in text:  # of what lies here nothing is streamed
        overrides += ["data.source.0.streaming=false", "data.source.0.captions.column=llava"]
    if "models/my-model.safetensors" in text:
        known = FAMILIES["sdxl"].known[0].base
        overrides.append(
            f"model.base={held_file(tmp_path / 'my-model.safetensors', 'sdxl', known)}"
        )
    result = compile_file(
        path,
        overrides=[*overrides, f"output={tmp_path}"],
        machine=MACHINE,
        memory_model=memory_model(answers) if simulated(path) else None,
        cache_default=tmp_path / "cache",
        presets=presets(),
    )
    plan = plan_of(result)
    assert plan.steps.total > 0
    if not simulated(path):
        return
    assert plan.memory.phases and peak(plan) > 0
    assert plan.memory.budget_bytes == 0 or peak(plan) <= plan.memory.budget_bytes
    assert plan.memory.counts["trainable"] > 0
    assert all(sum(p.parts.values()) == p.device_bytes for p in plan.memory.phases)


@pytest.mark.slow
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_what_its_name_says(
    path: Path, pictures: Path, answers: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "child.toml"
    recipe.write_text(CHILD.format(name=path.stem))
    plan = plan_of(
        compile_file(
            recipe,
            overrides=[f"data.source.0.path={pictures}"],
            machine=MACHINE,
            memory_model=memory_model(answers) if simulated(path) else None,
            cache_default=tmp_path / "cache",
            presets=presets(),
        )
    )
    if not simulated(path):
        return
    card = int(path.stem.rpartition("-")[2].removesuffix("g")) * 2**30  # a "24 GB" card has 24 GiB
    assert peak(plan) <= plan.memory.budget_bytes <= card


@pytest.mark.slow
@pytest.mark.parametrize("size", ["0.6b", "1.6b"])
def test_sprint_recipes_have_the_script_s_settings(size: str, shards: Path, tmp_path: Path) -> None:
    path = next(path for path in RECIPES if path.stem == f"sana-sprint-{size}")
    result = compile_file(
        path,
        overrides=[f"data.source.0.path={shards}", f"output={tmp_path}"],
        machine=MACHINE,
        memory_model=None,
        cache_default=tmp_path / "cache",
    )
    plan = plan_of(result)
    assert plan.sprint is not None
    assert (plan.optimizer.lr, plan.steps.total, plan.seed) == (1e-6, 30_000, 453645634)
    assert (plan.checkpoints.every, plan.checkpoints.keep) == (500, 10)
    assert (plan.sprint.largest_share, plan.sprint.misaligned_pairs) == (0.5, True)
    assert plan.sprint.teacher_time == 1.0 and plan.max_grad_norm == 0.1
    assert {bucket.batch_size for bucket in plan.buckets} == {1}


@pytest.mark.slow
def test_the_quickstart_teaches_a_new_shape(tmp_path: Path) -> None:
    path = next(path for path in RECIPES if path.stem == "quickstart")
    elsewhere = [f"output={tmp_path}", f"cache.path={tmp_path / 'cache'}", "launch.threads=1"]
    command = ["run", str(path), *(f"--set={key}" for key in elsewhere)]

    def work() -> int:
        os.chdir(path.parent.parent)
        return run_command(command)

    err = tmp_path / "err"
    assert Forked(work, tmp_path / "out", err).wait() == 0, err.read_text()
    run = tmp_path / "quickstart"
    scores = [json.loads(p.read_text()) for p in sorted(run.glob("samples/*/scores.json"))]
    before, after = (found["groups"] for found in scores)
    assert before["new"] <= 0.1 and before["old"] >= 0.9
    assert after["new"] >= 0.8 and after["old"] >= 0.8
    page = (run / "report.html").read_text()
    assert "src=" not in page.replace('src="data:', "") and "http-equiv" in page
    measured = json.loads((run / "measured.json").read_text())["memory"]["train"]
    assert measured["measured_bytes"] == pytest.approx(measured["planned_bytes"], rel=0.03)
