"""Compressed tars give what plain ones give, and are read forward."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from attrs import evolve

from compiler.data.manifest import Item
from compiler.data.sources.compressed import Forward
from runtime.data.items import read
from tests.compiler.data import containers
from tests.compiler.data.pictures import encoded, picture, put
from tests.compiler.data.sources.told import (
    JPEG,
    TOLD,
    found,
    made,
)


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
