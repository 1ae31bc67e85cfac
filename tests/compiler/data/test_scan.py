"""Finding and measuring pictures: all formats, all faults, and the index that spares opening."""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from compiler.data import scan as scanning
from compiler.data.headers import Foreign, read_header
from compiler.data.quick_headers import TRUNCATED, Broken, Size, jpeg, png
from compiler.data.scan import Fault, Index, Picture, Scan, scan, shown
from tests.compiler.data.pictures import (
    chunk,
    encoded,
    oriented,
    picture,
    plain_key,
    png_bomb,
    put,
    settle,
)

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]
JPEG = encoded(picture(70, 50), "JPEG")
PNG = encoded(picture(70, 50), "PNG")


def sizes(found: Scan) -> dict[str, tuple[int, int]]:
    return {p.key: (p.width, p.height) for p in found.pictures}


def why(found: Scan) -> dict[str, str]:
    return {os.path.basename(f.path): f.why for f in found.faults}


def test_formats_by_content_nested_and_sorted(tmp_path: Path) -> None:
    for format in FORMATS:
        put(tmp_path, {f"b/{format}.bin": encoded(picture(70, 50), format)})
    put(tmp_path, {"z.jpg": JPEG, "A/\u00fc 1.PNG": JPEG, "b.jpg": PNG, "a\nb.jpg": JPEG})
    put(tmp_path, {"z.txt": b"words", "meta.json": b"{}", "notes.md": b"BM words", "x": b""})
    put(tmp_path, {".hidden.jpg": JPEG, ".ipynb_checkpoints/z.jpg": JPEG, "b/.DS_Store": b"1"})
    found = scan(tmp_path)
    keys = [p.key for p in found.pictures]
    assert keys == sorted(keys)
    assert set(keys) == {f"b/{f}.bin" for f in FORMATS} | {
        "z.jpg",
        "A/\u00fc 1.PNG",
        "b.jpg",
        "a\nb.jpg",
    }
    assert set(sizes(found).values()) == {(70, 50)}
    assert (found.faults, found.hidden, found.others) == ((), 3, 2)
    assert found.pictures[0] == Picture(key="A/\u00fc 1.PNG", bytes=len(JPEG), width=70, height=50)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(30, 20)
    put(tmp_path, {"a.jpg": oriented(image, orientation)})
    for format in ("PNG", "WEBP", "TIFF", "AVIF"):
        put(tmp_path, {f"b.{format}": encoded(image, format, exif=exif)})
    found = sizes(scan(tmp_path))
    assert set(found.values()) == {(20, 30) if orientation >= 5 else (30, 20)} and len(found) == 5
    for name in found:
        with Image.open(tmp_path / name) as opened:
            assert ImageOps.exif_transpose(opened).size == found[name]


def test_orientation_in_xmp_is_seen_as_pillow_sees_it(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    put(tmp_path, {"a.jpg": encoded(picture(30, 20), "JPEG", xmp=xmp)})
    with Image.open(tmp_path / "a.jpg") as opened:
        assert sizes(scan(tmp_path))["a.jpg"] == ImageOps.exif_transpose(opened).size == (20, 30)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_kinds_are_read_without_pillow(mode: str, progressive: bool) -> None:
    data = encoded(
        picture(33, 17, mode), "JPEG", progressive=progressive, icc_profile=b"x" * 70_000
    )
    assert jpeg(lambda o, n: data[o : o + n], len(data)) == Size(33, 17)


def test_faults_are_named(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "zero.jpg": b"",
            "text.png": b"this is no picture",
            "photo.jxl": b"\xff\x0a\xfa\x1f",
            "bomb.png": png_bomb(60_000, 60_000),
            "stub.jpg": JPEG[:15],
            "empty.png": chunk(b"IHDR", bytes(13)),
            "nothing.png": png_bomb(0, 5),
            "float.tiff": encoded(Image.new("F", (4, 4)), "TIFF"),
            "deep.tiff": encoded(Image.new("I", (4, 4)), "TIFF"),
            "good.jpg": JPEG,
        },
    )
    os.symlink("nowhere", tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    found = scan(tmp_path)
    assert sizes(found) == {"good.jpg": (70, 50)}
    faults = why(found)
    assert faults["zero.jpg"] == "empty file (0 bytes)"
    assert faults["text.png"] == "not an image: the content is of no format that is read"
    assert faults["photo.jxl"].startswith("not a format that is read")
    assert "60000x60000 is more than 178,956,970 pixels" in faults["bomb.png"]
    assert "header of this JPEG file" in faults["stub.jpg"]
    assert faults["empty.png"].startswith("not an image")
    assert faults["nothing.png"] == "a picture of 0x5 pixels"
    assert faults["float.tiff"] == faults["deep.tiff"]
    assert "32-bit" in faults["float.tiff"]
    assert faults["gone.jpg"] == "can't be read: a link that leads nowhere"
    assert faults["pipe.jpg"] == "not a regular file"
    assert len(faults) == 11


def test_bomb_of_a_rare_format_is_named(tmp_path: Path) -> None:
    head = bytearray(encoded(picture(4, 4), "BMP"))
    head[18:26] = (60_000).to_bytes(4, "little") * 2
    put(tmp_path, {"bomb.bmp": bytes(head)})
    assert "decompression bomb" in why(scan(tmp_path))["bomb.bmp"]


@pytest.mark.parametrize("format", FORMATS)
def test_every_cut_is_noticed(tmp_path: Path, format: str) -> None:
    """Cut anywhere: never a crash, never a picture that Pillow could not decode."""
    whole = encoded(picture(64, 48), format)
    cuts = [*random.Random(1).sample(range(len(whole)), 40), len(whole) - 1, len(whole) // 2]
    for cut in cuts:
        path = tmp_path / f"a.{format.lower()}"
        path.write_bytes(whole[:cut])
        if isinstance(read_header(str(path)), Size):
            with Image.open(path) as image:
                image.load()


def test_cut_photograph_is_named_truncated(tmp_path: Path, data_root: Path) -> None:
    photo = sorted((data_root / "dreambooth").rglob("*.jpg"))[0].read_bytes()
    put(tmp_path, {"a.jpg": photo, "b.jpg": photo[: len(photo) // 2], "c.jpg": photo[:-2]})
    put(tmp_path, {"trailer.jpg": photo + b"\0" * 3_000_000})
    found = scan(tmp_path)
    assert why(found) == {"b.jpg": TRUNCATED, "c.jpg": TRUNCATED}
    assert set(sizes(found)) == {"a.jpg", "trailer.jpg"}


def test_real_photographs_agree_with_pillow(data_root: Path) -> None:
    found = scan(data_root / "dreambooth")
    assert len(found.pictures) == len(list((data_root / "dreambooth").rglob("*.jpg"))) > 12
    assert found.faults == ()
    for item in found.pictures:
        with Image.open(data_root / "dreambooth" / item.key) as image:
            assert ImageOps.exif_transpose(image).size == (item.width, item.height)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_headers_never_raise(data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from([JPEG, PNG])))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(3, 300))] = data.draw(st.integers(0, 255))
    read = jpeg if whole[0] == 0xFF else png
    found = read(lambda o, n: bytes(whole[o : o + n]), len(whole))
    assert found is None or isinstance(found, Size | Broken)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([JPEG, PNG, b"GIF89a", b"II*\0", b"RIFF1234WEBP"]))
def test_any_bytes_never_raise(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, start: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "a.png"
    path.write_bytes(start[:20] + tail)
    assert isinstance(read_header(str(path)), Size | Broken | Foreign)


def test_links_and_loops(tmp_path: Path) -> None:
    put(tmp_path, {"root/a/1.jpg": JPEG, "root/b/2.jpg": JPEG, "elsewhere/3.jpg": JPEG})
    root = tmp_path / "root"
    os.symlink("..", root / "a" / "up")
    os.symlink(tmp_path, root / "b" / "out")
    os.symlink(tmp_path / "elsewhere", root / "linked")
    os.symlink("a/1.jpg", root / "file.jpg")
    found = scan(root)
    assert [p.key for p in found.pictures] == [
        "a/1.jpg",
        "b/2.jpg",
        "b/out/elsewhere/3.jpg",
        "file.jpg",
    ]
    assert found.faults == ()


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = b"caf\xe9\n.jpg"
    (tmp_path / plain_key(name)).write_bytes(JPEG)
    index = Index(tmp_path / ".index.sqlite")
    settle()
    found = scan(tmp_path, index)
    assert index.save() and scan(tmp_path, index).pictures == found.pictures
    assert os.fsencode(found.pictures[0].key) == name
    assert shown(found.pictures[0].key) == "caf\\udce9\\n.jpg"
    assert str(Fault(path="a\n", why="b")) == "a\\n: b"


def test_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan(tmp_path / "none")
    put(tmp_path, {"file": b""})
    with pytest.raises(NotADirectoryError):
        scan(tmp_path / "file")


def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []

    def counted(path: str) -> object:
        opened.append(os.path.basename(path))
        return read_header(path)

    monkeypatch.setattr(scanning, "read_header", counted)
    return opened


def test_index_spares_unchanged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, file = tmp_path / "data", tmp_path / "cache" / "index.sqlite"
    put(data, {f"{i}.jpg": JPEG for i in range(300)} | {"bad.png": b"bad", "notes": b"words"})
    settle()
    opened = opened_files(monkeypatch)
    index = Index(file)
    first = scan(data, index)
    assert len(opened) == 302 and not file.parent.exists()  # nothing is written before `save`
    assert index.save()
    opened.clear()
    assert scan(data, Index(file)) == first == scan(data, index) and opened == []
    (data / "7.jpg").write_bytes(oriented(picture(70, 50), 6))
    (data / "8.jpg").unlink()
    settle()
    second = scan(data, index)
    assert opened == ["7.jpg"] and sizes(second)["7.jpg"] == (50, 70)
    index.save()
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT count(*) FROM headers").fetchone() == (301,)


def test_index_sees_a_file_replaced_by_one_of_equal_length_and_age(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.sqlite")
    path = tmp_path / "data" / "a.bmp"
    put(tmp_path / "data", {"a.bmp": encoded(picture(60, 20), "BMP")})
    settle()
    assert sizes(scan(path.parent, index)) == {"a.bmp": (60, 20)}
    index.save()
    before = path.stat()
    path.write_bytes(encoded(picture(20, 60), "BMP"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert sizes(scan(path.parent, index)) == {"a.bmp": (20, 60)}


def test_index_does_not_trust_the_running_clock_tick(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.sqlite")
    put(tmp_path / "data", {"a.jpg": JPEG})
    scan(tmp_path / "data", index)
    index.save()
    index.load(str(tmp_path / "data"))
    assert not index._known


@pytest.mark.parametrize("content", [b"", b"rubbish" * 1000])
def test_damaged_index_costs_only_time(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "index.sqlite"
    file.write_bytes(content)
    put(tmp_path / "data", {"a.jpg": JPEG})
    settle()
    index = Index(file)
    assert len(scan(tmp_path / "data", index).pictures) == 1
    assert index.save()
    index.load(str(tmp_path / "data"))
    assert len(index._known) == 1


def test_read_only_index_is_read(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "index.sqlite"
    put(tmp_path / "data", {"a.jpg": JPEG})
    settle()
    index = Index(file)
    scan(tmp_path / "data", index)
    index.save()
    file.chmod(stat.S_IRUSR)
    file.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        index.load(str(tmp_path / "data"))
        assert len(index._known) == 1
        put(tmp_path / "data", {"b.jpg": JPEG})
        settle()
        assert len(scan(tmp_path / "data", index).pictures) == 2
        if os.geteuid() != 0:  # the administrator may write anywhere
            assert index.save() is False
    finally:
        file.parent.chmod(stat.S_IRWXU)


def test_index_below_a_file_can_not_be_saved(tmp_path: Path) -> None:
    put(tmp_path, {"file": b"", "data/a.jpg": JPEG})
    settle()
    index = Index(tmp_path / "file" / "index.sqlite")
    assert len(scan(tmp_path / "data", index).pictures) == 1
    assert index.save() is False


def test_condemned_files_are_faults_of_the_next_scan(tmp_path: Path) -> None:
    put(tmp_path / "data", {"a.jpg": JPEG, "b.jpg": JPEG})
    Index(tmp_path / "index").condemn(str(tmp_path / "data" / "a.jpg"), "broken image data")
    found = scan(tmp_path / "data", Index(tmp_path / "index"))
    assert why(found) == {"a.jpg": "broken image data"} and list(sizes(found)) == ["b.jpg"]


def test_progress_counts_every_file(tmp_path: Path) -> None:
    put(tmp_path, {f"{i}.jpg": JPEG for i in range(400)})
    seen: list[int] = []
    scan(tmp_path, advance=seen.append)
    assert seen[-1] == 400 and seen == sorted(seen)
    assert all(b > a for a, b in itertools.pairwise(seen))
