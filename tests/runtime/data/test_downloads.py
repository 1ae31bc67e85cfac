"""What lies elsewhere is copied once, whole, and a plan never asks for it."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from compiler.data.sources.remote import (
    FAILED,
    LATER,
    Remote,
    copied,
    hub_parts,
    is_remote,
    picture_path,
)
from compiler.plan import lock_path
from runtime.data import downloads, pictures, stores
from runtime.data.downloads import changed_sources, copy_sources
from runtime.data.pictures import copy_pictures
from runtime.errors import MachineUnfit, RunFailed
from tests.compiler.data import containers
from tests.compiler.data.pictures import encoded, picture
from tests.compiler.recipes import RECIPE, codes, compiled, make_base
from tuner.copying import compile_copied

TOLD = {f"dog/{n}.jpg": (encoded(picture(64, 64, seed=n), "JPEG"), f"dog {n}") for n in range(5)}
SOURCE = 'path = "pictures"\ncaptions = { from = "instance", prompt = "a photo of sks dog" }'


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `TOLD`, and what else a test puts into `pages`: bytes, or a status."""

    pages: ClassVar[dict[str, bytes | int]] = {}
    asked: ClassVar[list[str]] = []
    states: ClassVar[bool] = False  # whether it says in which state a page is
    slow: ClassVar[set[str]] = set()  # pages that it does not answer in time
    retry_after: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        page = self.pages.get(self.path, 404)
        if self.path in self.slow:
            time.sleep(0.5)
        if isinstance(page, int):
            self.send_response(page)
            if self.path in self.retry_after:
                self.send_header("Retry-After", self.retry_after[self.path])
            self.end_headers()
            return
        self.send_response(200)
        cut = self.path.startswith("/cut")
        self.send_header("Content-Length", str(len(page) + 7 * cut))
        if self.states:
            self.send_header("ETag", hashlib.sha256(page).hexdigest())
        self.end_headers()
        if body:
            self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    Server.pages = {f"/{name}": data for name, (data, _) in TOLD.items()}
    Server.asked, Server.states, Server.slow, Server.retry_after = [], False, set(), {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def project(tmp_path: Path) -> Callable[[str], Path]:
    """A maker of recipes with the given text in place of the data source's."""
    make_base(tmp_path / "base")

    def made(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.replace(SOURCE, text), encoding="utf-8")
        return path

    return made


def quiet(_: str) -> None:
    pass


def test_a_table_of_urls(tmp_path: Path, web: str, project: Callable[[str], Path]) -> None:
    Server.pages["/gone.jpg"] = 410
    rows = [{"url": f"{web}/{name}", "text": text} for name, (_, text) in TOLD.items()]
    rows.append({"url": f"{web}/gone.jpg", "text": "x"})
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    path = project('id = "web"\npath = "t.jsonl"\nbroken = "skip"')
    first = compiled(path)
    assert codes(first) == ["not-downloaded"] and Server.asked == []
    assert "6 images of `t.jsonl`" in first.diagnostics[0].message
    assert first.draft is not None and first.draft.downloads == tmp_path / "cache" / "downloads"
    copy_pictures(first.draft.absent, first.draft.downloads, quiet)
    second = compiled(path)
    assert codes(second) == ["broken-images"] and second.manifest is not None
    assert "can't be downloaded: the server says 410" in second.diagnostics[0].notes[0]
    keys = [second.manifest[row].key for row in range(5)]
    assert keys == [f"{web.removeprefix('http://')}/{name}" for name in TOLD]
    for row, (data, _) in enumerate(TOLD.values()):
        assert Path(second.manifest.item(row).file).read_bytes() == data
    asked = len(Server.asked)
    assert codes(compiled(path)) == ["broken-images"] and len(Server.asked) == asked == 6
    left = [p for p in (tmp_path / "cache").rglob("*") if p.name.startswith(".partial")]
    assert left == []


def test_pictures_that_do_not_come_whole(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Server.pages |= {"/cut.jpg": b"half", "/long.jpg": b"x" * 5000, "/down.jpg": 503}
    monkeypatch.setattr(pictures, "MAX_PICTURE", 4000)
    urls = [f"{web}/{name}" for name in ("cut.jpg", "long.jpg", "down.jpg", "none.jpg")]
    copy_pictures(urls, tmp_path, quiet)  # one of them was answered
    reasons = []
    for url in urls:
        path = picture_path(tmp_path, url)
        assert not path.exists()
        ending = LATER if url.endswith("down.jpg") else FAILED
        reasons.append(path.with_name(path.name + ending).read_text())
        assert not path.with_name(path.name + {LATER: FAILED, FAILED: LATER}[ending]).exists()
    assert "of 11 bytes" in reasons[0] or "IncompleteRead" in reasons[0]
    assert "this is no picture" in reasons[1]
    assert reasons[2:] == [
        "the server says 503 Service Unavailable",
        "the server says 404 Not Found",
    ]
    assert Server.asked.count("/down.jpg") == 2 and Server.asked.count("/none.jpg") == 1


@pytest.mark.parametrize("busy", [429, 500, 503, "silent"])
def test_a_busy_server_is_asked_again(
    tmp_path: Path,
    web: str,
    project: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    busy: int | str,
) -> None:
    """What it could not give is not broken: every run asks for it until it is there."""
    monkeypatch.setattr("tuner.compiling.compile_here", lambda path, more: compiled(path, *more))
    monkeypatch.setattr(pictures, "_PAUSE", 0.0)
    monkeypatch.setattr("runtime.data.web.PATIENCE", 0.2)
    name, whole = "/dog/3.jpg", Server.pages["/dog/3.jpg"]
    Server.pages |= {name: busy} if busy != "silent" else {}
    Server.slow = {name} if busy == "silent" else set()
    path = project(web_table(tmp_path, web))
    refused = compile_copied(path, [], offline=False)
    assert codes(refused) == ["not-downloaded"] and refused.plan is None
    fault = refused.diagnostics[0]
    assert "1 image of `t.jsonl` could not be reached" in fault.message
    assert '`tuner run` asks again; to go on without, broken = "skip"' in fault.help
    assert name in fault.notes[0] and "not reachable now" in fault.notes[0]
    assert codes(compiled(path)) == ["not-downloaded"]  # and a plan says so, too
    Server.pages[name], Server.slow, Server.asked[:] = whole, set(), []
    made = compile_copied(path, [], offline=False)
    assert codes(made) == [] and made.manifest is not None
    assert len(made.manifest) == 5 and Server.asked == [name]
    assert list((tmp_path / "cache").rglob(f"*{LATER}")) == []


def web_table(folder: Path, web: str, *more: str) -> str:
    """A source of `TOLD` and `more` by their URLs."""
    rows = [{"url": f"{web}/{name}", "text": text} for name, (_, text) in TOLD.items()]
    rows += [{"url": url, "text": "x"} for url in more]
    (folder / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return 'id = "web"\npath = "t.jsonl"'


def test_a_dead_host_stops_no_run_that_may_skip(
    tmp_path: Path,
    web: str,
    project: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every run that begins asks for it again; one that was begun goes on without."""
    monkeypatch.setattr("tuner.compiling.compile_here", lambda path, more: compiled(path, *more))
    monkeypatch.setattr(pictures, "_PAUSE", 0.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}/a.jpg"
    Server.pages["/gone.jpg"] = 410
    table = web_table(tmp_path, web, dead, f"{web}/gone.jpg", f"{web}/busy.jpg")
    path = project(f'{table}\nbroken = "skip"')
    Server.pages["/busy.jpg"] = 503
    first = compile_copied(path, [], offline=False)
    assert codes(first) == ["broken-images"] and first.plan is not None
    assert first.manifest is not None and first.outlook is not None
    assert (len(first.manifest), first.plan.sources[0].skipped) == (5, 3)
    fault = first.diagnostics[0]
    assert fault.severity == "warning" and "3 files in `t.jsonl`" in fault.message
    assert sum("not reachable now: " in note for note in fault.notes) == 2
    assert sum(r.images for r in first.outlook.skipped if "not reachable now" in r.why) == 2
    assert Server.asked.count("/busy.jpg") == 2  # tries, of one round
    Server.pages["/busy.jpg"] = Server.pages["/dog/0.jpg"]
    lock = lock_path(Path(first.plan.run_folder))
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    for begun in (compile_copied(path, [], offline=False), compile_copied(path, [], offline=True)):
        assert begun.plan is not None and begun.plan.digest == first.plan.digest
    lock.unlink()
    again = compile_copied(path, [], offline=False)
    assert again.manifest is not None and len(again.manifest) == 6
    assert again.plan is not None and again.plan.sources[0].skipped == 2


def test_a_server_that_is_busy_for_an_hour_refuses(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_PAUSE", 0.0)
    Server.pages["/down.jpg"] = 503
    urls, said = [f"{web}/down.jpg", f"{web}/dog/0.jpg"], list[str]()
    path = picture_path(tmp_path, urls[0])
    later, failed = path.with_name(path.name + LATER), path.with_name(path.name + FAILED)
    for ago, given_up in ((0, False), (600, False), (90_000, False), (4000, True)):
        if ago:
            os.utime(later, (time.time() - ago,) * 2)
        copy_pictures(urls, tmp_path, said.append)
        assert failed.exists() == given_up and later.exists() != given_up
    assert time.time() - failed.stat().st_mtime < 60
    asked_again = "1 of 2 images can't be had now and are asked for again"
    assert sum(line.startswith(asked_again) for line in said) == 3


def test_a_server_says_how_long_to_wait(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(pictures.time, "sleep", waited.append)
    Server.pages |= {"/down.jpg": 429, "/dog/9.jpg": 503}
    Server.retry_after = {"/down.jpg": "7", "/dog/9.jpg": "Fri, 31 Dec 1999 23:59:59 GMT"}
    for name in ("down.jpg", "dog/9.jpg"):
        copy_pictures([f"{web}/{name}"], tmp_path, quiet)
    assert waited == [0.0, 7.0, 0.0, 0.5]


def test_without_a_connection_nothing_is_noted(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(RunFailed, match="none of 2 images can be downloaded"):
        copy_pictures([f"http://127.0.0.1:{port}/{n}.jpg" for n in "ab"], tmp_path, quiet)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    with pytest.raises(RunFailed, match="can't be copied"):
        copy_sources([Remote(url=f"http://127.0.0.1:{port}/a.tar", files=())], tmp_path, quiet)


def test_one_shard_on_the_web(tmp_path: Path, web: str, project: Callable[[str], Path]) -> None:
    Server.pages["/t.parquet"] = containers.as_parquet(tmp_path / "x", TOLD).read_bytes()
    path = project(f'path = "{web}/t.parquet"')
    first = compiled(path)
    assert codes(first) == ["not-downloaded"] and Server.asked == [] and first.draft is not None
    copy_sources(first.draft.remotes, first.draft.downloads, quiet)
    second = compiled(path)
    assert second.manifest is not None and len(second.manifest) == 5
    assert second.plan is not None and second.plan.sources[0].id == "t"
    copy_sources(first.draft.remotes, first.draft.downloads, quiet)
    assert Server.asked == ["/t.parquet"]


def test_a_folder_in_a_store(tmp_path: Path, project: Callable[[str], Path]) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.pipe({f"/bucket/a/{name}": data for name, (data, _) in TOLD.items()})
    store.pipe({f"/bucket/a/{name[:-4]}.txt": t.encode() for name, (_, t) in TOLD.items()})
    try:
        path = project('id = "s"\npath = "memory://bucket/a"')
        first = compiled(path)
        assert codes(first) == ["not-downloaded"] and first.draft is not None
        copy_sources(first.draft.remotes, first.draft.downloads, quiet)
        second = compiled(path)
        assert second.manifest is not None and second.plan is not None
        assert [second.manifest[row].key for row in range(5)] == list(TOLD)
        assert second.manifest.captions == tuple(text for _, text in TOLD.values())
        os.remove(second.manifest.item(2).file)  # a copy that is not whole is made whole
        assert codes(compiled(path)) == ["not-downloaded"]
        copy_sources(first.draft.remotes, first.draft.downloads, quiet)
        assert compiled(path).plan is not None
        store.pipe({"/evil/a/../../../out.jpg": b"x"})
        if any(".." in name for name in store.find("/evil")):
            with pytest.raises(RunFailed, match="leads elsewhere"):
                copy_sources([Remote(url="memory://evil", files=())], tmp_path / "d", quiet)
        with pytest.raises(RunFailed, match="no file at all"):
            copy_sources([Remote(url="memory://none", files=())], tmp_path / "d", quiet)
    finally:
        store.store.clear()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/etc/x", "a\0b"])
def test_names_of_a_store_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunFailed, match="leads elsewhere"):
        stores.below(tmp_path / "d", name)
    assert stores.below(tmp_path, "a/b.jpg") == tmp_path / "a" / "b.jpg"


def test_a_store_without_its_package(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(MachineUnfit) as caught:
            copy_sources([Remote(url="s3://bucket/x", files=())], tmp_path, quiet)
        assert caught.value.help == 'pip install "tuner[stores]"'
    with pytest.raises(RunFailed, match="can't be copied"):
        copy_sources([Remote(url="nonsense://x", files=())], tmp_path, quiet)


def hub(folder: Path, calls: list[dict[str, object]]) -> types.ModuleType:
    """The library's one function, which here finds three shards."""

    def snapshot_download(name: str, **rest: object) -> str:
        calls.append({"name": name, **rest})
        for number in range(3):
            path = folder / "data" / f"train_{number:03}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            containers.as_parquet(path, {f"{number}-{n}": row for n, row in TOLD.items()})
        return str(folder)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    return module


def test_shards_of_the_hub(
    tmp_path: Path, project: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, object]] = []
    module = hub(tmp_path / "snapshot", calls)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    files = 'files = ["data/train_000.parquet", "data/train_002.parquet"]'
    path = project(f'path = "hub:someone/some-data@v1"\n{files}')
    first = compiled(path)
    assert codes(first) == ["not-downloaded"] and first.draft is not None
    copy_sources(first.draft.remotes, first.draft.downloads, quiet)
    patterns = ["data/train_000.parquet", "data/train_002.parquet"]
    assert calls == [
        {
            "name": "someone/some-data",
            "repo_type": "dataset",
            "revision": "v1",
            "allow_patterns": patterns,
        }
    ]
    second = compiled(path)
    assert second.plan is not None and second.manifest is not None
    assert len(second.manifest) == 10 and second.plan.sources[0].id == "some-data"
    other = compiled(project('path = "hub:someone/some-data@v2"'))
    assert codes(other) == ["not-downloaded"]
    assert codes(compiled(project('path = "hub:nobody"'))) == ["bad-path"]


def test_what_is_remote() -> None:
    assert is_remote("s3://b/x") and is_remote("hub:a/b") and is_remote("https://a/b.tar")
    assert not is_remote("data/x") and not is_remote("C:\\x") and not is_remote("/a://b"[1:3])
    assert hub_parts("hub:a/b@c/d") == ("a/b", "c/d") and hub_parts("hub:a/b") == ("a/b", "")
    assert hub_parts("hub:a") is None and hub_parts("hub:../..") is None


def test_damaged_notes_count_as_none(tmp_path: Path) -> None:
    from compiler.data.sources.remote import note_path

    remote = Remote(url="hub:a/b", files=())
    for content in ("", "{}", "[]", '{"root": "/", "files": 3, "open": "."}', '{"files": ["x"]}'):
        note_path(tmp_path, remote).write_text(content)
        assert copied(tmp_path, remote) is None


def test_a_run_copies_first_and_offline_does_not(
    tmp_path: Path, web: str, project: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.compiling.compile_here", lambda path, more: compiled(path, *more))
    rows = [{"url": f"{web}/{name}", "text": text} for name, (_, text) in TOLD.items()]
    Server.pages["/t.jsonl"] = "\n".join(json.dumps(row) for row in rows).encode()
    path = project(f'path = "{web}/t.jsonl"')
    refused = compile_copied(path, [], offline=True)
    assert codes(refused) == ["not-downloaded"] and Server.asked == []
    assert codes(compile_copied(path, ["train.batch_size=0"], offline=False)) != []
    assert Server.asked == []  # something else is wrong: nothing is copied
    made = compile_copied(path, [], offline=False)
    assert made.manifest is not None and len(made.manifest) == 5 and len(Server.asked) == 6


def test_a_store_that_has_changed(tmp_path: Path) -> None:
    """What changed, came or went is noticed by its state, be its size the same; no more is copied
    than what changed."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    remote, said = Remote(url="memory://changing/a", files=()), []
    opened: list[str] = []
    try:
        store.pipe({f"/changing/a/{name}": name.encode() for name in ("x.jpg", "y.jpg", "z.jpg")})
        copy_sources([remote], tmp_path, quiet)
        assert changed_sources([remote], tmp_path, said.append) == []
        store.pipe({"/changing/a/y.jpg": b"Y.JPG", "/changing/a/new.jpg": b"new"})
        store.rm("/changing/a/z.jpg")
        assert changed_sources([remote], tmp_path, said.append) == [remote]
        real = type(store).open
        type(store).open = lambda self, path, *a, **k: (
            opened.append(path) or real(self, path, *a, **k)
        )
        try:
            copy_sources([remote], tmp_path, said.append, again=True)
        finally:
            type(store).open = real
        assert sorted(map(os.path.basename, opened)) == ["new.jpg", "y.jpg"]
        folder = Path(copied(tmp_path, remote) or "")
        there = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert there == {"x.jpg": b"x.jpg", "y.jpg": b"Y.JPG", "new.jpg": b"new"}
        assert changed_sources([remote], tmp_path, said.append) == []
        assert said == [
            f"copying memory://changing/a again, because it has changed, into {tmp_path}"
        ]
    finally:
        store.store.clear()


def test_a_copy_that_was_interrupted_while_the_original_changed(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    remote = Remote(url="memory://torn/a", files=())
    real = downloads.shutil.copyfileobj
    done: list[int] = []

    def interrupted(*given: object) -> None:
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt
        real(*given)  # type: ignore[arg-type]

    try:
        store.pipe({"/torn/a/x.jpg": b"old", "/torn/a/y.jpg": b"old"})
        downloads.shutil.copyfileobj = interrupted  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            copy_sources([remote], tmp_path, quiet)
        downloads.shutil.copyfileobj = real
        assert copied(tmp_path, remote) is None
        store.pipe({"/torn/a/x.jpg": b"new"})
        copy_sources([remote], tmp_path, quiet)
        folder = Path(copied(tmp_path, remote) or "")
        assert (folder / "x.jpg").read_bytes() == b"new"
        assert (folder / "y.jpg").read_bytes() == b"old"
    finally:
        downloads.shutil.copyfileobj = real
        store.store.clear()


def test_a_file_on_the_web_that_has_changed(tmp_path: Path, web: str) -> None:
    remote, said = Remote(url=f"{web}/t.jsonl", files=()), []
    Server.pages["/t.jsonl"] = b"first"
    copy_sources([remote], tmp_path, quiet)  # this server says nothing of states
    Server.pages["/t.jsonl"] = b"other"
    assert changed_sources([remote], tmp_path, said.append) == [] and said == []
    Server.states = True
    copy_sources([remote], tmp_path, quiet, again=True)
    assert Path(copied(tmp_path, remote) or "").read_bytes() == b"other"
    assert changed_sources([remote], tmp_path, said.append) == []
    Server.pages["/t.jsonl"] = b"third"
    assert changed_sources([remote], tmp_path, said.append) == [remote]
    Server.pages["/t.jsonl"] = 503
    assert changed_sources([remote], tmp_path, said.append) == []
    assert "can't be asked whether it has changed, its copy is used: the server says 503" in said[0]
    assert Path(copied(tmp_path, remote) or "").read_bytes() == b"other"


def test_a_run_takes_what_has_changed_unless_it_was_begun(
    tmp_path: Path,
    web: str,
    project: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tuner.compiling.compile_here", lambda path, more: compiled(path, *more))
    Server.states = True
    rows = [{"url": f"{web}/{name}", "text": text} for name, (_, text) in TOLD.items()]
    lines = [json.dumps(row) for row in rows]
    Server.pages["/t.jsonl"] = "\n".join(lines[:3]).encode()
    path = project(f'path = "{web}/t.jsonl"')
    first = compile_copied(path, [], offline=False)
    assert first.manifest is not None and len(first.manifest) == 3 and first.plan is not None
    Server.pages["/t.jsonl"] = "\n".join(lines).encode()
    kept = compile_copied(path, [], offline=True)
    assert kept.manifest is not None and len(kept.manifest) == 3
    assert "is not asked whether it has changed (--offline)" in capsys.readouterr().err
    lock = lock_path(Path(first.plan.run_folder))
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    begun = compile_copied(path, [], offline=False)
    assert begun.manifest is not None and len(begun.manifest) == 3
    assert "goes on with it" in capsys.readouterr().err
    lock.unlink()
    again = compile_copied(path, [], offline=False)
    assert again.manifest is not None and len(again.manifest) == 5
    assert "again, because it has changed," in capsys.readouterr().err


def test_a_data_set_of_the_hub_that_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = hub(tmp_path / "snapshots" / "abc", [])
    now = ["abc"]
    info = types.SimpleNamespace(
        dataset_info=lambda name, revision: types.SimpleNamespace(sha=now[0])
    )
    module.HfApi = lambda: info  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    remote = Remote(url="hub:a/b", files=())
    copy_sources([remote], tmp_path / "d", quiet)
    assert changed_sources([remote], tmp_path / "d", quiet) == []
    now[0] = "def"
    assert changed_sources([remote], tmp_path / "d", quiet) == [remote]
