"""Checkpoints are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import signal
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

from compiler.plan import Checkpoints
from runtime import checkpoints, files
from runtime import checksum as checksums
from runtime.checkpoints import Snapshot
from runtime.errors import RunFailed
from runtime.events import Silent
from runtime.saved import fault
from runtime.saving import prune
from runtime.shard_files import read_whole
from tests.runtime.forked import Forked


def snapshot(step: int, plan: str = "digest", size: int = 100, ema: bool = True) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(size, generator=generator), "b": torch.ones(2).bfloat16()}
    return Snapshot(
        step=step,
        epoch=1,
        plan=plan,
        weights=weights,
        optimizer={"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        ema={k: v * 2 for k, v in weights.items()} if ema else None,
        versions={"torch": torch.__version__},
    )


@pytest.mark.parametrize("ema", [True, False])
def test_what_is_saved_comes_back(tmp_path, ema):
    folder = checkpoints.save(tmp_path, snapshot(400, ema=ema))
    assert folder == tmp_path / "step-000400"
    loaded, saved = checkpoints.load(folder), snapshot(400, ema=ema)
    assert {k: v.dtype for k, v in loaded.weights.items()} == {
        k: v.dtype for k, v in saved.weights.items()
    }
    assert all(torch.equal(loaded.weights[k], saved.weights[k]) for k in saved.weights)
    assert (loaded.step, loaded.epoch, loaded.plan) == (400, 1, "digest")
    assert (loaded.ema is None) is not ema
    assert loaded.optimizer["state"][0]["step"].item() == 3.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000400"]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path, value):
    """A sum that overflows is none of these; an older checkpoint stays the last one."""
    large = snapshot(2)
    large.weights["b"].fill_(torch.finfo(torch.bfloat16).max)
    assert not large.weights["b"].sum().isfinite()
    kept = checkpoints.save(tmp_path, large)
    bad = snapshot(3)
    bad.weights["b"][1] = value
    with pytest.raises(RunFailed, match=r"step 3 left weights that are no numbers \(b\)"):
        checkpoints.save(tmp_path, bad)
    assert list(tmp_path.iterdir()) == [kept]


def test_latest_is_found_by_looking_and_torn_ones_are_not_seen(tmp_path):
    assert checkpoints.latest(tmp_path / "absent") is None
    for step in (2, 10, 1_000_000):
        checkpoints.save(tmp_path, snapshot(step))
    assert checkpoints.latest(tmp_path) == tmp_path / "step-1000000"
    (tmp_path / "step-1000000" / "weights.safetensors").write_bytes(b"cut")
    assert checkpoints.latest(tmp_path) == tmp_path / "step-000010"
    (tmp_path / "step-000010" / "state.json").write_text("{")
    (tmp_path / "step-000099").mkdir()
    (tmp_path / ".partial-step-000011").mkdir()
    assert checkpoints.latest(tmp_path) == tmp_path / "step-000002"
    assert files.clean(tmp_path) == [".partial-step-000011"]


def test_a_torn_one_is_replaced_and_a_complete_one_kept(tmp_path):
    folder = checkpoints.save(tmp_path, snapshot(5))
    before = (folder / "weights.safetensors").stat().st_ino
    checkpoints.save(tmp_path, snapshot(5))
    assert (folder / "weights.safetensors").stat().st_ino == before
    (folder / "optimizer.pt").unlink()
    checkpoints.save(tmp_path, snapshot(5))
    assert checkpoints.is_complete(folder)
    checkpoints.save(tmp_path, snapshot(5, plan="another"))
    assert checkpoints.read_state(folder)["plan"] == "another"


def test_keep(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoints.save(tmp_path, snapshot(step))
    metrics = tmp_path.parent / "metrics.jsonl"
    assert prune(tmp_path, Checkpoints(every=1, keep=0), metrics) == []
    gone = prune(tmp_path, Checkpoints(every=1, keep=2), metrics)
    assert [p.name for p in gone] == ["step-000001", "step-000002"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("failing", ["save_file", "torch.save", "state.json"])
def test_a_write_that_fails_loses_nothing_older(tmp_path, monkeypatch, failing):
    checkpoints.save(tmp_path, snapshot(1))

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    match failing:
        case "save_file":
            monkeypatch.setattr(checkpoints, "save_file", full)
        case "torch.save":
            monkeypatch.setattr(checkpoints.torch, "save", full)
        case _:
            monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunFailed, match="No space left") as caught:
        checkpoints.save(tmp_path, snapshot(2))
    assert "goes on from step 1" in caught.value.help
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001"]
    assert checkpoints.latest(tmp_path) == tmp_path / "step-000001"


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX processes")
@pytest.mark.parametrize("limit", [1 << 12, 1 << 18])
def test_a_real_write_error_loses_nothing_older(tmp_path, limit):
    """The system itself refuses to write past a limit, inside the libraries' own writers."""
    checkpoints.save(tmp_path, snapshot(1))
    out, err = (tmp_path.with_name(f"{tmp_path.name}.{kind}") for kind in ("out", "err"))

    def work() -> int:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(RunFailed, match="could not save the checkpoint of step 2"):
            checkpoints.save(tmp_path, snapshot(2, size=1 << 17))
        return 0

    assert Forked(work, out, err).wait() == 0, err.read_text()
    assert checkpoints.complete(tmp_path) == [tmp_path / "step-000001"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001"]


@pytest.mark.skipif(sys.platform == "win32", reason="kills a POSIX process")
def test_killed_while_saving(tmp_path):
    """A writer is killed again and again; no reader ever sees a torn checkpoint."""
    err = tmp_path.with_name(f"{tmp_path.name}.err")

    def work() -> int:
        for step in range(1, 1000):
            checkpoints.save(tmp_path, snapshot(step, size=1 << 16))
            prune(tmp_path, Checkpoints(every=1, keep=2), tmp_path / "none")
        return 0

    process = Forked(work, err=err)
    while checkpoints.latest(tmp_path) is None:
        assert process.poll() is None, err.read_text()
        time.sleep(0.005)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        visible = [p for p in tmp_path.iterdir() if p.name.startswith("step-")]
        for folder in visible:
            assert checkpoints.is_complete(folder) or not folder.exists()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    newest = checkpoints.latest(tmp_path)
    assert newest is not None
    loaded = checkpoints.load(newest)
    expected = snapshot(loaded.step, size=1 << 16)
    assert torch.equal(loaded.weights["a.weight"], expected.weights["a.weight"])
    files.clean(tmp_path)
    assert all(p.name.startswith("step-") for p in tmp_path.iterdir())


def damage(path: Path, place: float) -> None:
    """Turn 8 bytes over, so far into the file."""
    content = bytearray(path.read_bytes())
    start = min(int(place * len(content)), len(content) - 8)
    content[start : start + 8] = bytes(255 - byte for byte in content[start : start + 8])
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("place", [0.0, 0.6, 1.0])
def test_damage_of_the_same_size_is_seen_and_named(tmp_path, name, place):
    """torch and safetensors look at their own tables alone: of a tensor they load anything."""
    folder = checkpoints.save(tmp_path, snapshot(5))
    assert fault(folder) == ""
    damage(folder / name, place)
    assert checkpoints.is_complete(folder)
    assert f"{folder / name} is damaged" in fault(folder)
    with pytest.raises(RunFailed, match=name):
        checkpoints.load(folder)


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def message(self, text: str, level: str = "info") -> None:
        self.said.append((level, text))


def test_damaged_ones_are_set_aside_if_another_is_whole(tmp_path):
    heard = Heard()
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, snapshot(step))
    checkpoints.set_aside(tmp_path, heard)
    assert heard.said == []
    for step in (2, 3):
        damage(tmp_path / f"step-{step:06d}" / "ema.safetensors", 0.9)
    checkpoints.set_aside(tmp_path, heard)
    assert checkpoints.complete(tmp_path) == [tmp_path / "step-000001"]
    assert [level for level, _ in heard.said] == ["warning", "warning"]
    assert "step-000003/ema.safetensors is damaged" in heard.said[0][1]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "damaged-step-000002", "damaged-step-000003", "step-000001",
    ]  # fmt: skip
    damage(tmp_path / "step-000001" / "optimizer.pt", 0.5)
    with pytest.raises(RunFailed, match=r"no checkpoint is left .*optimizer\.pt is damaged"):
        checkpoints.set_aside(tmp_path, heard)
    assert checkpoints.complete(tmp_path) == [tmp_path / "step-000001"]


def test_a_state_that_does_not_say_what_it_must_is_never_gone_on_from(tmp_path):
    folder = checkpoints.save(tmp_path, snapshot(5))
    state = checkpoints.read_state(folder)
    for missing in state.keys() - {"checksums", "scaler", "sharded"}:
        without = {key: value for key, value in state.items() if key != missing}
        (folder / "state.json").write_text(json.dumps(without))
        assert not checkpoints.is_complete(folder) or f"does not say {missing}" in fault(folder)
    (folder / "state.json").write_text("[1]")
    assert checkpoints.latest(tmp_path) is None


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt"])
def test_a_file_that_no_checksum_covers_is_named_when_it_can_not_be_read(tmp_path, name):
    checkpoints.save(tmp_path, snapshot(3))
    folder = checkpoints.save(tmp_path, snapshot(5))
    state = checkpoints.read_state(folder)
    (folder / "state.json").write_text(json.dumps(state | {"checksums": {}}))
    damage(folder / name, 0.0)
    with pytest.raises(RunFailed, match=f"{name} can't be read") as caught:
        checkpoints.load(folder)
    assert "goes on from step 3" in caught.value.help


def test_a_checksum_is_of_all_blocks_in_their_order(tmp_path, monkeypatch):
    content = bytes(range(256)) * 10 + b"rest"
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(checksums, "BLOCK", 256)
    blocks = [content[start : start + 256] for start in range(0, len(content), 256)]
    joined = b"".join(zlib.crc32(block).to_bytes(4, "big") for block in blocks)
    assert checksums.checksum(tmp_path / "file") == f"{zlib.crc32(joined):08x}"


def test_damaged_parts_of_ranks_are_an_error_that_can_be_told(tmp_path):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    parts = {"weights.a": torch.arange(6.0)}
    save(parts, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    assert torch.equal(read_whole(tmp_path)["weights"]["a"], parts["weights.a"])
    (part,) = tmp_path.glob("*.distcp")
    damage(part, 0.0)
    with pytest.raises(OSError, match=r"."):
        read_whole(tmp_path)
