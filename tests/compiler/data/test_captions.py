"""Captions: each rule of the module's docstring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compiler.data.captions import MAX_BYTES, all_captions, captions_of, from_name
from compiler.data.scan import Fault, Picture, Scan
from compiler.plan import Captions


def settings(**changes: Any) -> Captions:
    values: dict[str, Any] = {
        "kind": "textfile",
        "prompt": "",
        "missing": "error",
        "multiline": "join",
        "dropout": 0.0,
    }
    return Captions(**(values | changes))


def read(folder: Path, data: bytes, suffix: str = "txt", **changes: Any) -> tuple[str, ...] | Fault:
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / f"a.{suffix}").write_bytes(data)
    return captions_of(str(folder), "sub/a.jpg", settings(**changes))


def said(*texts: str) -> tuple[str, ...]:
    return tuple(text for text in texts if text)


@pytest.mark.parametrize(
    ("data", "join", "first"),
    [
        (b"a dog", "a dog", "a dog"),
        (b"  a\tdog \r\n\r\n in snow\n", "a dog in snow", "a dog"),
        (b"\n \n second line\nthird", "second line third", "second line"),
        (b"\xef\xbb\xbfa dog", "a dog", "a dog"),
        ("K\u00e4se,\u00a0\u3000\u72ac".encode(), "K\u00e4se, \u72ac", "K\u00e4se, \u72ac"),
        (b"", "", ""),
        (b" \n\t\n", "", ""),
    ],
)
def test_textfile(tmp_path: Path, data: bytes, join: str, first: str) -> None:
    assert read(tmp_path, data) == said(join)
    assert read(tmp_path, data, multiline="first") == said(first)


def test_each_line_an_alternative(tmp_path: Path) -> None:
    data = b"a dog\r\n\n  a brown\tdog \na dog\n"
    assert read(tmp_path, data, multiline="alternatives") == ("a dog", "a brown dog")
    assert read(tmp_path, b" \n", multiline="alternatives") == ()


@pytest.mark.parametrize(
    ("data", "multiline", "expected"),
    [
        (b'{"caption": " a  dog "}', "join", ("a dog",)),
        (b'\xef\xbb\xbf{"caption": ["a dog", "", "in\\nsnow"]}', "join", ("a dog in snow",)),
        (b'{"caption": ["", "a dog", "b"]}', "first", ("a dog",)),
        (b'{"caption": ["a dog", "b\\nc", "b"]}', "alternatives", ("a dog", "b", "c")),
        (b'{"caption": null}', "join", ()),
        (b'{"caption": []}', "alternatives", ()),
        (b'{"other": "a dog"}', "join", ()),
        (b"", "join", ()),
    ],
)
def test_json(tmp_path: Path, data: bytes, multiline: str, expected: tuple[str, ...]) -> None:
    rule = {"kind": "json", "key": "caption", "multiline": multiline}
    assert read(tmp_path, data, "json", **rule) == expected
    assert captions_of(str(tmp_path), "none.jpg", settings(**rule)) == ()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a dog", "not JSON"),
        (b'{"caption": "a', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["a dog"]', "not a JSON object"),
        (b'{"caption": 3}', "`caption` is neither a text nor a list of texts"),
        (b'{"caption": ["a", ["b"]]}', "neither a text nor a list"),
        (b'{"caption": "a\\ud800b"}', "characters that are no text"),
        (b'{"caption": "a\\u0000b"}', "characters that are no text"),
        (b'{"caption": "caf\xe9"}', "not UTF-8"),
    ],
)
def test_json_faults(tmp_path: Path, data: bytes, words: str) -> None:
    found = read(tmp_path, data, "json", kind="json", key="caption")
    assert isinstance(found, Fault) and words in found.why and found.path.endswith("a.json")


def test_no_textfile_is_no_caption(tmp_path: Path) -> None:
    assert captions_of(str(tmp_path), "a.jpg", settings()) == ()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"caf\xe9", "not UTF-8 text"),
        ("a dog".encode("utf-16"), "looks like UTF-16"),
        ("a dog".encode("utf-16-be"), "looks like UTF-16"),
        (b"x" * (MAX_BYTES + 1), "longer than 1,048,576 bytes"),
    ],
)
def test_textfile_faults(tmp_path: Path, data: bytes, words: str) -> None:
    found = read(tmp_path, data)
    assert isinstance(found, Fault) and words in found.why
    assert found.path == str(tmp_path / "sub" / "a.txt")


def test_unreadable_textfile_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    found = captions_of(str(tmp_path), "a.jpg", settings())
    assert isinstance(found, Fault) and "directory" in found.why


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a_red_car.jpg", "a red car"),
        ("deep/er/a red car.png", "a red car"),
        ("a_red_car_007.jpg", "a red car"),
        ("a red car (12).jpg", "a red car"),
        ("a-red-car-3.jpg", "a-red-car"),
        ("close-up of 2 dogs.jpg", "close-up of 2 dogs"),
        ("0012_a dog.jpg", "a dog"),
        ("2_dogs.jpg", "2 dogs"),
        ("v2.final_cut.webp", "v2.final cut"),
        ("00.jpg", ""),
        ("2024-01-05.jpg", ""),
        ("a__b   c.jpg", "a b c"),
        ("caf\udce9 au lait.jpg", "caf\ufffd au lait"),
        ("two\nlines.jpg", "two lines"),
    ],
)
def test_filename(key: str, expected: str) -> None:
    assert from_name(key) == expected
    assert captions_of("", key, settings(kind="filename")) == said(expected)


def test_instance() -> None:
    rule = settings(kind="instance", prompt="  a photo of  sks dog\n")
    pictures = [Picture(key=key, bytes=1, width=1, height=1) for key in ("a.jpg", "b.jpg")]
    found = Scan(pictures=tuple(pictures), faults=(), hidden=0, others=0)
    assert all_captions("", found, pictures, rule) == [("a photo of sks dog",)] * 2
