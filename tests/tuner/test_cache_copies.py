"""`tuner cache`: copies of what lies elsewhere, and of compressed tars, are told and removed."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from compiler.compile import Compiled, compile_file
from compiler.data.manifest import Manifest
from compiler.data.sources.remote import DOWNLOADS, copied, picture_path
from compiler.home import default_cache
from runtime.data.copies import MANIFEST, copies, note_run
from runtime.data.downloads import copy_sources
from runtime.data.items import read
from runtime.data.pictures import copy_pictures
from runtime.data.unpacked import UNPACKED
from tests.compiler.data import containers
from tests.compiler.data.pictures import encoded, picture
from tests.compiler.recipes import MACHINE, RECIPE, make_base
from tests.runtime.data.servers import served
from tests.runtime.data.test_downloads import SOURCE
from tests.tuner.test_cache import DAY, told
from tuner.exits import DONE

TOLD = {f"{n}.png": (encoded(picture(64, 64, seed=n), "PNG"), f"a, {n}") for n in range(4)}


def quiet(_: str) -> None:
    pass


def plan(folder: Path, name: str, source: str) -> Compiled:
    path = folder / f"{name}.toml"
    text = RECIPE.replace(SOURCE, source).replace('"try"', f'"{name}"')
    path.write_text(text, encoding="utf-8")
    return compile_file(path, machine=MACHINE, cache_default=default_cache())


def begun(result: Compiled) -> Path:
    """As a run that begins leaves it."""
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    folder = Path(result.plan.run_folder)
    folder.mkdir(parents=True)
    result.manifest.save(folder / MANIFEST)
    note_run(folder, default_cache())
    return folder


def test_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    make_base(tmp_path / "base")
    tar = containers.as_tar(tmp_path / "plain.tar", TOLD).read_bytes()
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress(tar))
    with served() as site:
        site.pages = {f"/{name}": data for name, (data, _) in TOLD.items()}
        site.pages |= {"/a.tar": tar, "/b.tar": tar}
        rows = [{"url": f"{site.url}/{name}", "text": text} for name, (_, text) in TOLD.items()]
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:3]))
        copy_pictures([str(row["url"]) for row in rows], default_cache() / "downloads", quiet)
        for name in "ab":
            first = plan(tmp_path, name, f'path = "{site.url}/{name}.tar"')
            assert first.draft is not None
            copy_sources(first.draft.remotes, first.draft.downloads, quiet)
        url, lost = site.url, picture_path(default_cache() / "downloads", str(rows[3]["url"]))
    unpacked = plan(tmp_path, "unpacked", 'path = "t.tar.gz"')
    assert unpacked.manifest is not None and len(read(unpacked.manifest.item(0))) > 100
    other = plan(tmp_path, "gone", f'path = "{url}/b.tar"')
    runs = [
        begun(plan(tmp_path, "one", f'path = "{url}/a.tar"')),
        begun(plan(tmp_path, "two", 'path = "t.jsonl"')),
        begun(unpacked),
    ]
    begun(other).rename(tmp_path / "moved")
    for copy in copies(default_cache()):
        for path in copy.paths:
            for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
                os.utime(each, (time.time() - 2 * DAY,) * 2)

    found = copies(default_cache())
    assert sorted((copy.kind, [use.run for use in copy.uses]) for copy in found) == [
        ("image", []),
        *[("image", [str(runs[1])])] * 3,
        ("source", []),
        ("source", [str(runs[0])]),
        ("unpacked", [str(runs[2])]),
    ]
    assert all(copy.bytes > 1000 for copy in found)
    code, wrapped = told(capsys, "list")
    text = " ".join(wrapped.split())
    assert code == DONE and "copied: 7 copies" in text
    assert f"{url}/a.tar, used by {runs[0]}" in text and f"{url}/b.tar, used by no run" in text
    assert "4 images, 1 used by no run" in text and "1 unpacked tar, 0 used by no run" in text
    listed = json.loads(told(capsys, "list", "--json")[1])["copies"]
    assert sorted(each["kind"] for each in listed) == sorted(copy.kind for copy in found)
    assert json.loads(told(capsys, "list", "--path", str(tmp_path), "--json")[1])["copies"] == []

    assert "2 copies" in told(capsys, "prune", "--unused")[1] and len(copies(default_cache())) == 7
    assert told(capsys, "prune", "--unused", "--yes")[1].count("2 copies") == 1
    assert len(copies(default_cache())) == 5 and not lost.exists()
    remote = other.draft.copies[0] if other.draft else None
    assert remote is not None and copied(default_cache() / "downloads", remote) is None
    assert plan(tmp_path, "again", f'path = "{url}/a.tar"').plan is not None
    assert "0 copies" in told(capsys, "prune", "--older", "1 d", "--yes")[1]  # just used
    assert "5 copies" in told(capsys, "prune", "--size", "1 B", "--yes")[1]
    assert copies(default_cache()) == [] and len(read(unpacked.manifest.item(0))) > 100


def test_places_of_a_manifest(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    containers.as_tar(tmp_path / "t.tar", TOLD)
    result = plan(tmp_path, "x", 'path = "t.tar"\nholdout = 1')
    assert result.manifest is not None
    result.manifest.save(tmp_path / "m.jsonl")
    assert Manifest.places(tmp_path / "m.jsonl") == {str(tmp_path / "t.tar")}


def test_what_vanishes_while_it_is_counted_is_passed_over(tmp_path: Path) -> None:
    source = tmp_path / DOWNLOADS / "a1"
    for folder in (source, tmp_path / UNPACKED):
        folder.mkdir(parents=True)
        (folder / "there").write_bytes(b"1234")
        (folder / "gone").symlink_to(tmp_path / "nowhere")
    assert [copy.bytes for copy in copies(tmp_path)] == [4, 4]
