"""The manifest: order, digest, file, size in memory."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.data.manifest import Folder, Manifest, ManifestDamaged, Sample
from tests.compiler.data.manifests import manifest_of, sample, whole

FOLDERS = (Folder(id="a", path="/data/a"), Folder(id="b", path="/data/b"))
SAMPLES = [
    sample(1, "z.png", 64, 128, "a dog"),
    sample(0, "sub/x\n\udce9.png", 128, 64, "K\u00e4se"),
    sample(0, "a.png", 64, 64, "a dog"),
    sample(1, "b.png", 64, 64, ""),
]


def test_rows_are_sorted_whatever_the_order() -> None:
    manifest = Manifest(FOLDERS, SAMPLES)
    assert [(s.source, s.key) for s in manifest] == [
        (0, "a.png"),
        (0, "sub/x\n\udce9.png"),
        (1, "b.png"),
        (1, "z.png"),
    ]
    assert sorted(manifest, key=repr) == sorted(SAMPLES, key=repr) and len(manifest) == 4
    assert manifest.path(3) == "/data/b/z.png" and manifest.name(3) == "b/z.png"
    assert manifest.captions == ("a dog", "K\u00e4se", "")
    assert manifest.captions_of(1) == ("K\u00e4se",) and manifest.placement(1) == whole(128, 64)
    again = Manifest(FOLDERS, random.Random(3).sample(SAMPLES, 4))
    assert list(again) == list(manifest) and again.digest == manifest.digest


def test_buckets_are_of_one_source_and_one_size() -> None:
    found = Manifest(FOLDERS, SAMPLES).buckets
    assert [(b.source, b.width, b.height, list(b.samples)) for b in found] == [
        (0, 64, 64, [0]),
        (0, 128, 64, [1]),
        (1, 64, 64, [2]),
        (1, 64, 128, [3]),
    ]


def test_digest_covers_what_matters_and_nothing_else() -> None:
    base = Manifest(FOLDERS, SAMPLES)
    moved = [attrs.evolve(folder, path="/elsewhere" + folder.path) for folder in FOLDERS]
    assert Manifest(moved, SAMPLES).digest == base.digest
    first, *rest = SAMPLES
    changes: list[dict[str, object]] = [
        {"key": "y.png"},
        {"bytes": 1},
        {"width": 63},
        {"height": 127},
        {"placement": attrs.evolve(first.placement, crop_x=1)},
        {"captions": ("a dog ",)},
        {"captions": ("a dog", "")},
        {"captions": ("a", " dog")},
        {"placement": attrs.evolve(first.placement, mirrored=True)},
        {"placement": attrs.evolve(first.placement, focus="face")},
        {"source": 0},
    ]
    digests = {Manifest(FOLDERS, [attrs.evolve(first, **c), *rest]).digest for c in changes}
    digests.add(Manifest([FOLDERS[0], Folder(id="c", path="/data/b")], SAMPLES).digest)
    assert len(digests | {base.digest}) == len(changes) + 2


def test_a_key_stands_once_in_a_source() -> None:
    with pytest.raises(ValueError, match="stands twice"):
        Manifest(FOLDERS, [SAMPLES[0], SAMPLES[0]])


texts = st.text(st.characters(codec=None, exclude_categories=("Cs",)), max_size=20)


@given(st.lists(st.tuples(st.integers(0, 1), texts, texts), unique_by=lambda x: x[:2], max_size=8))
def test_file_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str, str]]
) -> None:
    path = tmp_path_factory.mktemp("manifest") / "samples.jsonl"
    manifest = Manifest(FOLDERS, [sample(s, k, 64, 128, c) for s, k, c in rows])
    manifest.save(path)
    loaded = Manifest.load(path)
    assert list(loaded) == list(manifest) and loaded.digest == manifest.digest
    assert loaded.folders == manifest.folders and len(list(path.parent.iterdir())) == 1


def test_surrogates_survive_the_file(tmp_path: Path) -> None:
    Manifest(FOLDERS, SAMPLES).save(tmp_path / "m")
    assert list(Manifest.load(tmp_path / "m")) == list(Manifest(FOLDERS, SAMPLES))


def test_any_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    Manifest(FOLDERS, SAMPLES).save(path)
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    damaged = [text[: len(text) // 2], "", "".join(lines[:-1]), text.replace("a dog", "a cat")]
    damaged.append(text.replace('"format": 3', '"format": 9'))
    for content in damaged:
        path.write_text(content)
        with pytest.raises(ManifestDamaged):
            Manifest.load(path)
    with pytest.raises(FileNotFoundError):
        Manifest.load(tmp_path / "none")


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    Manifest(FOLDERS, SAMPLES).save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compiler.data.manifest.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        manifest_of([[3]]).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_rows_are_small() -> None:
    """20,000 rows with own keys and captions; a million must stay far below 2 GiB."""

    def rows(count: int) -> list[Sample]:
        placement = whole(64, 64)
        return [
            attrs.evolve(
                sample(0, f"folder/{i:07}.jpg", caption=f"{i:07} " + "w" * 100), placement=placement
            )
            for i in range(count)
        ]

    samples = rows(20_000)
    tracemalloc.start()
    manifest = Manifest(FOLDERS, samples)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(manifest) == 20_000
    assert kept / 20_000 < 400 and peak / 20_000 < 600  # bytes a row, without the strings
