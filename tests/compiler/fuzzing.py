"""Mutated recipes and hostile files around them; `python -m tests.compiler.fuzzing COUNT SEED`.

Each recipe goes through the whole compiler under a time limit, with every file that is opened for
writing noted. What is found is a plan or diagnostics that render: never an exception, a write or a
hang.
"""

from __future__ import annotations

import builtins
import copy
import datetime
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w

from compiler.compile import compile_file
from compiler.diagnostics import render, to_json
from compiler.lock import dumps, loads
from tests.compiler.recipes import MACHINE, FixedMemory, make_pictures, project
from tests.compiler.test_fuzz import mutate
from tests.compiler.test_fuzz_compile import FULL, hostile

SECONDS = 10
"""For one recipe; most take a few thousandths of a second."""
LONG = "x" * 100_000
TREES: tuple[Any, ...] = (
    *(0, -1, 1, 2**31, 2**63 - 1, -(2**63), 1e308, 5e-324, -0.0, float("nan"), float("inf")),
    *(True, False, "", " ", "auto", "none", "off", "\n", "\x7f", "\u202e", "\U0001f600", "e\u0301"),
    *("0x10", "1e3", "1 epoch", "0 steps", "1e99 steps", "100%", "-5%", "9 YiB", "1 ns", LONG),
    *("/", "..", ".", "~", "~root/x", "//", "pipe", "loop", "loop/x", "/dev/zero", "/dev/stdin"),
    *("/proc/self/mem", "closed", "bytes.bin", "pictures/000.png", "preset:", "preset:../x"),
    *("recipe.toml", "hub:a/b", "a\\b", "C:\\x", "con", "(a+)+$", "[", "(?P<", "\\", "sets/deep"),
    *([], {}, [[]], [{}], {"": ""}, {"a": {"b": {"c": {}}}}, ["auto"], [1, "a", True]),
    *(datetime.date(2024, 2, 29), datetime.time(1, 2), datetime.datetime(1, 1, 1)),
)
KEYS = (
    "",
    "a",
    "name",
    "lr",
    "path",
    "kind",
    "a.b",
    "\U0001f600",
    "x" * 300,
    "\n",
    "512",
    "-1",
    "1e3",
)
ENCODINGS = ("utf-16", "utf-32", "utf-16-le", "latin-1", "cp1252", "utf-8-sig", "utf-7")
EXTENDS = (
    "recipe.toml",
    "other.toml",
    "loop",
    "preset:sana-1.6b-lora-12g",
    "preset:x",
    ".",
    "pipe",
)


class TooSlow(Exception):
    """A compilation ran into its time limit."""


def world(folder: Path) -> Path:
    """A project with a pipe, a loop of links, a file of bytes and a deep folder beside it."""
    path = project(folder, FULL)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "bytes.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "other.toml").write_text('extends = "recipe.toml"\nseed = 1\n')
    make_pictures(folder / "sets" / "deep" / "er", [(64, 64)])
    (folder / "sets" / "up").symlink_to(folder / "sets")
    os.mkfifo(folder / "sets" / "deep" / "er" / "000.txt")
    return path


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a tree but the root's."""
    if not isinstance(tree, dict | list):
        return []
    items: Any = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in items:
        found += [(*path, key), *nodes(value, (*path, key))]
    return found


def grown(rng: random.Random) -> Any:
    """A value that is large, deep, or one of those that break things."""
    match rng.randrange(12):
        case 0:
            value: Any = 1
            for _ in range(rng.choice((3, 31, 33, 200))):
                value = [value] if rng.random() < 0.5 else {"a": value}
            return value
        case 1:
            return [copy.deepcopy(rng.choice(TREES)) for _ in range(rng.choice((2, 50)))]
        case 2:
            return {f"k{n}": copy.deepcopy(rng.choice(TREES)) for n in range(rng.choice((2, 300)))}
        case 3:
            return rng.randrange(-(2**80), 2**80)
    return copy.deepcopy(rng.choice(TREES))


def shaken(tree: dict[str, Any], rng: random.Random) -> None:
    """One change to the tree: another value or key, one less, one more, one moved."""
    *above, last = rng.choice(nodes(tree) or [("x",)])
    holder: Any = tree
    for part in above:
        holder = holder[part]
    kind = rng.randrange(6)
    if kind == 0 and isinstance(holder, dict):
        holder.pop(last, None)
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(KEYS)] = holder.pop(last, 1)
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(KEYS)] = grown(rng)
    elif kind == 3:
        holder[last] = [holder[last]] if last in holder or isinstance(holder, list) else 1
    elif kind == 4:
        tree["extends"] = rng.choice(EXTENDS)
    else:
        holder[last] = grown(rng)


def written(tree: dict[str, Any]) -> str:
    """As TOML, however deep: who writes it recurses, and is not what is tested."""
    most = sys.getrecursionlimit()
    sys.setrecursionlimit(20 * most)
    try:
        return tomli_w.dumps(tree)
    finally:
        sys.setrecursionlimit(most)


def mutated(rng: random.Random) -> bytes:
    """A recipe with one to four mutations, of its text, its tree or its bytes."""
    if rng.random() < 0.5:
        tree = tomllib.loads(FULL)
        for _ in range(rng.randrange(1, 4)):
            shaken(tree, rng)
        text = written(tree)
    else:
        text = FULL
        for _ in range(rng.randrange(1, 4)):
            text = (hostile if rng.random() < 0.6 else mutate)(text, rng)
    if rng.random() < 0.05:
        text = text.replace("\n", rng.choice(("\r\n", "\r", "\n\r", "\n\n", "\x0b")))
    if rng.random() < 0.05:
        return text.encode(rng.choice(ENCODINGS), "replace")
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.05 and content:
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


@contextmanager
def nothing_written(noted: list[str]) -> Iterator[None]:
    """Notes every file that Python opens for writing, makes, moves or removes."""
    kept = {name: getattr(os, name) for name in ("open", "mkdir", "unlink", "replace", "rename")}
    plain_open = builtins.open

    def os_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            noted.append(str(path))
        return kept["open"](path, flags, *rest, **named)  # type: ignore[no-any-return]

    def opened(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if set(mode) & set("wax+"):
            noted.append(str(file))
        return plain_open(file, mode, *rest, **named)

    def noting(name: str) -> Any:
        return lambda *rest, **named: (noted.append(f"{name} {rest}"), kept[name](*rest, **named))[
            1
        ]

    for name in kept:
        setattr(os, name, os_open if name == "open" else noting(name))
    builtins.open = io.open = opened
    try:
        yield
    finally:
        builtins.open = io.open = plain_open
        for name, function in kept.items():
            setattr(os, name, function)


def _alarm(_: int, __: FrameType | None) -> None:
    raise TooSlow


def compile_one(path: Path, noted: list[str]) -> bool:
    """Compile the recipe; whether it gave a plan. Raises what the compiler should not."""
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    try:
        with nothing_written(noted):
            result = compile_file(
                path,
                machine=MACHINE,
                memory_model=FixedMemory(),
                cache_default=path.parent / "cache",
                presets=Path(__file__).parents[2] / "recipes" / "presets",
            )
            for fault in result.diagnostics:
                render(fault, result.texts)
                json.dumps(to_json(fault, result.texts))
            result.decisions()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    errors = [fault for fault in result.diagnostics if fault.severity == "error"]
    assert (result.plan is None) == bool(errors)
    assert all(fault.message for fault in errors)
    if result.plan is not None:
        assert loads(dumps(result.plan)) == result.plan
    return result.plan is not None


def listing(folder: Path) -> list[str]:
    """All names below a folder, links not followed."""
    found = []
    for place, folders, files in os.walk(folder):
        found += [os.path.join(place, name) for name in (*folders, *files)]
    return sorted(found)


def fuzz(folder: Path, count: int, seed: int) -> int:
    """Compile `count` mutated recipes in `folder`; how many gave a plan."""
    path, rng, plans = world(folder), random.Random(seed), 0
    before = listing(folder)
    for number in range(count):
        content, noted = mutated(rng), list[str]()
        path.write_bytes(content)
        try:
            plans += compile_one(path, noted)
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed}: {content!r}") from error
        assert not noted, f"mutation {number} of seed {seed} wrote {noted}: {content!r}"
    assert listing(folder) == before
    return plans


if __name__ == "__main__":
    began = time.perf_counter()
    total, start_seed = int(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as place:
        made = fuzz(Path(place), total, start_seed)
    print(f"{total} recipes, {made} plans, {time.perf_counter() - began:.0f} s")
