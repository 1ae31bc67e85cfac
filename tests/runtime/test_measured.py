"""What a run on the processor measures of each of its phases, beside what was planned."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from compiler.compile import Compiled
from compiler.data.manifest import Manifest
from compiler.families import FAMILIES
from runtime import clock
from runtime.data.cache import Cache
from runtime.data.fill import fill_latents
from runtime.events import Silent
from runtime.execute import execute
from runtime.families import family_of
from runtime.measured import CACHED, row_of
from runtime.memory.corrections import remember
from runtime.memory.gauge import Gauge
from runtime.memory.phases import fullest
from runtime.memory.simulate import RuntimeMemoryModel
from tests.compiler.recipes import MACHINE, compiled, make_pictures
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.run_plan import Interrupting
from tests.runtime.tiny import make_tiny

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

RECIPE = """schema = 1
name = "run"
output = "runs"
[model]
family = "{family}"
base = "base"
{more}
[data]
resolution = 64
[[data.source]]
path = "pictures"
holdout = 2
captions = {{ from = "instance", prompt = "a dog" }}
[train]
steps = 3
batch_size = 2
optimizer = {{ name = "adamw", lr = 1e-3 }}
ema = {{ decay = 0.9 }}
[checkpoints]
every = "2 steps"
[validation]
steps = 2
[validation.prompts]
dog = "a dog"
[cache]
path = "cache"
"""
LORA = '[adapter]\nkind = "lora"\nrank = 2'
MIXED = '[precision]\ncompute = "bf16"\nweights = "bf16"\ntrained = "fp32"'
PHASES = {"latents", "load", "train", "update", "evaluate", "validate", "save"}

# Bytes by which a phase may differ from the plan, of the tiny models here. All else is equal.
TOLERANCES: dict[tuple[str, str], int] = {
    # The loop puts the losses of a window together before it asks for the norm.
    ("", "update"): 512,
    # Tensors that are made on the way, and gone once the model is there; here the largest are
    # tables of places, in float64 and complex numbers.
    ("", "load"): 1024,
    ("lumina2", "load"): 6144,
    ("qwen_image", "load"): 70_144,
    # The pipeline makes the numbers of all tokens once more, to warn of those that are cut.
    ("lumina2", "text_encoder"): 1024,
    # ChatGLM makes its mask only where it hides something, which it never does in a plan: three
    # tables of 256 x 256 in float32 or less.
    ("kolors", "text_encoder"): 3 * 4 * 256**2,
    # Tables in a function's memory, where nothing finds them (`lru_cache`).
    ("qwen_image", ""): 1024,
}
UNLIKE = {  # whose prompts are shorter than the longest that was planned, without padding
    "sana": {"text_encoder"},  # of which the instruction's length is guessed
    "lumina2": {"validate"},
    "qwen_image": {"text_encoder", "validate"},
    "z_image": {"validate"},
}


def planned(folder: Path, family: str, more: str = LORA, *overrides: str) -> Compiled:
    """A recipe of a tiny model, compiled with the simulation of its memory."""
    if not (folder / "base").exists():
        make_tiny(family, folder / "base")
        make_pictures(folder / "pictures", [(64, 64), (128, 64), (64, 64), (128, 64), (96, 64)])
    text = RECIPE.format(family=family, more=more)
    if FAMILIES[family].refines:
        start = '[validation]\npicture = "pictures/000.png"\nsteps = 4'
        text = text.replace("[validation]\nsteps = 2", start)
    (folder / "recipe.toml").write_text(text)
    model = RuntimeMemoryModel()
    return compiled(folder / "recipe.toml", *overrides, machine=MACHINE, memory_model=model)


def run(result: Compiled, events: Any = None) -> dict[str, Any]:
    """The memory of `measured.json`; {} of a run that was stopped."""
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    found: dict[str, Any] = execute(result.plan, result.manifest, events or Silent()).measured
    return found.get("memory", {})


def check(family: str, memory: Mapping[str, Any]) -> None:
    """Every phase was measured; those of what was planned are as planned."""
    assert memory.keys() == PHASES | set(FAMILIES[family].text_encoders)
    unlike = {name for name, row in memory.items() if "measured_on" in row}
    assert unlike == UNLIKE.get(family, set())
    for name, row in memory.items():
        assert sum(row["measured_parts"].values()) == row["measured_bytes"] > 0, name
        if name in unlike:
            assert row["measured_on"] != row["planned_on"], name
            continue
        places = ((family, name), (family, ""), ("", name))
        most = max(TOLERANCES.get(place, 0) for place in places)
        assert abs(row["measured_bytes"] - row["planned_bytes"]) <= most, (name, row)


QUICK = [("sana", LORA), ("sd3", MIXED)]
SLOW = [
    *((name, LORA) for name in sorted(FAMILIES) if name != "sana"),
    ("sana", MIXED),
    ("sdxl", f"{LORA}\n{MIXED}"),
]


@pytest.mark.parametrize(
    ("family", "more"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_every_phase_is_measured_as_planned(tmp_path: Path, family: str, more: str) -> None:
    """Parts too, but for what only passes by."""
    memory = run(planned(tmp_path, family, more))
    check(family, memory)
    for name in ("latents", "train", "evaluate", "validate", "save"):
        row = memory[name]
        if row["measured_bytes"] == row["planned_bytes"]:
            assert row["measured_parts"] == row["planned_parts"], name


@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_pictures_encoded_together_are_measured_as_planned(tmp_path: Path, family: str) -> None:
    make_tiny(family, tmp_path / "base")
    make_pictures(tmp_path / "pictures", [(128, 64)] * 6 + [(64, 64)] * 2)
    found = {}
    for count in (1, 3):
        made = planned(tmp_path, family, LORA, f"cache.batch={count}")
        assert made.plan is not None and made.manifest is not None
        (phase,) = (phase for phase in made.plan.memory.phases if phase.name == "latents")
        cache, gauge = Cache(tmp_path / "cache"), Gauge(torch.device("cpu"))
        kind = family_of(family)
        fill_latents(made.plan, made.manifest, kind, cache, Silent(), gauge=gauge)
        reading = gauge.readings["latents"]
        assert reading.on == reading.planned and reading.on.startswith("3 ") is (count == 3)
        assert reading.peak == phase.device_bytes and reading.parts == phase.parts
        found[count] = phase.parts
    assert found[3]["weights"] == found[1]["weights"]
    assert found[3]["activations"] > 2.5 * found[1]["activations"]


def test_which_batches_may_need_most() -> None:
    """Of one picture each the largest, be there several; else what no other is above in both."""
    assert fullest([(64, 64, 1), (128, 64, 1), (64, 128, 1)]) == [(128, 64, 1), (64, 128, 1)]
    assert fullest([(64, 64, 3), (128, 64, 3), (128, 64, 2)]) == [(128, 64, 3)]
    assert fullest([(64, 64, 3), (128, 64, 1), (96, 64, 1)]) == [(64, 64, 3), (128, 64, 1)]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), min_size=1))
def test_what_may_need_most_is_above_the_rest(shapes: list[tuple[int, int, int]]) -> None:
    """Whatever grows with both: the most is found among them."""
    found = fullest(shapes)
    for weight in (0.0, 0.5, 1.0, 2.0):
        needs = [(w * h) ** weight * n for w, h, n in shapes]
        needs += [(w * h) * n**weight for w, h, n in shapes]
        kept = [(w * h) ** weight * n for w, h, n in found] + [
            w * h * n**weight for w, h, n in found
        ]
        assert max(needs) == max(kept)
    assert all(not (a[0] * a[1] > b[0] * b[1] and a[2] >= b[2]) for a in shapes for b in found)


def test_of_several_fullest_batches_none_is_like(tmp_path: Path, tiny_sana: Path) -> None:
    """One large picture or three small ones: only the simulation knows which needs more."""
    draw_data(tmp_path / "dog", [(70, 90)] + [(64, 64)] * 4)
    plan, manifest = tiny_plan("sana", tiny_sana, tmp_path / "dog", tmp_path / "run", vae_batch=3)
    family, cache, gauge = family_of("sana"), Cache(tmp_path / "cache"), Gauge(torch.device("cpu"))
    fill_latents(plan, manifest, family, cache, Silent(), gauge=gauge)
    reading = gauge.readings["latents"]
    assert reading.on == "3 pictures of 64x64"
    assert set(reading.planned.split(" or ")) == {"64x80", reading.on}


def test_measuring_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run without: caches, checkpoints, results and pictures are the same bytes."""
    found = []
    for name, gauge in (("with", Gauge), ("without", lambda device: Gauge(None))):
        folder = tmp_path / name
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(clock, "Gauge", gauge)
            memory = run(planned(folder, "sana"))
        assert (memory["validate"]["measured_bytes"] is None) is (name == "without")
        assert (memory["latents"]["measured_bytes"] is None) is (name == "without")
        made = {
            str(path.relative_to(folder)): content(path)
            for path in (folder / "runs").rglob("*")
            if path.suffix in (".safetensors", ".png")
        }
        metrics = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [{k: v for k, v in json.loads(r).items() if k != "seconds"} for r in metrics]
        found.append((cached(folder / "cache"), made, rows))
    assert len(found[0][0]) > 6 < len(found[0][1])
    assert found[0] == found[1]


def content(path: Path) -> object:
    """A file's bytes; of a safetensors file also its header, whose metadata have no order."""
    found = path.read_bytes()
    if path.suffix != ".safetensors":
        return found
    end = 8 + int.from_bytes(found[:8], "little")
    return json.loads(found[8:end]), found[end:]


def cached(folder: Path) -> list[bytes]:
    """The bytes of all tensors in a cache, whose shards have names by chance."""
    shards = [load_file(path) for path in folder.rglob("*.safetensors")]
    return sorted(
        t.contiguous().view(torch.uint8).numpy().tobytes() for s in shards for t in s.values()
    )


def test_a_run_in_parts_measures_what_it_does(tmp_path: Path) -> None:
    """Stopped in the steps and in the drawing; and what is cached is not encoded again."""
    result = planned(tmp_path, "sana")
    assert run(result, Interrupting("step", 1, signal.SIGTERM)) == {}
    memory = run(result)
    for name in ("text_encoder", "latents"):
        assert memory[name]["measured_bytes"] is None and memory[name]["note"] == CACHED
    for name in PHASES - {"latents"}:
        row = memory[name]
        assert abs(row["measured_bytes"] - row["planned_bytes"]) <= 1024, name


def test_only_like_is_set_beside_like(tmp_path: Path, tiny_sana: Path) -> None:
    """The largest pictures are cached: what is left to encode is smaller than what was planned."""
    draw_data(tmp_path / "dog", [(128, 64), (64, 64)])
    plan, manifest = tiny_plan("sana", tiny_sana, tmp_path / "dog", tmp_path / "run")
    samples = sorted(manifest, key=lambda sample: -sample.placement.width)
    largest = Manifest(manifest.folders, samples[:1])
    family, cache = family_of("sana"), Cache(tmp_path / "cache")
    sizes = [f"{s.placement.width}x{s.placement.height}" for s in samples]
    for some, measured in ((largest, sizes[0]), (manifest, sizes[1])):
        gauge = Gauge(torch.device("cpu"))
        fill_latents(plan, some, family, cache, Silent(), gauge=gauge)
        reading = gauge.readings["latents"]
        assert (reading.on, reading.planned) == (measured, sizes[0])
        row = row_of({"weights": reading.peak}, reading.peak, reading, True)
        assert ("measured_on" in row) is (measured != sizes[0])
        path = tmp_path / f"{measured}.json"
        assert remember(path, plan, MACHINE, {"latents": row}) is (measured == sizes[0])
    gauge = Gauge(torch.device("cpu"))
    fill_latents(plan, manifest, family, cache, Silent(), gauge=gauge)
    assert not gauge.readings


def test_only_the_largest_piece_counts_and_none_that_fails() -> None:
    """And what is on the host, or was there before, is told apart."""
    gauge, before = Gauge(torch.device("cpu")), torch.zeros(1024)
    with pytest.raises(ValueError), gauge.reading("validate", 9):
        raise ValueError
    for size, count in ((1, 4096), (1, 8192), (4, 1024), (2, 8192)):
        given = {"weights": [before]}
        with gauge.reading("validate", size, given, [torch.zeros(4)]) as piece:
            made = torch.zeros(count)
        assert (gauge.readings["validate"] is piece) is (count != 8192)
    assert gauge.readings["validate"].parts == {"weights": 4096, "activations": 4096}
    with gauge.reading("save", 0, {"weights": [before, made]}, on_host=True):
        copies = [before.clone(), made.clone()]
    assert gauge.readings["save"].peak == 4096 + 4 * 8192 and len(copies) == 2
