"""`tuner plan --json`: real output against its written schema, by a small validator of its own."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from compiler import costs
from compiler.compile import Compiled
from compiler.data.manifest import Manifest
from compiler.plan import Plan
from compiler.site import Counted, Present, Resume, Space, Speed
from tests.compiler.recipes import MACHINE, RECIPE, FixedMemory, compiled, make_pictures, project
from tuner.elsewhere import elsewhere
from tuner.plan_json import POINTS, json_object, schedule_points
from tuner.plan_schema import plan_schema
from tuner.plan_view import text

SCHEMA = Path(__file__).parents[2] / "docs" / "plan.schema.json"
TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    "integer": int, "number": (int, float),
}  # fmt: skip
VALIDATED = """
[adapter]
kind = "lora"

[validation]
prompts = { one = "a dog" }
sizes = ["64x64"]
"""


class FixedSite:
    """A machine with `free` bytes, and another disk for a folder called `cache` unless `one`."""

    def __init__(self, free: int = 10**12, *, resume: Resume | None = None, one: bool = False):
        self.free, self.resume, self.one = free, resume, one

    def space(self, folder: str) -> Space:
        roomy = folder.endswith("/cache") and not self.one
        return Space(free_bytes=10**12 if roomy else self.free, disk=0 if self.one else len(folder))

    def present(self, plan: Plan, manifest: Manifest) -> Present:
        return Present(
            texts=Counted(total=3, cached=3, unknown=0),
            latents=Counted(total=5, cached=1, unknown=2),
            resume=self.resume,
            run_bytes=0,
        )

    def speed(self, key: str) -> Speed | None:
        return Speed(flops_per_second=1e9, steps=40)


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str) -> Iterator[str]:
    """What of `value` the schema does not allow, or does not know: the keywords that ours uses."""
    schema = root["definitions"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if "oneOf" in schema:
        branches = [list(faults(value, part, root, at)) for part in schema["oneOf"]]
        if sum(not found for found in branches) != 1:
            yield from min(branches, key=len) or [f"{at}: fits several"]
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        good = any(isinstance(value, TYPES[name]) for name in names)
        if not good or (isinstance(value, bool) and "boolean" not in names):
            yield f"{at}: {value!r} is no {names}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} not in {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        yield f"{at}: {value!r} is not {schema['const']!r}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{at}: {value!r} does not match"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{at}: {len(value)} items"
        for number, item in enumerate(value):
            yield from faults(item, schema.get("items", {}), root, f"{at}[{number}]")
    if isinstance(value, dict):
        yield from _of_object(value, schema, root, at)


def _of_object(
    value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], at: str
) -> Iterator[str]:
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    required = list(schema.get("required", []))
    condition = schema.get("if", {}).get("properties", {})
    if condition and all(value.get(k) == v["const"] for k, v in condition.items()):
        required += schema["then"]["required"]
    yield from (f"{at}.{key} is missing" for key in required if key not in value)
    for key, item in value.items():
        if key in known:
            yield from faults(item, known[key], root, f"{at}.{key}")
        elif others is not None:
            yield from faults(item, others, root, f"{at}.{key}")
        elif known:  # a stricter reading than a reader's: nothing goes undescribed
            yield f"{at}.{key} is not described"


def checked(found: Compiled) -> dict[str, Any]:
    """The JSON of a compilation, as a program reads it, after it was held against the schema."""
    text = json.dumps(json_object(found.plan, found.diagnostics, found.outlook), allow_nan=False)
    value = json.loads(text)
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert list(faults(value, schema, schema, "plan")) == []
    assert isinstance(value, dict)
    return value


def test_the_schema_on_file_is_the_one_of_the_classes() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == plan_schema()


def test_the_validator_finds_what_is_wrong(tmp_path: Path) -> None:
    schema = plan_schema()
    good = checked(compiled(project(tmp_path), memory_model=FixedMemory(), site=FixedSite()))
    for change, words in (
        ({"digest": "x"}, "does not match"),
        ({"seed": "1"}, "is no"),
        ({"seed": True}, "is no"),
        ({"device": "tpu"}, "not in"),
        ({"format_version": 2}, "is not 1"),
        ({"new": 1}, "not described"),
        ({"disk": {}}, "disk: {} is no"),
    ):
        assert any(words in fault for fault in faults(good | change, schema, schema, "plan"))
    del good["cached"]
    assert list(faults(good, schema, schema, "plan")) == ["plan.cached is missing"]


@pytest.mark.parametrize("family", ["sana", "sd3"])
@pytest.mark.parametrize("simulated", [True, False])
def test_real_output_fits_the_schema(family: str, simulated: bool, tmp_path: Path) -> None:
    recipe = RECIPE.replace('"sana"', f'"{family}"') + VALIDATED + "\n[train.ema]\ndecay = 0.9\n"
    path = project(tmp_path, recipe, family)
    model = FixedMemory() if simulated else None
    found = checked(compiled(path, memory_model=model, site=FixedSite()))
    assert found["steps"]["total"] == 6 and found["steps"]["per_epoch"] == 3
    assert (found["disk"]["checkpoint_bytes"] is None) is not simulated
    assert found["model"]["parameters"] == (
        {"total": 1010, "trainable": 10} if simulated else {"total": None, "trainable": None}
    )
    assert found["cached"]["latents"] == {"total": 5, "cached": 1, "missing": 2, "unknown": 2}
    assert found["resume"] is None and found["disk"]["free_bytes"] == 10**12


def test_nobody_looked_at_a_machine(tmp_path: Path) -> None:
    found = checked(compiled(project(tmp_path)))
    assert found["cached"] is None and found["disk"]["free_bytes"] is None
    assert found["duration"]["why"] == "the step was not simulated"


def test_a_refused_recipe_fits_the_schema(tmp_path: Path) -> None:
    found = checked(compiled(project(tmp_path, RECIPE + "rnk = 1\n")))
    assert found["valid"] is False and "steps" not in found
    assert found["diagnostics"][0]["code"] == "unknown-key"


def test_duration_is_operations_by_speed(tmp_path: Path) -> None:
    found = compiled(project(tmp_path), memory_model=FixedMemory(), site=FixedSite())
    duration = checked(found)["duration"]
    # 1e9 operations at two pictures of 64 x 64, five pictures an epoch, two epochs; 1e9 a second
    assert duration["train_seconds"] == pytest.approx(0.5 * 5 * 2)
    assert duration["seconds_per_step"] == pytest.approx(5 / 6)
    assert duration["total_seconds"] == duration["left_seconds"] == duration["train_seconds"]
    assert duration["basis"] == "same-step" and "40 such steps" in duration["why"]


@pytest.mark.parametrize(
    ("resume", "left"),
    [
        (Resume(step=3, finished=False, changes=(), problem=""), 2.5),
        (Resume(step=6, finished=True, changes=(), problem=""), 0.0),
        (Resume(step=3, finished=False, changes=(("seed", "1", "0"),), problem=""), 5.0),
    ],
)
def test_what_a_resume_goes_on_from(resume: Resume, left: float, tmp_path: Path) -> None:
    site = FixedSite(resume=resume)
    found = checked(compiled(project(tmp_path), memory_model=FixedMemory(), site=site))
    assert found["resume"]["step"] == resume.step and found["resume"]["of"] == 6
    assert found["resume"]["differs"] == [
        {"key": key, "old": old, "new": new} for key, old, new in resume.changes
    ]
    assert found["duration"]["left_seconds"] == pytest.approx(left)


def test_skipped_images_are_listed_with_the_reason(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE.replace("resolution = 64", "resolution = 64\nmin_size = 50"))
    make_pictures(tmp_path / "pictures" / "small", [(40, 90)] * 2)
    (tmp_path / "pictures" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found = checked(compiled(path, "data.broken=skip"))
    rows = {(row["source"], row["images"]) for row in found["skipped"]}
    assert rows == {("pictures", 2), ("pictures", 1)}
    assert "an edge below 50 pixels" in [row["why"] for row in found["skipped"]]
    assert found["sources"][0]["skipped"] == 3


def test_what_is_known_of_a_machine_is_not_in_the_digest(tmp_path: Path) -> None:
    path = project(tmp_path)
    plans = [
        compiled(path, memory_model=FixedMemory(), site=site).plan
        for site in (None, FixedSite(), FixedSite(10**11))
    ]
    assert len({plan.digest for plan in plans if plan}) == 1


def test_the_curve_has_its_ends(tmp_path: Path) -> None:
    plan = compiled(project(tmp_path), "train.epochs=700").plan
    assert plan is not None
    points = schedule_points(plan)
    assert len(points) == POINTS
    assert (points[0]["step"], points[-1]["step"]) == (1, plan.steps.total)
    one = evolve(plan, steps=evolve(plan.steps, total=1))
    assert [point["step"] for point in schedule_points(one)] == [1]


def test_a_full_disk_is_an_error_of_this_machine(tmp_path: Path) -> None:
    tail = '\n[checkpoints]\nevery = "1 steps"\nkeep = 5\n\n[adapter]\nkind = "lora"\n'
    path, model = project(tmp_path, RECIPE + tail), FixedMemory()
    one = 10 * 12 + 4 * costs.TENSOR  # ten parameters of twelve bytes, in four tensors
    free = 3 * one + 10 * 4  # three checkpoints and the result
    refused = compiled(path, memory_model=model, site=FixedSite(free))
    (fault,) = [d for d in refused.diagnostics if d.severity == "error"]
    assert fault.code == "disk-full" and refused.plan is None
    assert fault.path == "checkpoints.keep" and "`keep = 2` in [checkpoints] fits" in fault.help
    assert compiled(path, "checkpoints.keep=2", memory_model=model, site=FixedSite(free)).plan
    assert not compiled(path, "checkpoints.keep=3", memory_model=model, site=FixedSite(free)).plan


def test_a_disk_elsewhere_is_only_warned_of(tmp_path: Path) -> None:
    """A recipe for a device that is not here will run on another machine."""
    path = project(tmp_path, RECIPE + '\n[launch]\ndevice = "cuda"\n')
    found = compiled(path, memory_model=FixedMemory(), site=FixedSite(1000), machine=MACHINE)
    assert found.plan is not None
    assert {d.severity for d in found.diagnostics if d.code == "disk-full"} == {"warning"}
    named = elsewhere(MACHINE, "l40s")
    found = compiled(path, memory_model=FixedMemory(), site=FixedSite(1000), machine=named)
    assert found.plan is not None
    assert {d.severity for d in found.diagnostics if d.code == "disk-full"} == {"warning"}


@pytest.mark.parametrize("one", [False, True])
def test_a_cache_without_room_names_the_cache(one: bool, tmp_path: Path) -> None:
    path = project(tmp_path)
    found = compiled(
        path, f'cache.path="{tmp_path / "elsewhere"}"', memory_model=None,
        site=FixedSite(500, one=one),
    )  # fmt: skip
    paths = [d.path for d in found.diagnostics if d.code == "disk-full"]
    assert "cache.path" in paths or one
    assert paths


def test_hidden_files_are_named(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE)
    make_pictures(tmp_path / "pictures" / ".ipynb_checkpoints", [(64, 64)])
    (tmp_path / "pictures" / ".DS_Store").write_bytes(b"x")
    result = compiled(path)
    found = checked(result)
    names = [".DS_Store", ".ipynb_checkpoints"]
    assert found["hidden"] == [{"source": "pictures", "count": 2, "names": names}]
    assert result.plan is not None
    view = text(result.plan, recipe="recipe.toml", outlook=result.outlook)
    assert "2 hidden left alone: .DS_Store, .ipynb_checkpoints" in " ".join(view.split())


def test_a_run_of_a_hundred_million_steps_is_described_at_once(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + VALIDATED + 'every = "1 steps"\n')
    start = time.perf_counter()
    changes = ("train.steps=100000000", "checkpoints.every=1 steps", "checkpoints.keep=0")
    path.write_text(path.read_text().replace("epochs = 2\n", ""))
    result = compiled(path, *changes, memory_model=FixedMemory())
    found = checked(result)
    assert found["checkpoints"]["times"] == 10**8 and found["validation"]["times"] == 10**8 + 1
    assert found["checkpoints"]["at"] == list(range(1, 1001))
    assert time.perf_counter() - start < 5


if __name__ == "__main__":  # write the schema anew, then read the diff
    SCHEMA.parent.mkdir(exist_ok=True)
    SCHEMA.write_text(json.dumps(plan_schema(), indent=1) + "\n", encoding="utf-8")
