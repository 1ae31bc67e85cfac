"""Buckets by S3's own protocol: a server in this process, asked by s3fs as the real one would be.

Needs `pip install s3fs "moto[s3]" flask flask-cors`, which are too large for the extra `test`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compiler.compile import Compiled
from compiler.data.sources.remote import Remote, copied
from runtime.data import items, ranged
from runtime.data.downloads import changed_sources, copy_sources
from runtime.errors import RunFailed
from tests.compiler.data.pictures import encoded, picture
from tests.compiler.recipes import codes, compiled
from tests.runtime.data.test_streams import facts, kept, place, recipe, shard, tar, whole
from tuner.copying import compile_copied

pytest.importorskip("s3fs", reason="s3fs is not installed")
pytest.importorskip("moto.server", reason="moto and Flask are not installed")
__all__ = ["place"]  # a fixture

NAMES = ("a b/1+1.png", "a b/K\u00e4se.png", "c%20d/x.png", "plain.png")


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    running.start()
    yield f"http://127.0.0.1:{port}"
    running.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a server that holds the empty bucket `pictures`."""
    import s3fs

    for name, value in (
        ("AWS_ENDPOINT_URL", server),
        ("AWS_ACCESS_KEY_ID", "somebody"),
        ("AWS_SECRET_ACCESS_KEY", "nothing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_CONFIG_FILE", "/dev/null"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    ranged._unchanged.cache_clear()
    monkeypatch.setattr(ranged, "_PAUSE", 0.01)
    client = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    client.mkdir("pictures")
    yield client
    client.rm("pictures", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def made(path: Path) -> Compiled:
    return compile_copied(path, [], offline=False)


def test_a_folder_of_a_bucket_is_as_one_of_the_disk(s3: Any, place: Path) -> None:
    """Captions beside the pictures; names with blanks, signs and letters that are not ASCII."""
    local = place / "local"
    for number, name in enumerate(NAMES):
        path = local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(64, 64, seed=number), "PNG"))
        path.with_suffix(".txt").write_text(f"picture {number}")
        for each in (path, path.with_suffix(".txt")):
            s3.put_file(str(each), f"pictures/set/{each.relative_to(local)}")
    more = 'captions = { from = "textfile" }'
    plain, _ = whole(compiled(_folder(place, str(local), more)))
    first = compiled(_folder(place, "s3://pictures/set", more))
    assert codes(first) == ["not-downloaded"]
    result = made(_folder(place, "s3://pictures/set", more))
    plan, manifest = whole(result)
    assert [sample.key for sample in manifest] == sorted(NAMES)
    assert plan.manifest == plain.manifest  # keys, sizes, captions, placements
    assert facts(result) == facts(compiled(_folder(place, str(local), more)))


def _folder(place: Path, path: str, more: str) -> Path:
    text = f"""
    schema = 1
    name = "s3"
    [model]
    family = "sana"
    base = "base"
    [data]
    resolution = 64
    [[data.source]]
    id = "s"
    path = "{path}"
    {more}
    [train]
    steps = 2
    batch_size = 2
    optimizer = {{ name = "adamw", lr = 1e-4 }}
    """
    (place / "folder.toml").write_text(text, encoding="utf-8")
    return place / "folder.toml"


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_what_is_streamed_from_a_bucket_is_as_its_copy(s3: Any, place: Path, kind: str) -> None:
    name, data = ("t.parquet", shard(place)) if kind == "parquet" else ("t.tar", tar(place))
    s3.pipe_file(f"pictures/{name}", data)
    (place / "copied").mkdir()
    (place / "copied" / name).write_bytes(data)
    expected = facts(made(recipe(place, f"copied/{name}", kind, "")))
    result = made(recipe(place, f"s3://pictures/{name}", kind))
    assert facts(result) == expected
    assert kept(place / "xdg") == []  # nothing of a picture lies on the disk
    s3.pipe_file(f"pictures/{name}", data[:-1] + b"x")
    ranged._unchanged.cache_clear()
    _, manifest = whole(result)
    with pytest.raises(RunFailed, match="has changed since it was listed"):
        items.read(manifest.item(0))


def test_only_what_changed_is_copied_again(s3: Any, tmp_path: Path) -> None:
    """By the bucket's own marks; a key that came or went is a change, too."""
    remote, said = Remote(url="s3://pictures/a", files=("*.jpg",)), list[str]()
    for name in ("x.jpg", "y.jpg", "z.jpg", "other.bin"):
        s3.pipe_file(f"pictures/a/{name}", name.encode())
    copy_sources([remote], tmp_path, quiet)
    folder = Path(copied(tmp_path, remote) or "")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(before) == ["x.jpg", "y.jpg", "z.jpg"]
    assert changed_sources([remote], tmp_path, said.append) == []
    s3.pipe_file("pictures/a/y.jpg", b"Y.JPG")  # as long as it was
    s3.pipe_file("pictures/a/new.jpg", b"new")
    s3.rm_file("pictures/a/z.jpg")
    assert changed_sources([remote], tmp_path, said.append) == [remote]
    copy_sources([remote], tmp_path, quiet, again=True)
    there = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert there == {"x.jpg": b"x.jpg", "y.jpg": b"Y.JPG", "new.jpg": b"new"}
    assert (folder / "x.jpg").stat().st_mtime_ns == before["x.jpg"]
    assert changed_sources([remote], tmp_path, said.append) == [] and said == []


def test_keys_that_lead_elsewhere_are_refused(s3: Any, tmp_path: Path) -> None:
    """In a bucket `a/../../x` is a name like any other."""
    s3.pipe_file("pictures/evil/a/../../../x.jpg", b"x")
    if not any(".." in name for name in s3.find("pictures/evil")):
        pytest.skip("this client tidies names")
    with pytest.raises(RunFailed, match="leads elsewhere"):
        copy_sources([Remote(url="s3://pictures/evil", files=())], tmp_path / "d", quiet)
    assert not list(tmp_path.rglob("x.jpg"))


@pytest.mark.parametrize("wrong", ["bucket", "empty", "keys", "server"])
def test_what_goes_wrong_is_told_in_a_line(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """No bucket, nothing in it, no keys, nobody there: no traceback, and nothing is left behind."""
    import s3fs

    url = {"bucket": "s3://no-such-bucket-here/a"}.get(wrong, "s3://pictures/none")
    if wrong == "keys":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    if wrong == "server":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RunFailed) as caught:
        copy_sources([Remote(url=url, files=())], tmp_path / "d", quiet)
    assert url in caught.value.message and "\n" not in caught.value.message
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
