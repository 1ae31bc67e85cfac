"""The catalogue of codes: complete, without a dead entry, and each example gives its code."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from attrs import evolve

from compiler.codes import CODES
from compiler.compile import Compiled, compile_file
from compiler.data.manifest import Manifest
from compiler.machine import HUB_TOKEN
from compiler.memory import Candidate, Simulation
from compiler.migrate import migrated
from compiler.plan import Plan
from compiler.site import Counted, Present, Site, Space
from compiler.source import parse_source
from tests.compiler.recipes import (
    GPU,
    MACHINE,
    RECIPE,
    FixedMemory,
    compiled,
    held_file,
    make_pictures,
    project,
)

ROOT = Path(__file__).parents[2]
PLACE = {
    "error": 0,
    "warn": 0,
    "report": 1,
    "reject": 0,
    "Fault": 1,
    "_unreadable": 2,
    "SourceUnfit": 0,
}
KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def _literals(node: ast.expr | None, named: Mapping[str, str]) -> list[str]:
    match node:
        case ast.Name(id=name) if name in named:
            return [named[name]]
        case ast.Constant(value=str(text)):
            return [text]
        case ast.IfExp(body=one, orelse=other):
            return _literals(one, named) + _literals(other, named)
    return []


def _codes_in(tree: ast.AST) -> set[str]:
    """Codes handed to whatever makes diagnostics, and defaults of attributes called `code`."""
    found: list[str] = []
    named = {
        node.targets[0].id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=args):
                place = PLACE.get(name, len(args))
                found += _literals(args[place], named) if place < len(args) else []
                for keyword in node.keywords:
                    found += _literals(keyword.value, named) if keyword.arg == "code" else []
            case ast.AnnAssign(target=ast.Name(id="code"), value=value):
                found += _literals(value, named)
    return {text for text in found if KEBAB.fullmatch(text)}


def _emitted() -> set[str]:
    files = [path for room in ("compiler", "tuner") for path in (ROOT / room).rglob("*.py")]
    return {code for path in files for code in _codes_in(ast.parse(path.read_text("utf-8")))}


def test_the_catalogue_is_what_the_compiler_emits() -> None:
    emitted = _emitted()
    assert emitted - set(CODES) == set(), "compiler/codes.py lacks these"
    assert set(CODES) - emitted == set(), "nothing emits these any more"


def test_every_code_is_spelt_like_one_and_said_in_sentences() -> None:
    assert list(CODES) == sorted(CODES)
    for code, entry in CODES.items():
        assert KEBAB.fullmatch(code)
        assert entry.title[0].islower() or entry.title.startswith("`"), code
        assert not entry.title.endswith("."), code
        assert entry.meaning.endswith("."), code
        assert entry.wrong != entry.right and entry.wrong.isascii() and entry.right.isascii()


class NoLayer:
    """A memory model that has no layer of the name of the example."""

    def simulate(self, candidate: Candidate) -> Simulation:
        if candidate.adapter and candidate.adapter.targets == ("no_such_layer",):
            raise ValueError("no layer matches `no_such_layer`")
        return FixedMemory().simulate(candidate)


def _world(folder: Path) -> None:
    """A working recipe, and all the files that the examples speak of."""
    project(folder, RECIPE)
    make_pictures(folder / "more", [(64, 64)] * 4)
    make_pictures(folder / "masks", [(64, 64)] * 5)
    make_pictures(folder / "small", [(32, 32)] * 5)
    make_pictures(folder / "mixed", [(64, 64)] * 4 + [(128, 32)])
    make_pictures(folder / "latin1", [(64, 64)] * 4, caption="a")
    (folder / "latin1" / "000.txt").write_bytes("caf\xe9".encode("latin-1"))
    make_pictures(folder / "captioned", [(64, 64)] * 4, caption="a cafe")
    make_pictures(folder / "damaged", [(64, 64)] * 4)
    (folder / "damaged" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 half")
    held_file(folder / "v2.safetensors", "sd", "stabilityai/stable-diffusion-2")
    (folder / "empty").mkdir()
    rows = [json.dumps({"file_name": f"captioned/{n:03}.png", "text": "a cafe"}) for n in range(4)]
    (folder / "table.jsonl").write_text("\n".join(rows))
    (folder / "splits").mkdir()
    for split in ("train", "test"):
        (folder / "splits" / f"{split}.jsonl").write_text(
            "\n".join(rows).replace('"cap', '"../cap')
        )
    (folder / "latin1.csv").write_bytes(
        "file_name,text\ncaptioned/000.png,caf\xe9\n".encode("latin-1")
    )
    (folder / "prompts.txt").write_text("a dog on a beach\na dog in the snow\n")
    (folder / "weights.toml").write_bytes(b"#" * (9 * 2**20))


def _laid_over(folder: Path, example: str) -> Compiled:
    """The example as a recipe that extends the working one, or as its command line."""
    if example.startswith("tuner "):
        words = shlex.split(example, comments=True)
        overrides = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
        return _compiled(folder / words[2], *overrides)
    head = "" if example.startswith("extends") else 'extends = "recipe.toml"\n'
    head += "" if example.startswith("name") else 'name = "try"\n'
    path = folder / "subject.toml"
    path.write_text(head + example, encoding="utf-8")
    return _compiled(path)


class FullDisk:
    """A machine without a free byte."""

    def space(self, folder: str) -> Space:
        return Space(free_bytes=0, disk=1)

    def present(self, plan: Plan, manifest: Manifest) -> Present:
        none = Counted(total=5, cached=0, unknown=0)
        return Present(texts=none, latents=none, resume=None, run_bytes=0)

    def speed(self, key: str) -> None:
        return None


def _compiled(path: Path, *overrides: str, site: Site | None = None) -> Compiled:
    return compile_file(
        path,
        overrides=overrides,
        machine=MACHINE,
        memory_model=NoLayer(),
        cache_default=path.parent / "cache",
        presets=ROOT / "recipes" / "presets",
        site=site,
    )


def _codes(result: Compiled) -> set[str]:
    return {fault.code for fault in result.diagnostics}


def _old_key(folder: Path, patch: pytest.MonkeyPatch) -> Compiled:
    source, _ = parse_source("schema = 1\nnom = 'x'\n", "old.toml")
    assert source is not None
    _, faults = migrated(source, {1: {("nom",): ("name",)}}, 2)
    return Compiled(plan=None, manifest=None, diagnostics=tuple(faults), texts={})


def _many(folder: Path, patch: pytest.MonkeyPatch) -> Compiled:
    return _laid_over(folder, "".join(f"x{number} = 1\n" for number in range(300)))


def _utf16(folder: Path, patch: pytest.MonkeyPatch) -> Compiled:
    (folder / "wide.toml").write_text(RECIPE, encoding="utf-16")
    return _compiled(folder / "wide.toml")


def _no_file_has_this_name(folder: Path, patch: pytest.MonkeyPatch) -> Compiled:
    return _compiled(folder / "a\0b.toml")


def _closed_folder(folder: Path, patch: pytest.MonkeyPatch) -> Compiled:
    def scan(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    patch.setattr("compiler.passes.places.scan", scan)
    return _compiled(folder / "recipe.toml")


def _without_captions(folder: Path, patch: pytest.MonkeyPatch) -> Compiled:
    return _laid_over(folder, '[[data.source]]\npath = "pictures"')


def _full_disk(folder: Path, patch: pytest.MonkeyPatch) -> Compiled:
    return _compiled(folder / "recipe.toml", site=FullDisk())


class Parked:
    """A memory model by which activations that wait on the host take all of it, and one byte."""

    def simulate(self, candidate: Candidate) -> Simulation:
        found = FixedMemory().simulate(candidate)
        waiting = GPU.host_total_bytes + 1 if candidate.layout.offload_activations else 0
        phases = tuple(evolve(each, host_bytes=waiting) for each in found.phases)
        return evolve(found, phases=phases)


def _small_host(folder: Path, patch: pytest.MonkeyPatch) -> Compiled:
    path = folder / "subject.toml"
    path.write_text('extends = "recipe.toml"\nname = "try"\n' + CODES["host-too-small"].wrong)
    return compiled(path, machine=GPU, memory_model=Parked())


def _damaged(folder: Path, patch: pytest.MonkeyPatch) -> Compiled:
    over = '[data]\nbroken = "error"\n[[data.source]]\npath = "damaged"\n'
    return _laid_over(folder, over + 'captions = { from = "instance", prompt = "x" }')


def _without_package(folder: Path, patch: pytest.MonkeyPatch) -> Compiled:
    path = folder / "recipe.toml"
    machine = evolve(MACHINE, missing=("torch-optimi",))
    return compiled(path, "train.optimizer.name=lion", machine=machine)


def _without_token(folder: Path, patch: pytest.MonkeyPatch) -> Compiled:
    machine = evolve(MACHINE, missing=(HUB_TOKEN,))
    return compiled(folder / "recipe.toml", "publish.hub=me/my-model", machine=machine)


STAGED: dict[str, Callable[[Path, pytest.MonkeyPatch], Compiled]] = {
    "broken-images": _damaged,
    "disk-full": _full_disk,
    "host-too-small": _small_host,
    "missing-captions": _without_captions,
    "missing-package": _without_package,
    "missing-token": _without_token,
    "old-key": _old_key,
    "too-many": _many,
    "unreadable-file": _no_file_has_this_name,
    "unreadable-folder": _closed_folder,
    "wrong-encoding": _utf16,
}
"""Examples whose comment must be acted out."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    _world(folder)
    return folder


@pytest.mark.parametrize("code", CODES)
def test_the_wrong_example_gives_its_code(
    code: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code in STAGED:
        result = STAGED[code](world, monkeypatch)
    else:
        result = _laid_over(world, CODES[code].wrong)
    assert code in _codes(result)


# The right example of `old-key` is of schema 2, which does not exist yet.
@pytest.mark.parametrize("code", [code for code in CODES if code != "old-key"])
def test_the_right_example_does_not(code: str, world: Path) -> None:
    assert code not in _codes(_laid_over(world, CODES[code].right))
