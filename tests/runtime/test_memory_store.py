"""Answers on disk: found again, made anew where damaged, and never mixed up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from attrs import evolve

from compiler.memory import Candidate, Simulation
from compiler.plan import Layout, Phase
from runtime.memory import store
from runtime.memory.store import CachedMemoryModel, key
from tests.runtime.memory_cases import small

ANSWER = Simulation(
    phases=(
        Phase(name="load", device_bytes=700, host_bytes=7, parts={"weights": 700}),
        Phase(name="train", device_bytes=1024, host_bytes=0, parts={"weights": 512, "x": 512}),
    ),
    parameters=3,
    trainable=2,
    adapted_modules=1,
    flops=10**15,
    seconds=1.25,
)


class Counting:
    """Answers always the same and counts how often."""

    def __init__(self) -> None:
        self.made = 0
        self.asked = 0

    def make(self) -> Counting:
        """The factory."""
        self.made += 1
        return self

    def simulate(self, candidate: Candidate) -> Simulation:
        """The answer."""
        self.asked += 1
        return ANSWER


def test_second_time_from_disk(tmp_path: Path) -> None:
    inner = Counting()
    folder = tmp_path / "deep" / "memory"
    first = CachedMemoryModel(inner.make, folder).simulate(small("sana"))
    second = CachedMemoryModel(inner.make, folder).simulate(small("sana"))
    assert first == second == ANSWER
    assert (inner.made, inner.asked) == (1, 1)
    assert [p.suffix for p in folder.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"phases": 3}', "null", "half", "parts", "less", "host", "endless", "deep"],
)
def test_damaged_answer_is_replaced(tmp_path: Path, damage: str) -> None:
    inner = Counting()
    model = CachedMemoryModel(inner.make, tmp_path)
    model.simulate(small("sana"))
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    spoiled = {
        "half": whole[: len(whole) // 2],
        "parts": whole.replace("1024", "1025"),
        "less": whole.replace("1024", "-1024").replace("512", "-512"),
        "host": whole.replace('"host_bytes": 7', '"host_bytes": -7'),
        "endless": whole.replace("1024", "1e999"),
        "deep": "[" * 100_000,
    }
    path.write_text(spoiled.get(damage, damage))
    assert model.simulate(small("sana")) == ANSWER
    assert inner.asked == 2
    assert path.read_text() == whole


def test_folder_that_is_a_file_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inner = Counting()
    model = CachedMemoryModel(inner.make, tmp_path / "file")
    assert model.simulate(small("sana")) == model.simulate(small("sana")) == ANSWER
    assert (inner.made, inner.asked) == (1, 2)


def test_key_depends_on_candidate_libraries_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    base = small("sana")
    others = [
        small("sd3"),
        evolve(base, accumulate=2),
        evolve(base, layout=Layout(activation_checkpointing=1)),
        evolve(base, device="cuda"),
        evolve(base, shapes=((256, 256, 3),)),
        small("sana", rank=4),
        small("sana", rank=5),
        small("sana", compute="bfloat16"),
    ]
    keys = {key(c) for c in (base, *others)}
    assert len(keys) == 1 + len(others)
    assert key(small("sana")) == key(base)
    for name in ("_versions", "_source_digest"):
        with monkeypatch.context() as patch:
            patch.setattr(store, name, lambda: "other")
            assert key(base) not in keys


def test_compiled_blocks_are_simulated_like_others() -> None:
    assert key(small("sana")) == key(evolve(small("sana"), compiled=True))


def test_source_of_the_step_is_in_the_digest() -> None:
    root = Path(store.__file__).parents[2]
    for pattern in store.SOURCES:
        assert list(root.glob(pattern)), pattern


def test_importing_the_store_imports_no_torch() -> None:
    code = "import sys, runtime.memory.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
