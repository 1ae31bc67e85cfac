"""What lies in files without names is what went in; where there can be no file, it stays."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.data import nameless
from compiler.data.manifest import Manifest
from compiler.data.nameless import Growing, mapped
from compiler.data.texts import GrowingTexts
from tests.compiler.data.test_manifest import FOLDERS, SAMPLES


@given(st.lists(st.binary(max_size=20), max_size=6))
def test_parts_come_back(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("n")
    assert [bytes(part) for part in mapped(parts, folder)] == parts
    assert list(folder.iterdir()) == []


def test_parts_are_aligned(tmp_path: Path) -> None:
    _, numbers = mapped([b"abc", array("Q", [2**60, 7])], tmp_path)
    assert numbers.cast("Q").tolist() == [2**60, 7]
    with pytest.raises(FileNotFoundError):
        mapped([b"x"], tmp_path / "none")


texts = st.lists(st.text(st.characters(codec=None), max_size=9), max_size=30)


@given(texts, st.booleans())
def test_texts_of_any_kind(
    tmp_path_factory: pytest.TempPathFactory, given_: list[str], there: bool
) -> None:
    """Lone surrogates, too; with files after each few bytes, or with none to be had."""
    folder = tmp_path_factory.mktemp("n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Growing, "LIMIT", 12)
        growing = GrowingTexts(folder if there else folder / "none")
        for text in given_:
            growing.add(text)
        found = growing.texts()
    assert list(found) == given_ and len(found) == growing.count
    assert [found[number] for number in range(len(found))] == given_
    assert list(folder.iterdir()) == []
    for wrong in (-1, len(given_)):
        with pytest.raises(IndexError):
            found[wrong]


@pytest.mark.parametrize("full", [0, 1, 2, 5])
def test_a_disk_that_fills_up_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: int
) -> None:
    """The write after `full` of them takes a part and fails."""
    real, done = nameless._write, []

    def write(file: nameless.FileIO, data: nameless.Bytes | nameless.Growable) -> int:
        done.append(1)
        if len(done) <= full:
            return real(file, data)
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nameless, "_write", write)
    monkeypatch.setattr(Growing, "LIMIT", 16)
    held = array("I")
    growing = Growing(held, tmp_path)
    for number in range(20):
        held.append(number)
        growing.relieve()
    assert growing.whole().cast("I").tolist() == list(range(20))


def test_a_list_is_the_same_in_memory_and_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest(FOLDERS, SAMPLES, SAMPLES[:1])
    assert manifest.held_out is not None
    manifest.save(tmp_path / "list")
    expected, digest, judged = list(manifest), manifest.digest, list(manifest.held_out)
    monkeypatch.setattr(Growing, "LIMIT", 8)
    monkeypatch.setattr("compiler.data.rows._LOOKED_AT", 1)
    loaded = Manifest.load(tmp_path / "list")
    moved = Manifest(FOLDERS, SAMPLES, SAMPLES[:1])
    for found in (loaded, manifest, moved):
        found.to_disk(tmp_path)
        assert list(found) == expected and found.digest == digest
        assert found.held_out is not None and list(found.held_out) == judged
        assert found.captions == tuple(found.texts)
        found.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "list").read_bytes()
    manifest.to_disk(tmp_path / "none")
    assert list(manifest) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "list"]
