"""What is hostile, broken or wrong in containers is named, and never raises."""

from __future__ import annotations

import json
import os
import random
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compiler.data.index import Index
from compiler.data.sources import tables
from compiler.data.sources.listing import SourceUnfit
from compiler.plan import Captions
from tests.compiler.data import containers
from tests.compiler.data.pictures import png_bomb, put, settle
from tests.compiler.data.sources.told import (
    JPEG,
    KINDS,
    PNG,
    found,
    made,
    rules,
    texts,
    whole_names,
    why,
)


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
