"""`[cache] batch`: how many pictures are encoded together, and what memory that takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from compiler.compile import Compiled
from compiler.lock import changes, dumps, loads
from compiler.memory import Candidate, Simulation, encoded_shapes
from compiler.plan import Bucket, HeldOut, Phase, Plan, alters_trajectory
from tests.compiler.recipes import FixedMemory, codes, compiled, make_pictures, project
from tests.tuner.examples import quickstart
from tuner.plan_view import text

GIB, MIB = 2**30, 2**20


class ByBatch(FixedMemory):
    """Encoding takes 1 GiB for each picture of 64 x 64 in a batch."""

    def simulate(self, candidate: Candidate) -> Simulation:
        found = super().simulate(candidate)
        shapes = candidate.encoded or tuple((w, h, 1) for w, h, _ in candidate.shapes)
        size = max(w * h * n for w, h, n in shapes) * GIB // 4096
        parts = {"activations": size}
        latents = Phase(name="latents", device_bytes=size, host_bytes=0, parts=parts)
        return evolve(found, phases=(latents, *found.phases))


def planned(folder: Path, *overrides: str, model: FixedMemory | None = None) -> Compiled:
    path = folder / "recipe.toml"
    path = path if path.exists() else project(folder)
    return compiled(path, *overrides, memory_model=model or ByBatch())


def plan_of(result: Compiled) -> Plan:
    assert result.plan is not None, result.diagnostics
    return result.plan


def test_one_at_a_time_unless_asked(tmp_path: Path) -> None:
    model = ByBatch()
    plan = plan_of(planned(tmp_path, model=model))
    assert plan.vae_batch == 1 and all(asked.encoded == () for asked in model.asked)
    (row,) = (d for d in plan.decisions if d.key == "cache.batch")
    assert (row.value, row.source) == ("1", "default") and "its picture alone" in row.why
    assert loads(dumps(plan)) == plan
    older = [row for row in dumps(plan).splitlines() if not row.startswith("vae_batch")]
    assert loads("\n".join(older)) == plan, "a lock from before there was a choice"


def test_what_is_asked_is_planned(tmp_path: Path) -> None:
    """The fullest batch of each bucket is simulated: no more than it has pictures."""
    path = project(tmp_path)
    make_pictures(tmp_path / "pictures", [(64, 64)] * 5 + [(128, 32)] * 2)
    for count, encoded in ((3, {(64, 64, 3), (128, 32, 2)}), (64, {(64, 64, 5), (128, 32, 2)})):
        model = ByBatch()
        asked = f"cache.batch={count}", 'data.crop.aspect="preserve"'
        plan = plan_of(compiled(path, *asked, memory_model=model))
        sizes = {(b.width, b.height): b.images for b in plan.buckets}
        assert sorted(sizes.values()) == [2, 5] and plan.vae_batch == count
        expected = {(w, h, min(count, images)) for (w, h), images in sizes.items()}
        assert all(set(each.encoded) == expected for each in model.asked)
        assert sorted(n for *_, n in expected) == sorted(n for *_, n in encoded)


def test_held_out_pictures_count_too() -> None:
    bucket = Bucket(source="a", width=64, height=64, images=2, samples=4, batch_size=4, batches=1)
    held = HeldOut(source="a", width=96, height=64, images=9, batch_size=1)
    assert encoded_shapes([bucket], [held], 4) == ((64, 64, 2), (96, 64, 4))
    assert encoded_shapes([bucket], [], 1) == ((64, 64, 1),)


@pytest.mark.parametrize("value", ["0", "65", "1.5", '"auto"', "true"])
def test_what_is_no_count_is_refused(tmp_path: Path, value: str) -> None:
    assert planned(tmp_path, f"cache.batch={value}").plan is None


@pytest.mark.parametrize("name", ["vae_batch_size", "caching_batch_size"])
def test_other_trainers_names(tmp_path: Path, name: str) -> None:
    (fault,) = planned(tmp_path, f"cache.{name}=4").diagnostics
    assert fault.code == "unknown-key" and "batch" in fault.help


def test_it_does_nothing_where_each_picture_is_alone(tmp_path: Path) -> None:
    path = project(tmp_path)
    for number in range(1, 5):
        (tmp_path / "pictures" / f"00{number}.png").unlink()
    result = compiled(path, "cache.batch=4", "train.batch_size=1")
    (fault,) = (f for f in result.diagnostics if f.path == "cache.batch")
    assert (fault.code, fault.severity) == ("no-effect", "warning")
    assert "cache.batch" not in [f.path for f in compiled(path, "cache.batch=1").diagnostics]


def test_what_does_not_fit_is_cut_smaller(tmp_path: Path) -> None:
    """The change that is offered is the largest batch, of halves, that fits."""
    tight = planned(tmp_path, "cache.batch=5", 'memory.budget="4.5 GiB"')
    assert codes(tight) == ["does-not-fit"]
    (fault,) = tight.diagnostics
    assert "phase latents needs 5.0 GiB" in fault.message
    assert fault.help.startswith("batch = 2 in [cache] would fit")
    again = planned(tmp_path, "cache.batch=2", 'memory.budget="4.5 GiB"')
    assert again.plan is not None


def test_another_batch_is_another_trajectory() -> None:
    """A run can't go on under another one as if nothing had changed."""
    old = quickstart()
    new = evolve(old, vae_batch=4)
    assert changes(old, new) == [("vae_batch", 1, 4)] and alters_trajectory("vae_batch")
    assert old.digest != new.digest


def test_the_plan_says_so() -> None:
    plan = quickstart()
    assert "at a time" not in text(plan, recipe="r.toml")
    (line,) = (
        row
        for row in text(evolve(plan, vae_batch=4), recipe="r.toml").splitlines()
        if "cache latents" in row
    )
    assert line.endswith("up to 4 at a time")
