"""Containers give what a folder of the same pictures gives, and what is hostile is named."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from attrs import evolve
from PIL import Image, ImageOps

from compiler.data import headers
from compiler.data.captions import all_captions
from compiler.data.index import Index
from compiler.data.manifest import Item
from compiler.data.quick_headers import TRUNCATED
from compiler.data.scan import Picture, Scan, scan
from compiler.data.sources import columns, gather, tables, tars
from compiler.data.sources.compressed import Forward
from compiler.data.sources.listing import SourceUnfit, Wanted
from compiler.data.sources.spots import name_of, split_of, spot_of
from compiler.plan import Captions
from runtime.data.items import read
from runtime.data.pixels import decode
from tests.compiler.data import containers
from tests.compiler.data.manifests import whole
from tests.compiler.data.pictures import encoded, picture, png_bomb, put, settle

JPEG = encoded(picture(70, 50), "JPEG")
PNG = encoded(picture(40, 30, seed=1), "PNG")
TOLD = {
    "dog/01.jpg": (encoded(picture(64, 48, seed=2), "JPEG"), "a dog"),
    "dog/00.jpg": (JPEG, "a first dog"),
    "b.png": (PNG, "second"),
    "a/deep/\u00fc 1.webp": (encoded(picture(33, 44), "WEBP"), "K\u00e4se, with a comma"),
    "0.gif": (encoded(picture(20, 21), "GIF"), "none"),
}
KINDS = ("table", "csv", "webdataset", "parquet", "arrow", "feather")


def rules(kind: str = "column", **changes: Any) -> Captions:
    given: dict[str, Any] = {"prompt": "", "multiline": "join", "key": "caption"}
    given |= {"column": "text", "fallback": ()} if kind == "column" else {}
    return Captions(
        kind=kind,  # type: ignore[arg-type]
        missing="error",
        dropout=0.0,
        **(given | changes),
    )


def found(path: Path, captions: Captions | None = None, **rest: Any) -> Scan:
    """All of a source; `rest` may hold its format, files, image column, downloads and index."""
    spot = spot_of(path, rest.get("format", "auto"), rest.get("files", ()))
    assert spot is not None
    said = captions or rules("textfile" if spot.kind in ("folder", "webdataset") else "column")
    wanted = Wanted(image=rest.get("image", ""), captions=said)
    downloads = rest.get("downloads", path.parent / "downloads")
    return gather.gather(spot, wanted, downloads, rest.get("index"))[0]


def why(result: Scan) -> dict[str, str]:
    return {os.path.basename(fault.path): fault.why for fault in result.faults}


def texts(result: Scan, captions: Captions) -> list[Any]:
    return all_captions("", result, result.pictures, captions)


def made(folder: Path, kind: str) -> Path:
    if kind in ("table", "csv"):
        ending = "jsonl" if kind == "table" else "csv"
        return containers.as_table(containers.as_folder(folder, TOLD) / f"t.{ending}", TOLD)
    folder.mkdir(exist_ok=True)
    if kind == "webdataset":
        return containers.as_tar(folder / "t.tar", TOLD)
    if kind == "parquet":
        return containers.as_parquet(folder / "t.parquet", TOLD)
    return containers.as_arrow(folder / f"t.{kind}", TOLD, stream=kind == "arrow")


@pytest.mark.parametrize("kind", KINDS)
def test_a_container_is_like_the_folder(tmp_path: Path, kind: str) -> None:
    folder = containers.as_folder(tmp_path / "folder", TOLD)
    expected = scan(folder)
    result = found(made(tmp_path / "c", kind))
    shape = [(p.key, p.bytes, p.width, p.height) for p in result.pictures]
    assert shape == [(p.key, p.bytes, p.width, p.height) for p in expected.pictures]
    assert len(shape) == 5 and result.faults == () == expected.faults
    said = rules("textfile" if kind == "webdataset" else "column")
    assert texts(result, said) == [(TOLD[p.key][1],) for p in result.pictures]


@pytest.mark.parametrize("kind", KINDS)
def test_each_picture_is_read_again_at_its_place(tmp_path: Path, kind: str) -> None:
    result = found(made(tmp_path / "c", kind))
    column = {"parquet": "image", "arrow": "image", "feather": "image"}.get(kind, "")
    runs_as = {"feather": "arrow"}.get(kind, kind)
    for one in result.pictures:
        assert read(item(one, runs_as, column)) == TOLD[one.key][0]


def item(one: Picture, kind: str, column: str = "") -> Any:
    from compiler.data.manifest import Item

    return Item(file=one.file, at=one.at, bytes=one.bytes, kind=kind, column=column)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unchanged_container_is_not_opened_again(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path / "c", kind)
    settle()
    file = tmp_path / "index"
    index = Index(file)
    first = found(path, index=index)
    assert index.save()

    def refuse(*_: object) -> None:
        raise AssertionError("opened again")

    monkeypatch.setattr(gather, "READERS", dict.fromkeys(gather.READERS, refuse))
    monkeypatch.setattr("compiler.data.scan.read_header", refuse)
    assert found(path, index=Index(file)) == first == found(path, index=index)
    monkeypatch.undo()
    other = rules("instance", prompt="x")  # asks for other things
    assert found(path, other, index=Index(file)).pictures == first.pictures
    if kind not in ("table", "csv"):
        condemned = first.pictures[2]
        assert Index(file).condemn(condemned.file, "its pixels", condemned.at)
        again = found(path, index=Index(file))
        assert len(again.pictures) == 4 and [f.why for f in again.faults] == ["its pixels"]
    changed = dict(list(TOLD.items())[:3])
    monkeypatch.setattr(__name__ + ".TOLD", changed)
    made(tmp_path / "c", kind)
    assert len(found(path, index=Index(file)).pictures) == 3


def test_captions_of_columns(tmp_path: Path) -> None:
    data = {
        "image": [JPEG] * 5,
        "text": ["a", None, "  ", "x\ny", ""],
        "other": [["b"], ["c", "d"], None, [""], []],
    }
    pq.write_table(pa.table(data), tmp_path / "t.parquet")
    result = found(tmp_path / "t.parquet", rules(fallback=("other",)))
    assert [p.key for p in result.pictures] == [f"t/{n:08}" for n in range(5)]
    said = rules(fallback=("other",))
    assert texts(result, said) == [("a",), ("c d",), (), ("x y",), ()]
    many = rules(fallback=("other",), multiline="alternatives")
    assert texts(result, many)[1] == ("c", "d")


def test_several_shards_are_one_source(tmp_path: Path) -> None:
    for number in range(3):
        told = {f"{n}.jpg": (JPEG, f"{number} {n}") for n in (range(2) if number < 2 else (7, 8))}
        containers.as_parquet(tmp_path / f"train_{number:03}.parquet", told)
    keys = [p.key for p in found(tmp_path).pictures]
    double = [f"train_00{s}/{n}/{n}.jpg" for s in range(2) for n in range(2)]
    assert keys == ["7.jpg", "8.jpg", *double]
    assert [p.key for p in found(tmp_path / "train_*.parquet").pictures] == keys
    picked = found(tmp_path, files=("train_000.parquet", "*2.parquet"))
    assert [p.key for p in picked.pictures] == ["0.jpg", "1.jpg", "7.jpg", "8.jpg"]
    with pytest.raises(SourceUnfit, match="called `nine`"):
        found(tmp_path, files=("nine",))


def test_what_datasets_saves(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / split
        folder.mkdir()
        containers.as_arrow(folder / "data-00000-of-00001.arrow", TOLD)
        put(folder, {"cache-1.arrow": b"left over", "dataset_info.json": b"{}"})
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / "state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(found(tmp_path / "train").pictures) == 5
    with pytest.raises(SourceUnfit) as caught:
        found(tmp_path)
    assert caught.value.code == "several-splits" and 'files = ["train/*"]' in caught.value.help
    assert len(found(tmp_path, files=("train/*",)).pictures) == 5
    hostile = {"_data_files": [{"filename": "../../etc/passwd"}, {"filename": 3}, 7]}
    (tmp_path / "train" / "state.json").write_text(json.dumps(hostile))
    with pytest.raises(SourceUnfit):
        found(tmp_path / "train", files=("*passwd",))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("train_000.parquet", "train"),
        ("test/0.parquet", "test"),
        ("data/validation-0.parquet", "validation"),
        ("part.0.parquet", ""),
        ("training_a.parquet", ""),
    ],
)
def test_splits_by_name(name: str, split: str) -> None:
    assert split_of(name) == split


def test_folders_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path / "mixed", {"a.jpg": JPEG, "meta.parquet": b"PAR1"})
    assert [p.key for p in found(tmp_path / "mixed").pictures] == ["a.jpg"]
    put(tmp_path / "nested", {"x/a.jpg": JPEG})
    assert [p.key for p in found(tmp_path / "nested").pictures] == ["x/a.jpg"]
    put(tmp_path / "two", {"a.tar": b"", "b.parquet": b""})
    with pytest.raises(SourceUnfit, match="several formats"):
        found(tmp_path / "two")
    with pytest.raises(SourceUnfit, match="no file of the format arrow"):
        found(tmp_path / "two", format="arrow")
    assert spot_of(tmp_path / "none", "auto", ()) is None
    assert spot_of(tmp_path / "two" / "*.jpg", "auto", ()) is None
    with pytest.raises(SourceUnfit, match="is a file, not a folder"):
        found(tmp_path / "mixed" / "a.jpg")


# What is hostile


def test_hostile_tars(tmp_path: Path) -> None:
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    path = containers.tar_of(
        tmp_path / "t.tar",
        [
            containers.member("../../out.jpg", JPEG),
            containers.member("/etc/in.jpg", JPEG),
            containers.member("link.jpg", **link),
            containers.member("hard.jpg", type=tarfile.LNKTYPE, linkname="good.jpg"),
            containers.member("pipe.jpg", type=tarfile.FIFOTYPE),
            containers.member("dir.jpg", type=tarfile.DIRTYPE),
            containers.member("zero.jpg"),
            containers.member("text.jpg", b"words"),
            containers.member("half.jpg", JPEG[: len(JPEG) // 2]),
            containers.member("bomb.png", png_bomb(60_000, 60_000)),
            containers.member("./good.jpg", JPEG),
            containers.member("good.txt", "caf\u00e9".encode("latin-1")),
            containers.member("line\nbreak.jpg", JPEG),
            containers.member("long.jpg", JPEG),
            containers.member("long.txt", b"x" * 2_000_000),
            containers.member("no\udcffutf8.jpg", JPEG),
            containers.member("notes.cls", b"7"),
            containers.member(".hidden.jpg", JPEG),
            containers.member("good.jpg.jpg", JPEG),
        ],
    )
    before = sorted(tmp_path.rglob("*"))
    result = found(path)
    keys = [p.key for p in result.pictures]
    assert keys == ["good.jpg", "good.jpg.jpg", "line\nbreak.jpg", "long.jpg", "no\udcffutf8.jpg"]
    reasons = {name.split("(")[1].rstrip(")"): text for name, text in whole_names(result).items()}
    assert reasons["../../out.jpg"] == reasons["/etc/in.jpg"] == "a name that leads out of the tar"
    assert reasons["link.jpg"] == reasons["hard.jpg"] == "a link in a tar is not followed"
    assert reasons["pipe.jpg"] == "not a plain member of the tar"
    assert reasons["zero.jpg"] == "empty file (0 bytes)"
    assert reasons["half.jpg"].startswith("truncated")
    assert "decompression bomb" in reasons["bomb.png"]
    assert len(reasons) == 9 and (result.hidden, result.others) == (1, 1)
    told = dict(zip(keys, texts(result, rules("textfile")), strict=True))
    assert told["good.jpg"].why.startswith("not UTF-8") and "longer than" in told["long.jpg"].why
    assert sorted(tmp_path.rglob("*")) == before


def whole_names(result: Scan) -> dict[str, str]:
    return {fault.path: fault.why for fault in result.faults}


def test_names_that_stand_twice(tmp_path: Path) -> None:
    path = containers.tar_of(tmp_path / "t.tar", [containers.member("a.jpg", JPEG)] * 2)
    assert [p.key for p in found(path).pictures] == ["t/0/a.jpg", "t/1/a.jpg"]
    members = [containers.member(n, JPEG) for n in ("a.jpg", "a.jpg", "t/1/a.jpg")]
    result = found(containers.tar_of(tmp_path / "t.tar", members))
    assert [p.key for p in result.pictures] == ["t/0/a.jpg", "t/1/a.jpg"]
    assert [f.why for f in result.faults] == ["another picture of the source has this very name"]


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "arrow", "feather"])
def test_broken_shards_are_faults(tmp_path: Path, kind: str) -> None:
    path = made(tmp_path / "c", kind)
    data = path.read_bytes()
    for content in (data[: len(data) // 2], b"", b"no shard at all" * 100, data[10:]):
        path.write_bytes(content)
        result = found(path)
        named = [fault.path for fault in result.faults]
        assert str(path) in named or (kind == "webdataset" and not content), content[:20]
        if kind != "webdataset":  # a tar's first members are whole all the same
            assert result.pictures == ()
        index = Index(tmp_path / "index")
        settle()
        assert found(path, index=index) == result and index.save()
        assert found(path, index=Index(tmp_path / "index")) == result


def test_pipes_and_loops_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.tar", "b.parquet", "c.arrow", "d.jsonl"):
        os.mkfifo(tmp_path / name)
        assert why(found(tmp_path / name)) == {name: "not a regular file"}
    os.symlink("loop.tar", tmp_path / "loop.tar")
    os.symlink(tmp_path, tmp_path / "round")
    result = found(tmp_path, format="webdataset")
    assert why(result) == {
        "a.tar": "not a regular file",
        "loop.tar": "can't be read: a link that leads nowhere",
    }
    row = {"file_name": "loop.tar", "text": "x"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    assert why(found(tmp_path / "t.jsonl"))["t.jsonl (loop.tar)"].startswith("can't be read")


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return packed


COMPRESSED: dict[str, Any] = {
    "t.tar.gz": gzip.compress,
    "t.tgz": lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]),  # two members
    "t.tar.bz2": bz2.compress,
    "t.tar.xz": lzma.compress,
    "t.tar.zst": zstd,
    "t.tar": gzip.compress,  # a name that says something else
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_compressed_tar_gives_what_the_plain_one_gives(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = made(tmp_path / "c", "webdataset")
    put(tmp_path, {name: COMPRESSED[name](plain.read_bytes())})
    result, expected = found(tmp_path / name), found(plain)
    assert [evolve(p, file="") for p in result.pictures] == [
        evolve(p, file="") for p in expected.pictures
    ]
    assert result.lines == expected.lines and not result.faults
    items = [Item(file=p.file, at=p.at, bytes=p.bytes, kind="webdataset") for p in result.pictures]
    assert [read(item) for item in items] == [TOLD[p.key][0] for p in result.pictures]
    (copy,) = (tmp_path / "cache/tuner/unpacked").iterdir()
    assert copy.read_bytes() == plain.read_bytes()
    older = {"a.png": (encoded(picture(30, 20), "PNG"), "other")}
    changed = containers.as_tar(tmp_path / "d.tar", older).read_bytes()
    put(tmp_path, {name: COMPRESSED[name](changed)})
    (other,) = found(tmp_path / name).pictures
    at = Item(file=other.file, at=other.at, bytes=other.bytes, kind="webdataset")
    assert read(at) == older["a.png"][0]
    assert len(list((tmp_path / "cache/tuner/unpacked").iterdir())) == 1, "of the older state: gone"


def test_compressed_tars_that_are_damaged_or_hostile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = made(tmp_path / "c", "webdataset").read_bytes()
    for name, pack in COMPRESSED.items():
        packed = bytearray(pack(whole))
        put(tmp_path, {f"cut-{name}": bytes(packed[: len(packed) // 2])})
        packed[len(packed) // 2 : len(packed) // 2 + 40] = bytes(40)
        put(tmp_path, {f"torn-{name}": bytes(packed)})
        summed = name != "t.tar.zst"  # zstd need not sum up: it tells as little as a plain tar
        for path in (tmp_path / f"cut-{name}", tmp_path / f"torn-{name}")[: 1 + summed]:
            faults = [fault.why for fault in found(path).faults]
            assert any("not a whole tar" in why for why in faults), (path, faults)
            with pytest.raises(OSError, match="unpacked"):
                read(Item(file=str(path), at=512, bytes=8, kind="webdataset"))
    assert list((tmp_path / "cache/tuner/unpacked").iterdir()) == []
    put(tmp_path, {"text.tgz": gzip.compress(b"no tar at all" * 99)})
    assert "not a whole tar" in found(tmp_path / "text.tgz").faults[0].why
    hostile = [containers.member("../x.jpg", JPEG), containers.member("y.jpg", JPEG)]
    hostile.append(containers.member("long.txt", b"x" * 2_000_000))
    packed_tar = containers.tar_of(tmp_path / "h.tar", hostile).read_bytes()
    put(tmp_path, {"h.tgz": gzip.compress(packed_tar)})
    result = found(tmp_path / "h.tgz")
    assert [p.key for p in result.pictures] == ["y.jpg"]
    assert [fault.why for fault in result.faults] == ["a name that leads out of the tar"]


def test_a_stream_is_read_forward() -> None:
    data = bytes(range(256)) * 40
    stream = Forward(io.BytesIO(data))
    assert stream.read(512) == data[:512] and stream.tell() == 512
    assert stream.seek(100) == 100 and stream.read(20) == data[100:120]
    assert stream.seek(5000) == 5000 and stream.read(10) == data[5000:5010]
    with pytest.raises(OSError, match="backwards"):
        stream.seek(100)
    assert stream.seek(99_999) == len(data) and stream.read(1) == b""


def test_names_of_containers() -> None:
    names = ("a/photos.tar.gz", "photos.TGZ", "photos.tar", "photos.parquet", "photos")
    assert {name_of(name) for name in names} == {"photos"}
    assert name_of("my.data.tar.zst") == "my.data" and name_of("photos.gz") == "photos.gz"


@pytest.mark.parametrize(
    ("columns", "captions", "image", "message"),
    [
        ({"image": [1], "text": ["a"]}, rules(), "", "no column of `t.parquet` is known"),
        ({"image": [1], "text": ["a"]}, rules(), "image", "holds int64, no images"),
        ({"image": [JPEG], "text": [1.5]}, rules(), "", "`text` of `t.parquet` holds double"),
        ({"image": [JPEG], "words": ["a"]}, rules(), "", "has no column `text`"),
        ({"image": [JPEG], "text": ["a"]}, rules(fallback=("b",)), "", "has no column `b`"),
        ({"image": [JPEG], "text": ["a"]}, rules(), "photo", "has no column `photo`"),
        ({"image": [{"path": "x"}], "text": ["a"]}, rules(), "image", "no images"),
        ({"image": [[1.0]], "text": ["a"]}, rules(), "image", "no images"),
    ],
)
def test_wrong_columns_list_the_right_ones(
    tmp_path: Path, columns: dict[str, list[Any]], captions: Captions, image: str, message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(SourceUnfit) as caught:
        found(tmp_path / "t.parquet", captions, image=image)
    assert caught.value.code == "wrong-column" and message in caught.value.message
    assert all(f"`{name}` (" in caught.value.help for name in columns)


def test_rows_that_hold_no_picture(tmp_path: Path) -> None:
    put(tmp_path, {"real.jpg": JPEG})
    cells = [
        {"bytes": None, "path": None},
        None,
        {"bytes": b"", "path": "empty.jpg"},
        {"bytes": b"words", "path": None},
        {"bytes": None, "path": "real.jpg"},
        {"bytes": None, "path": "gone.jpg"},
        {"bytes": None, "path": "nul\0.jpg"},
        {"bytes": JPEG[: len(JPEG) // 2], "path": "cut.jpg"},
        {"bytes": PNG, "path": "/home/me/b.png"},
    ]
    table = pa.table({"image": pa.array(cells, containers.IMAGE)})
    pq.write_table(table, tmp_path / "t.parquet")
    result = found(tmp_path / "t.parquet", rules("instance", prompt="x"))
    assert [(p.key, p.width, p.at) for p in result.pictures] == [
        ("home/me/b.png", 40, 8),
        ("real.jpg", 70, -1),
    ]
    reasons = why(result)
    assert reasons["t.parquet (row 0)"] == reasons["t.parquet (row 1)"] == "no image in this row"
    assert reasons["t.parquet (empty.jpg)"].startswith("empty file")
    assert reasons["t.parquet (row 3)"].startswith("not an image")
    assert reasons["t.parquet (gone.jpg)"] == "can't be read: No such file or directory"
    assert reasons["t.parquet (nul\0.jpg)"] == "this is no path"
    assert reasons["t.parquet (cut.jpg)"].startswith("truncated")
    assert len(result.faults) == 7


def test_hostile_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"a.jpg": JPEG, "b.txt": b"words"})
    lines = [
        b'\xef\xbb\xbf{"file_name": "a.jpg", "text": "one"}',
        b"",
        b"[1]",
        b"{half",
        b'{"file_name": 7}',
        b'{"text": "no name"}',
        b'{"file_name": "\xff"}',
        b"[" * 100_000,
        b'{"file_name": "b.txt", "text": "x"}',
        b'{"file_name": "a.jpg", "text": 5}',
        b'{"file_name": ".", "text": "x"}',
        b'{"file_name": "\\u0000", "text": "x"}',
    ]
    put(tmp_path, {"t.jsonl": b"\n".join(lines)})
    result = found(tmp_path / "t.jsonl")
    assert [p.key for p in result.pictures] == ["t/0/a.jpg", "t/2/a.jpg"]  # rows that are rows
    said = texts(result, rules())
    assert said[0] == ("one",) and "neither a text" in said[1].why
    reasons = why(result)
    assert reasons["t.jsonl (line 3)"] == "not a JSON object"
    assert reasons["t.jsonl (line 4)"].startswith("not JSON")
    assert reasons["t.jsonl (line 5)"] == "no path or URL under `file_name`"
    assert reasons["t.jsonl (line 7)"] == "not UTF-8 text"
    assert reasons["t.jsonl (line 8)"].startswith("not JSON")
    assert reasons["t.jsonl (b.txt)"].startswith("not an image")
    assert reasons["t.jsonl (.)"] == "not a regular file"
    assert len(result.faults) == 9
    monkeypatch.setattr(tables, "MAX_LINE", 30)
    with pytest.raises(SourceUnfit, match="line 1 is longer"):
        found(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file_name,text\na.jpg,caf\xe9\n", "not UTF-8"),
        (b"a,a\n1,2\n", "stands twice"),
        (b"x,y\n1,2\n", "no column that is known"),
        (b"file_name,words\na.jpg,2\n", "no column `text`"),
        (b'file_name,text\na.jpg,"' + b"x" * 200_000 + b'"\n', "line"),
    ],
)
def test_hostile_csv(tmp_path: Path, content: bytes, message: str) -> None:
    put(tmp_path, {"t.csv": content, "a.jpg": JPEG})
    with pytest.raises(SourceUnfit, match=message):
        found(tmp_path / "t.csv")


def test_a_csv_row_of_another_length_is_a_fault(tmp_path: Path) -> None:
    put(tmp_path, {"t.csv": b"file_name,text\r\na.jpg,x\r\na.jpg\r\n", "a.jpg": JPEG})
    result = found(tmp_path / "t.csv")
    assert len(result.pictures) == 1 and why(result) == {"t.csv (line 3)": "1 values for 2 columns"}


def test_captions_beside_the_files_of_a_table(tmp_path: Path) -> None:
    path = made(tmp_path / "c", "table")
    result = found(path, rules("textfile"))
    assert texts(result, rules("textfile")) == [(TOLD[p.key][1],) for p in result.pictures]


def test_captions_of_a_sample_in_a_tar(tmp_path: Path) -> None:
    """What has one name up to the first dot is one sample of WebDataset's."""
    names = [
        *("a/0.image.jpg", "a/0.caption.txt"),  # one sample
        *("a/1.jpg", "a/1.caption.txt"),
        *("2.image.jpg", "2.mask.jpg", "2.txt"),  # two pictures of one sample
        *("v1.0.jpg", "v1.1.jpg", "v1.1.txt"),  # the caption is the second's own,
        *("3.jpg", "3.a.txt", "3.b.txt"),  # these are two,
        *("b.x/4.jpg", "b.y/4.caption.txt"),  # and this is of another folder
    ]
    made = [
        containers.member(n, JPEG if n.endswith("jpg") else f"says {n}".encode()) for n in names
    ]
    found_ = found(containers.tar_of(tmp_path / "t.tar", made))
    assert found_.lines is not None and found_.faults == ()
    assert {key: list(lines) for key, lines in found_.lines.items()} == {
        "a/0.image.jpg": ["says a/0.caption.txt"],
        "a/1.jpg": ["says a/1.caption.txt"],
        "2.image.jpg": ["says 2.txt"],
        "2.mask.jpg": ["says 2.txt"],
        "v1.0.jpg": [],
        "v1.1.jpg": ["says v1.1.txt"],
        "3.jpg": [],
        "b.x/4.jpg": [],
    }


def test_json_beside_pictures_in_a_tar(tmp_path: Path) -> None:
    rows = [
        containers.member("a.jpg", JPEG),
        containers.member("a.json", b'{"caption": ["x", "y"]}'),
    ]
    rows += [containers.member("b.jpg", JPEG), containers.member("b.json", b"{")]
    result = found(containers.tar_of(tmp_path / "t.tar", rows), rules("json"))
    first, second = texts(result, rules("json"))
    assert first == ("x y",) and second.why.startswith("not JSON")


def test_without_pyarrow_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path / "c", "parquet")
    columns.pyarrow.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceUnfit, match="pyarrow") as caught:
        found(path)
    assert caught.value.help == 'pip install "tuner[parquet]"'
    monkeypatch.undo()
    assert len(found(path).pictures) == 5


def test_a_window_is_a_file(tmp_path: Path) -> None:
    put(tmp_path, {"f": bytes(range(100))})
    with open(tmp_path / "f", "rb") as file:
        window = tars.Window(file, 10, 20)
        assert window.read() == bytes(range(10, 30)) and window.read(5) == b""
        assert window.seek(-3, os.SEEK_END) == 17 and window.read(9) == bytes((27, 28, 29))
        assert window.seek(2) == 2 and window.read(2) == bytes((12, 13)) and window.tell() == 4
        assert window.seek(-9, os.SEEK_CUR) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_never_raise(tmp_path: Path, kind: str) -> None:
    """Nor do they crash: Arrow believes what a file says of itself unless it is made to look."""
    path = made(tmp_path / "c", kind)
    data, dice = path.read_bytes(), random.Random(kind)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(dice.choice((1, 2, 20))):
            near_the_end = len(damaged) - 1 - dice.randrange(min(900, len(damaged)))
            at = dice.choice((dice.randrange(len(damaged)), near_the_end))
            damaged[at] = dice.choice((0, 255, damaged[at] ^ 1, dice.randrange(256)))
        if dice.random() < 0.3:
            at = dice.randrange(len(damaged))
            del damaged[at : at + dice.randrange(1, 60)]
        path.write_bytes(damaged)
        with suppress(SourceUnfit):
            found(path)


def test_heic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    data = encoded(picture(70, 50), "HEIF", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6
    put(
        tmp_path / "p", {"a.heic": data, "turned.heif": encoded(picture(70, 50), "HEIF", exif=exif)}
    )
    put(tmp_path / "p", {"cut.heic": data[: len(data) * 2 // 3], "stub.heic": data[:40]})
    result = scan(tmp_path / "p")
    for one in result.pictures:
        with Image.open(tmp_path / "p" / one.key) as opened:
            assert (one.width, one.height) == ImageOps.exif_transpose(opened).size
    assert [p.key for p in result.pictures] == ["a.heic", "turned.heif"]
    assert why(result)["cut.heic"] == TRUNCATED and "stub.heic" in why(result)
    seen = decode(data, whole(70, 50), (70, 50)).astype(float)
    assert np.abs(seen - np.asarray(picture(70, 50))).mean() < 6
    monkeypatch.setattr(headers, "_reads_heif", lambda: False)
    index = Index(tmp_path / "index")
    settle()
    for result in (scan(tmp_path / "p", index), found(heic_tar(tmp_path, data), index=index)):
        assert {fault.why for fault in result.faults} == {headers.NEEDS_HEIF}
    assert index.save()
    monkeypatch.undo()  # it has been installed: nothing stale is believed
    again = Index(tmp_path / "index")
    assert len(scan(tmp_path / "p", again).pictures) == 2
    assert len(found(tmp_path / "t.tar", index=again).pictures) == 1


def heic_tar(folder: Path, data: bytes) -> Path:
    return containers.tar_of(folder / "t.tar", [containers.member("a.heic", data)])
