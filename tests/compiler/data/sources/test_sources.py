"""Containers give what a folder of the same pictures gives."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from compiler.data import headers
from compiler.data.index import Index
from compiler.data.quick_headers import TRUNCATED
from compiler.data.scan import scan
from compiler.data.sources import columns, gather, tars
from compiler.data.sources.listing import SourceUnfit
from compiler.data.sources.spots import name_of, split_of, spot_of
from runtime.data.items import read
from runtime.data.pixels import decode
from tests.compiler.data import containers
from tests.compiler.data.manifests import whole
from tests.compiler.data.pictures import encoded, picture, put, settle
from tests.compiler.data.sources.told import (
    JPEG,
    KINDS,
    TOLD,
    found,
    heic_tar,
    item,
    made,
    rules,
    texts,
    why,
)


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
    monkeypatch.setattr("tests.compiler.data.sources.told.TOLD", changed)
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


def test_names_of_containers() -> None:
    names = ("a/photos.tar.gz", "photos.TGZ", "photos.tar", "photos.parquet", "photos")
    assert {name_of(name) for name in names} == {"photos"}
    assert name_of("my.data.tar.zst") == "my.data" and name_of("photos.gz") == "photos.gz"


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
