"""Kills a whole run at random points, lets it go on, and compares with one that nobody touched.

    python -m tests.runtime.killing [COUNT] [SEED]

One process imports everything and draws the points; each run is a fork of it. A point is an
operation on the file system (open to write, rename, remove, make, link, wait for the disk, a
transaction of the cache), or something that the run says (a phase, a step, progress). Half of the
kills come right before it, half a random part of a millisecond after it, so that they hit writers
in the middle. All kinds of work get their share: caching, loading, stepping, judging, drawing,
saving, exporting, publishing. About every sixth run is not killed: the disk is full from the point
on, half of the times while a checkpoint is saved.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import torch
from attrs import evolve, frozen
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from compiler.data.manifest import Manifest
from compiler.plan import Checkpoints, Evaluation, HeldOut, Plan, Publish
from runtime import checkpoints, files
from runtime.context import result_folder
from runtime.data.store import Store
from runtime.errors import RunFailed
from runtime.events import Silent
from runtime.execute import execute
from runtime.publish.publisher import Publisher
from runtime.track.base import OFFLINE
from tests.runtime.plans import LORA, PICTURES, draw_data, tiny_plan
from tests.runtime.tiny import make_tiny
from tests.runtime.tiny_clip import make_clip

STEPS = 9
FULL_DISK = 28  # errno
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")
TAKES_ROOM = ("open", "os.rename", "os.mkdir", "os.link", "sync")
SECONDS = 120.0  # until a run counts as hung


@frozen(kw_only=True)
class Point:
    """The `number`-th point (from 1) of the kind of work `label`."""

    label: str
    number: int
    after: float | None = None  # seconds until the kill; None: right before
    full: bool = False  # no kill: writing fails from here on


class Watch(Silent):
    """Counts points, and strikes at one."""

    def __init__(self, point: Point | None, below: Path) -> None:
        self._point, self._below = point, str(below)
        self.seen: Counter[str] = Counter()
        self._phase, self._full, self._ended = "start", False, False
        self._note = os.open(below / "newest", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def phase(self, name: str, total: int, unit: str) -> None:
        """See `Events.phase`."""
        self._phase = name
        self.at("phase")

    def advance(self, done: int, **values: Any) -> None:
        """See `Events.advance`."""
        self.at("advance")

    def step(self, metrics: Mapping[str, Any]) -> None:
        """See `Events.step`."""
        self.at("step")
        self._ended = metrics["step"] == STEPS

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python tells of each operation before it is done."""
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | os.PathLike) and flags & WRITING and self._is_ours(path):
                self.at("open")
        elif event in CHANGES and self._is_ours(arguments[0]):
            self.at(event)

    def _is_ours(self, path: Any) -> bool:
        return os.fsdecode(path).startswith(self._below) if not isinstance(path, int) else True

    def at(self, event: str) -> None:
        """A point has come."""
        thread = threading.current_thread().name
        label = thread if thread in ("save", "publish") else self._phase
        if label == "train" and self._ended:
            label = "export"
        self.seen[label] += 1
        point = self._point
        if point and (label, self.seen[label]) == (point.label, point.number):
            os.write(self._note, newest(Path(self._below)).encode())
            if point.full:
                self._full = True
            elif point.after is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:  # the system ends the process then, without a word to Python
                signal.setitimer(signal.ITIMER_REAL, point.after)
        if self._full and event in TAKES_ROOM:
            raise OSError(FULL_DISK, os.strerror(FULL_DISK))


def newest(place: Path) -> str:
    """Name of the last complete checkpoint below `place`; "" without one."""
    found = checkpoints.latest(place / "run" / "checkpoints")
    return found.name if found else ""


@frozen(kw_only=True)
class Hub:
    """The hub's entry points; what is uploaded lies in a folder."""

    folder: Path

    def create_repo(self, hub: str, *, private: bool, exist_ok: bool) -> None:
        """See HfApi."""

    def upload_folder(
        self, *, repo_id: str, folder_path: str, path_in_repo: str | None, commit_message: str
    ) -> None:
        """See HfApi."""
        target = self.folder / (path_in_repo or "result")
        partial = self.folder / f"{files.PARTIAL}upload"  # a commit is there or not
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder_path, partial)
        files.remove_folder(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(target)

    def model_info(self, base: str, revision: str | None) -> Any:
        """See HfApi."""
        return SimpleNamespace(card_data=None)


def forked(task: Callable[[], int], log: Path) -> int:
    """The exit code of `task` in a process of its own; negative for a signal, 99 if it hung."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            code = task()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 99
        time.sleep(0.005)


def run(plan: Plan, manifest: Manifest, watch: Watch, counts: Path | None = None) -> int:
    """Execute as the command line does; 0 finished, 1 failed with a sentence."""
    hub = Hub(folder=Path(plan.run_folder).parent / "hub")
    os.environ.pop(OFFLINE, None)
    huggingface_hub.HfApi = lambda: hub  # type: ignore[misc,assignment]
    huggingface_hub.get_token = lambda: "hf_x"
    Publisher.__init__.__kwdefaults__["pauses"] = (0.01, 0.02)  # before an upload is tried again
    _watched(watch)
    try:
        outcome = execute(plan, manifest, watch, "# the recipe\n")
    except RunFailed as error:
        print(f"failed: {error.message}\n{error.help}")
        return 1
    if counts is not None:
        counts.write_text(json.dumps(watch.seen))
    return 0 if outcome.status in ("finished", "already") else 130


def _watched(watch: Watch) -> None:
    """Let `watch` know of what Python does not tell: waiting for the disk, and transactions."""
    sys.addaudithook(watch.audit)
    synced, writing = files.sync, Store.writing

    def sync(path: Path) -> None:
        watch.at("sync")
        synced(path)

    @contextmanager
    def transaction(store: Store) -> Iterator[sqlite3.Connection]:
        watch.at("transaction")
        with writing(store) as database:
            yield database
            watch.at("commit")
        watch.at("committed")

    files.sync = sync
    Store.writing = transaction  # type: ignore[method-assign,assignment]


class Stand:
    """A tiny pipeline and data, and runs of one plan on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_tiny("sana", folder / "sana")
        make_clip(folder / "clip")
        draw_data(folder / "dog", ((70, 70),) * 3 + ((140, 70),))

    def plan(self) -> tuple[Plan, Manifest]:
        """A plan with everything that a run can do, in an empty folder with a cache of its own.

        It is the same folder each time: its name is in the plan, and so in what is published.
        """
        place = self.folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        plan, whole = tiny_plan(
            "sana",
            self.folder / "sana",
            self.folder / "dog",
            place / "run",
            steps=STEPS,
            adapter=evolve(LORA, dropout=0.2),
            cache_folder=str(place / "cache"),
            validation=evolve(PICTURES, every=4, clip_model=str(self.folder / "clip")),
            checkpoints=Checkpoints(
                every=2, keep=1, keep_every=4, best="evaluation/loss", result="best"
            ),
            publish=Publish(hub="me/x", private=True, checkpoints=True, webhook=""),
        )
        held_out = list(whole)[3:]
        manifest = Manifest(whole.folders, list(whole), held_out)
        assert manifest.held_out is not None
        groups = tuple(
            HeldOut(
                source="dog",
                width=members.width,
                height=members.height,
                images=len(members.samples),
                batch_size=2,
            )
            for members in manifest.held_out.buckets
        )
        evaluation = Evaluation(
            every=2,
            timesteps=(0.25, 0.8),
            weights="average",
            manifest=manifest.held_out.digest,
            groups=groups,
        )
        return evolve(plan, evaluation=evaluation, manifest=manifest.digest), manifest


def outcome(plan: Plan) -> dict[str, Any]:
    """All that a finished run leaves that may not depend on when it was killed."""
    folder = Path(plan.run_folder)
    found: dict[str, Any] = {}
    for place in checkpoints.complete(folder / "checkpoints"):
        taken = checkpoints.load(place)
        found[f"{place.name} step"] = taken.step
        parts = {"weights": taken.weights, "ema": taken.ema or {}}
        parts |= {str(n): states for n, states in taken.optimizer["state"].items()}
        for part, tensors in parts.items():
            found |= {f"{place.name} {part} {k}": _bits(v) for k, v in tensors.items()}
    hub = folder.parent / "hub"
    last = hub / "checkpoints" / f"step-{STEPS:06d}"
    for root in (result_folder(plan), hub / "result", last):
        for file in sorted(root.rglob("*")):
            if file.is_file() and file.name != "state.json":
                found[f"{root.name} {file.relative_to(root)}"] = _content(file)
    for file in sorted((folder / "samples").rglob("*.png")):
        found[str(file.relative_to(folder))] = file.read_bytes()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found["metrics"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    found["left over"] = sorted(p.name for p in folder.rglob(f"{files.PARTIAL}*"))
    return found


def _content(file: Path) -> Any:
    """Of safetensors what it says, as the library writes metadata in any order."""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with safe_open(file, "pt") as opened:
        tensors = {name: _bits(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        return tensors, opened.metadata()


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def torn(plan: Plan) -> list[str]:
    """What is visible below a run folder and not whole. The last line of a log may be cut."""
    folder = Path(plan.run_folder)
    found: list[str] = []
    if not folder.exists():
        return found
    complete = checkpoints.complete(folder / "checkpoints")
    for place in (folder / "checkpoints").glob("step-*"):
        if place not in complete:
            found.append(f"{place.name} is not complete")
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or any(part.startswith((".", files.PARTIAL)) for part in parts):
            continue
        try:
            _read(path)
        except Exception as error:
            found.append(f"{'/'.join(parts)}: {type(error).__name__}: {error}")
    return found


def _read(path: Path) -> None:
    match path.suffix:
        case ".safetensors":
            load_file(path)
        case ".pt":
            torch.load(path, weights_only=True)
        case ".png":
            with Image.open(path) as image:
                image.load()
        case ".json":
            json.loads(path.read_text())
        case ".jsonl":
            for line in path.read_text().splitlines()[:-1]:
                json.loads(line)


def judge(stand: Stand, point: Point, expected: Mapping[str, Any], log: Path) -> tuple[str, int]:
    """Strike one run at `point`; what is wrong then ("" if nothing) and the exit code of it."""
    plan, manifest = stand.plan()
    place = Path(plan.run_folder).parent
    code = forked(lambda: run(plan, manifest, Watch(point, place)), log)
    if code not in (0, 1, -signal.SIGKILL, -signal.SIGALRM):
        return f"the struck run ended with {code}", code
    if newest(place) < (place / "newest").read_text():
        return "the newest checkpoint is lost", code
    if found := torn(plan):
        return f"torn: {'; '.join(found)}", code
    again = forked(lambda: run(plan, manifest, Watch(None, place)), log)
    if again:
        return f"going on ended with {again}", code
    return _different(outcome(plan), expected), code


def _different(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    if found == expected:
        return ""
    keys = [k for k in expected.keys() | found.keys() if found.get(k) != expected.get(k)]
    words = f"{len(keys)} differ: {', '.join(sorted(keys)[:4])}"
    if "metrics" in keys:
        words += f"; metrics {[row['step'] for row in found['metrics']]}"
    return words


def uninterrupted(stand: Stand, log: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """What a run leaves that nobody touches, and how many points of each kind it passes."""
    plan, manifest = stand.plan()
    place = Path(plan.run_folder).parent
    counts = place / "counts.json"
    assert forked(lambda: run(plan, manifest, Watch(None, place), counts), log) == 0
    found = outcome(plan)
    steps = [row["step"] for row in found["metrics"] if "loss" in row]
    assert steps == list(range(1, STEPS + 1)) and not found["left over"]
    return found, json.loads(counts.read_text())


def draw(counts: Mapping[str, int], count: int, seed: int) -> list[Point]:
    """`count` points, shared out evenly among the kinds of work."""
    chance = random.Random(seed)
    labels = sorted(counts)
    points = []
    for index in range(count):
        full = chance.randrange(6) == 0
        label = "save" if full and chance.randrange(2) else labels[index % len(labels)]
        points.append(
            Point(
                label=label,
                number=chance.randint(1, counts[label]),
                after=chance.choice((None, chance.uniform(1e-5, 1e-3))),
                full=full,
            )
        )
    return points


def kill(
    folder: Path, count: int, seed: int, say: Callable[[str], None] = print
) -> tuple[list[str], Counter[str]]:
    """Strike `count` runs; what was wrong, a sentence each, and how often what happened."""
    stand, log = Stand(folder), folder / "log"
    expected, counts = uninterrupted(stand, log)
    say(f"points of a run: {counts}")
    faults: list[str] = []
    happened: Counter[str] = Counter()
    for number, point in enumerate(draw(counts, count, seed)):
        fault, code = judge(stand, point, expected, log)
        ended = {0: "finished", 1: "failed"}.get(code, "killed" if code < 0 else str(code))
        happened[f"{'full disk' if point.full else 'kill'} in {point.label}: {ended}"] += 1
        if fault:
            faults.append(f"{number}: {point}: {fault}")
            say(faults[-1])
    return faults, happened


def main(arguments: list[str]) -> int:
    """See the module."""
    torch.set_num_threads(1)
    count = int(arguments[0]) if arguments else 200
    seed = int(arguments[1]) if len(arguments) > 1 else 0
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        faults, happened = kill(Path(folder), count, seed)
        if faults:
            print((Path(folder) / "log").read_text()[-6000:])
    for what, times in sorted(happened.items()):
        print(f"{times:4d}  {what}")
    print(f"{count} points, seed {seed}, {time.monotonic() - begun:.0f} s: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
