"""The same photographs in a folder and in each container train the same weights, bit for bit."""

from __future__ import annotations

import gzip
import lzma
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from compiler.compile import Compiled
from compiler.data.index import HEADERS, Index
from compiler.data.manifest import Item
from compiler.home import default_cache
from compiler.plan import Plan
from runtime.data import items
from runtime.data.cache import Cache
from runtime.data.fill import BrokenData, fill_latents
from runtime.data.hashes import item_hashes, known_hashes
from runtime.data.located import sample_keys
from runtime.events import Silent
from runtime.execute import execute
from runtime.families import family_of
from tests.compiler.data import containers
from tests.compiler.data.pictures import encoded, picture, settle
from tests.compiler.recipes import compiled
from tests.runtime.tiny import make_tiny

RECIPE = """\
name = "{kind}"
seed = 5
output = "runs/{kind}"

[model]
family = "sana"
base = "base"

[adapter]
kind = "lora"
rank = 2

[cache]
path = "cache-{kind}"

[memory]
budget = "none"

[precision]
compute = "fp32"

[data]
resolution = 64
flip = true
crop = {{ style = "random" }}
captions = {{ dropout = 0.2, shuffle = true, variants = 3 }}
[[data.source]]
id = "photos"
path = "{path}"
repeats = 1.5
holdout = 0.1

[train]
steps = {steps}
batch_size = 2
optimizer = {{ lr = 1e-3 }}
"""
SHORT = "[text]\ninstruction = false\nmax_length = 64\n"
"""More of the recipe: long prompts are nearly all of what takes time in training."""
KINDS = ("folder", "table", "webdataset", "parquet", "arrow")


def pack(folder: Path, told: containers.Told) -> dict[str, str]:
    """The pictures in every kind of source, containers in another order; their paths."""
    back = dict(reversed(told.items()))
    containers.as_folder(folder / "photos", told)
    containers.as_table(folder / "photos" / "rows.jsonl", back)
    containers.as_tar(folder / "photos.tar", back)
    names = list(back)
    (folder / "shards").mkdir()
    for number in range(3):
        part = {name: back[name] for name in names[number::3]}
        containers.as_parquet(folder / "shards" / f"train_{number:03}.parquet", part, rows=2)
    containers.as_arrow(folder / "photos.arrow", back)
    return dict(
        zip(
            KINDS,
            ("photos", "photos/rows.jsonl", "photos.tar", "shards", "photos.arrow"),
            strict=True,
        )
    )


def compile_kind(folder: Path, kind: str, path: str, steps: int, more: str = "") -> Compiled:
    recipe = folder / f"{kind}.toml"
    recipe.write_text(RECIPE.format(kind=kind, path=path, steps=steps) + more, encoding="utf-8")
    result = compiled(recipe)
    assert result.plan is not None and result.manifest is not None, result.diagnostics
    return result


def trained(folder: Path, told: containers.Told, steps: int, kinds: Sequence[str]) -> None:
    """Train from each of these kinds of sources and compare everything on the way."""
    make_tiny("sana", folder / "base")
    chosen = pack(folder, told)
    first: tuple[Plan, dict[str, torch.Tensor], list[bytes]] | None = None
    for kind in kinds:
        result = compile_kind(folder, kind, chosen[kind], steps, SHORT)
        plan, manifest = result.plan, result.manifest
        assert plan is not None and manifest is not None
        assert plan.sources[0].kind == kind
        outcome = execute(plan, manifest, Silent())
        assert outcome.status == "finished" and outcome.result is not None
        weights = {
            name: tensor
            for file in sorted(outcome.result.rglob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        keys = sample_keys(plan, manifest, family_of("sana"), Cache(Path(plan.cache_folder)))
        if first is None:
            first = plan, weights, keys
            assert len(manifest) == 2 * (len(told) - max(1, round(len(told) * 0.1)))
            continue
        assert plan.manifest == first[0].manifest and plan.buckets == first[0].buckets
        assert keys == first[2]
        assert weights.keys() == first[1].keys() and len(weights) > 0
        assert all(torch.equal(weights[name], first[1][name]) for name in weights), kind


@pytest.mark.slow
def test_ten_steps_of_photographs(tmp_path: Path, data_root: Path) -> None:
    """All of them, made smaller so that it takes less long."""
    told = {}
    for path in sorted((data_root / "dreambooth").glob("*/*.jpg")):
        subject = path.parent.name
        with Image.open(path) as opened:
            opened.draft("RGB", (600, 600))
            opened.thumbnail((300, 300))
            data = encoded(opened.convert("RGB"), "JPEG", quality=90)
        told[f"{subject}/{path.name}"] = (data, f"a photo, of {subject}, number {path.stem}")
    assert len(told) > 60
    trained(tmp_path, told, 10, KINDS)


@pytest.mark.skipif("TUNER_REAL_DATA" in os.environ, reason="photographs are trained on instead")
def test_two_steps_of_drawn_pictures(tmp_path: Path) -> None:
    sizes = [(70, 70), (140, 70), (64, 64), (70, 140), (80, 81)]
    told = {
        f"{'ab'[n % 2]}/{n}.png": (encoded(picture(*size, seed=n), "PNG"), f"a, b{n}, c, d")
        for n, size in enumerate(sizes)
    }
    trained(tmp_path, told, 2, ("folder", "webdataset", "parquet"))


def test_all_photographs_give_the_same_plan_and_keys(tmp_path: Path, data_root: Path) -> None:
    """All of them at their own size, without training."""
    root = data_root / "dreambooth"
    told = {
        path.relative_to(root).as_posix(): (path.read_bytes(), f"a photo of {path.parent.name}")
        for path in sorted(root.glob("*/*.jpg"))
    }
    assert len(told) > 60
    make_tiny("sana", tmp_path / "base")
    seen = set()
    for kind, path in pack(tmp_path, told).items():
        result = compile_kind(tmp_path, kind, path, 10)
        plan, manifest = result.plan, result.manifest
        assert plan is not None and manifest is not None
        keys = sample_keys(plan, manifest, family_of("sana"), Cache(Path(plan.cache_folder)))
        seen.add((plan.manifest, plan.buckets, tuple(keys)))
    assert len(seen) == 1


def test_compressed_tars_give_the_same_plan_keys_and_latents(tmp_path: Path) -> None:
    make_tiny("sana", tmp_path / "base")
    told = {f"{n}.png": (encoded(picture(70, 70, seed=n), "PNG"), f"a, {n}") for n in range(5)}
    plain = (tmp_path / pack(tmp_path, told)["webdataset"]).read_bytes()
    seen = set()
    for ending, packed in {
        "tar": plain,
        "tar.gz": gzip.compress(plain),
        "tar.xz": lzma.compress(plain),
    }.items():
        (tmp_path / ending).mkdir()
        (tmp_path / ending / f"pictures.{ending}").write_bytes(packed)
        result = compile_kind(tmp_path, "webdataset", f"{ending}/pictures.{ending}", 2)
        plan, manifest = result.plan, result.manifest
        assert plan is not None and manifest is not None
        cache, family = Cache(tmp_path / ending / "cache"), family_of("sana")
        fill_latents(plan, manifest, family, cache, Silent())
        keys = sample_keys(plan, manifest, family, cache)
        values = tuple(tuple(cache.get(key)["mean"].flatten().tolist()) for key in keys)
        seen.add((plan.buckets, tuple(keys), values))
    assert len(seen) == 1
    assert len(list((tmp_path / "xdg/tuner/unpacked").iterdir())) == 2


def test_hashes_inside_containers_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {f"{n}.png": (encoded(picture(20, 20, seed=n), "PNG"), "x") for n in range(7)}
    path = containers.as_parquet(tmp_path / "t.parquet", told)
    settle()
    rows = [Item(file=str(path), at=n, kind="parquet", column="image") for n in (6, 0, 3, 1)]
    cache = Cache(tmp_path / "cache")
    first = item_hashes(cache, rows, 2)
    assert len(set(first)) == 4 and known_hashes(cache.store, rows) == first

    def refuse(_: Item) -> bytes:
        raise AssertionError("read again")

    with monkeypatch.context() as patched:
        patched.setattr("runtime.data.hashes.read", refuse)
        assert item_hashes(Cache(tmp_path / "cache"), rows) == first
    containers.as_parquet(path, dict(reversed(told.items())))
    assert known_hashes(cache.store, rows) == [None] * 4
    assert item_hashes(cache, rows)[1] == first[0]  # the first row is the last one now


def test_each_row_group_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {f"{n:02}.png": (encoded(picture(20, 20, seed=n), "PNG"), "x") for n in range(40)}
    path = containers.as_parquet(tmp_path / "t.parquet", told, rows=4)
    rows = [Item(file=str(path), at=n, kind="parquet", column="image") for n in range(40)]
    groups: list[int] = []
    plain = items._parquet

    class Counting:
        def __init__(self, file: object) -> None:
            self.file = file

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()  # type: ignore[attr-defined]

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def read_row_group(self, group: int, columns: list[str]) -> object:
            groups.append(group)
            return self.file.read_row_group(group, columns=columns)  # type: ignore[attr-defined]

    monkeypatch.setattr(items, "_parquet", lambda *given: Counting(plain(*given)))
    hashes = item_hashes(Cache(tmp_path / "cache"), rows[::-1])  # by one thread: in this order
    assert groups == list(range(10)) and len(set(hashes)) == 40


def test_a_shard_that_has_shrunk_is_named(tmp_path: Path) -> None:
    told = {f"{n}.png": (encoded(picture(20, 20, seed=n), "PNG"), "x") for n in range(5)}
    path = containers.as_parquet(tmp_path / "t.parquet", told)
    row = Item(file=str(path), at=4, kind="parquet", column="image")
    assert items.read(row) == told["4.png"][0]
    containers.as_parquet(path, dict(list(told.items())[:2]))
    with pytest.raises(OSError, match="row 4 of the shard can't be read"):
        items.read(row)
    os.remove(path)
    with pytest.raises(FileNotFoundError):
        items.read(row)


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_picture_that_can_not_be_decoded_is_named_by_the_next_plan(
    tmp_path: Path, kind: str
) -> None:
    """A PNG whose ends are right and whose middle is missing: no header shows it."""
    make_tiny("sana", tmp_path / "base")
    told = {f"{n}.png": (encoded(picture(70, 70, seed=n), "PNG"), f"a, {n}") for n in range(5)}
    for name in ("1.png", "3.png"):  # of which one may be held out
        data = told[name][0]
        middle = data.index(b"IDAT") + 40
        told[name] = (data[:middle] + bytes(len(data) - middle - 12) + data[-12:], "a, rotten")
    chosen = pack(tmp_path, told)
    settle()
    result = compile_kind(tmp_path, kind, chosen[kind], 2)
    assert result.plan is not None and result.manifest is not None
    with pytest.raises(BrokenData, match=r"\([13].png\): broken image data"):
        cache = Cache(Path(result.plan.cache_folder))
        fill_latents(result.plan, result.manifest, family_of("sana"), cache, Silent())
    index = Index(default_cache() / HEADERS)
    again = compiled(tmp_path / f"{kind}.toml", index=index)
    assert [fault.code for fault in again.diagnostics] == ["broken-images"]
    assert ".png): broken image data" in again.diagnostics[0].notes[0]
