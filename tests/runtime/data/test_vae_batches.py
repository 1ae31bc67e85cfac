"""Several pictures encoded at a time: which of them, and what comes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compiler.data.geometry import Placement
from compiler.data.manifest import Folder, Manifest, Sample
from compiler.families import FAMILIES
from compiler.plan import Mask, Plan
from runtime.data import decode, keys
from runtime.data.cache import Cache
from runtime.data.fill import OFFSET, BrokenData, NotFinite, fill_latents
from runtime.data.located import sample_keys
from runtime.data.masks import NAME
from runtime.data.packed import Keys
from runtime.data.vae_batches import vae_batches
from runtime.events import Silent
from runtime.families import family_of
from tests.compiler.data.pictures import encoded, picture
from tests.runtime.data import test_masks
from tests.runtime.data.fakes import FakeFamily, fake_base
from tests.runtime.data.test_sharing import together
from tests.runtime.plans import draw_data, tiny_plan
from tests.runtime.tiny import make_tiny
from tests.runtime.whole_runs import wait

SIZES = [(70, 70)] * 4 + [(140, 70)] * 3
ENTRY = dict[str, Tensor]


class Sociable(FakeFamily):
    """What it makes of a picture depends on all in its batch, as the last bits do for real."""

    def __init__(self) -> None:
        super().__init__(FAMILIES["sana"])
        self.batches: list[tuple[int, int, int]] = []  # pictures, height, width

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        self.batches.append((pixels.shape[0], *pixels.shape[2:]))
        found = super().encode_pixels(vae, pixels)
        found["mean"] = found["mean"] + 1e-3 * pixels.mean() + 1e-2 * len(pixels)
        return found


def made(tmp_path: Path, size: int, *, cache: str = "cache") -> tuple[Plan, Manifest]:
    """Seven pictures in two buckets, encoded `size` at a time."""
    base = tmp_path.parent / "sana-base"
    if not base.exists():
        make_tiny("sana", base)
    if not (tmp_path / "dogs").exists():
        draw_data(tmp_path / "dogs", SIZES)
    plan, manifest = tiny_plan("sana", base, tmp_path / "dogs", tmp_path / "run", vae_batch=size)
    plan = evolve(plan, cache_folder=str(tmp_path / cache))
    return fake_base(plan, tmp_path / "fake"), manifest


def entries(plan: Plan, manifest: Manifest, family: Any) -> list[ENTRY | None]:
    """What is cached of each row."""
    cache = Cache(Path(plan.cache_folder))
    names = sample_keys(plan, manifest, family, cache)
    missing = cache.missing(names)
    return [
        None if k in missing else {n: t.clone() for n, t in cache.get(k).items()} for k in names
    ]


def same(one: list[ENTRY | None], other: list[ENTRY | None]) -> bool:
    return len(one) == len(other) and all(
        a is not None
        and b is not None
        and a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("size", [1, 3, 64])
def test_batches_are_buckets_in_parts(tmp_path: Path, size: int) -> None:
    plan, manifest = made(tmp_path, size)
    family = Sociable()
    fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent())
    (few, many) = sorted(plan.buckets, key=lambda bucket: bucket.images)
    assert (few.images, many.images) == (3, 4) and few.width > many.width
    counts = {1: ([1] * 3, [1] * 4), 3: ([3], [3, 1]), 64: ([3], [4])}[size]
    assert sorted(family.batches) == sorted(
        (count, bucket.height, bucket.width)
        for bucket, every in zip((few, many), counts, strict=True)
        for count in every
    )


@pytest.mark.parametrize("name", ["sana", "sd3"])
def test_latents_are_those_of_each_alone(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """By a real VAE: but for the last bits, which its kernels choose by the batch."""
    draw_data(tmp_path / "dogs", SIZES)
    base, found = request.getfixturevalue(f"tiny_{name}"), []
    for size in (1, 3):
        family = family_of(name)
        plan, manifest = tiny_plan(name, base, tmp_path / "dogs", tmp_path / "run", vae_batch=size)
        fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent())
        found.append(entries(plan, manifest, family))
    for alone, batched in zip(*found, strict=True):
        assert alone is not None and batched is not None and alone.keys() == batched.keys()
        for key, tensor in alone.items():
            assert batched[key].shape == tensor.shape
            torch.testing.assert_close(batched[key], tensor, rtol=1e-4, atol=1e-5)
    means = [entry["mean"] for entry in found[1] if entry is not None]
    assert all(
        not torch.equal(a, b) for n, a in enumerate(means) for b in means[:n] if a.shape == b.shape
    ), "each has its own"


@pytest.mark.parametrize("written", range(7))
def test_a_killed_run_goes_on_with_the_same_numbers(
    tmp_path: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it ended, what is cached at last is what an unbroken run caches."""
    whole, manifest = made(tmp_path, 3, cache="whole")
    fill_latents(whole, manifest, Sociable(), Cache(Path(whole.cache_folder)), Silent())
    plan, _ = made(tmp_path, 3)
    put, count = Cache.put, 0

    def dying(self: Cache, key: bytes, entry: Any) -> None:
        nonlocal count
        if count == written:
            raise KeyboardInterrupt
        count += 1
        put(self, key, entry)

    monkeypatch.setattr(Cache, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        fill_latents(plan, manifest, Sociable(), Cache(Path(plan.cache_folder)), Silent())
    kept = entries(plan, manifest, Sociable())
    assert sum(entry is not None for entry in kept) == written
    new: list[bytes] = []
    monkeypatch.setattr(
        Cache, "put", lambda self, key, entry: (new.append(key), put(self, key, entry))[1]
    )
    fill_latents(plan, manifest, Sociable(), Cache(Path(plan.cache_folder)), Silent())
    assert len(new) == len(set(new)) == 7 - written, "what was there is not written again"
    family = Sociable()
    assert same(entries(plan, manifest, family), entries(whole, manifest, family))


def test_nothing_is_encoded_again(tmp_path: Path) -> None:
    plan, manifest = made(tmp_path, 3)
    for expected in (3, 0):
        family = Sociable()
        fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent())
        assert len(family.batches) == expected
        assert family.loaded == (["vae"] if expected else [])


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_ranks_make_the_batches_of_one(tmp_path: Path) -> None:
    """Each encodes some of them, and each batch is whole."""
    draw_data(tmp_path / "dogs", [(70, 70)] * 13 + [(140, 70)] * 6)
    alone, manifest = made(tmp_path, 2, cache="alone")
    one = Sociable()
    fill_latents(alone, manifest, one, Cache(Path(alone.cache_folder)), Silent())
    plan, _ = made(tmp_path, 2)

    def work(rank: int, team: Any) -> int:
        family = Sociable()
        fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent(), team)
        (tmp_path / f"did-{rank}").write_text(json.dumps(family.batches))
        return 0

    assert [wait(pid) for pid in together(2, work)] == [0, 0]
    did = [json.loads((tmp_path / f"did-{rank}").read_text()) for rank in range(2)]
    assert all(did) and sorted(map(tuple, did[0] + did[1])) == sorted(one.batches)
    assert same(entries(plan, manifest, one), entries(alone, manifest, one))


def test_a_broken_picture_leaves_its_batch(tmp_path: Path) -> None:
    """The others of the batch are encoded without it, and all other batches stay as they are."""
    plan, manifest = made(tmp_path, 3)
    data = encoded(picture(70, 70), "PNG")
    middle = data.index(b"IDAT") + 40
    (tmp_path / "dogs" / "01.png").write_bytes(
        data[:middle] + bytes(len(data) - middle - 12) + data[-12:]
    )
    plan, manifest = made(tmp_path, 3)
    family = Sociable()
    with pytest.raises(BrokenData, match="1 picture can't be decoded") as caught:
        fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent())
    assert [Path(path).name for path, _ in caught.value.files] == ["01.png"]
    assert sorted(count for count, *_ in family.batches) == [1, 2, 3]
    found = entries(plan, manifest, family)
    names = [manifest[row].key for row, entry in enumerate(found) if entry is None]
    assert names == ["01.png"]


def test_of_what_is_no_number_the_right_picture_is_named(tmp_path: Path) -> None:
    """And what came before it in its batch is cached."""
    plan, manifest = made(tmp_path, 3)
    family, cache = Sociable(), Cache(Path(plan.cache_folder))
    encode = family.encode_pixels

    def broken(vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        found = encode(vae, pixels)
        if len(pixels) == 3 and pixels.shape[-1] == pixels.shape[-2]:
            found["mean"][1, 0, 0, 0] = torch.inf
        return found

    family.encode_pixels = broken  # type: ignore[method-assign]
    with pytest.raises(NotFinite, match=r"of `?.*01\.png`? is no finite number"):
        fill_latents(plan, manifest, family, cache, Silent())
    found = dict(zip((s.key for s in manifest), entries(plan, manifest, family), strict=True))
    assert found["00.png"] is not None and found["01.png"] is None and found["02.png"] is None


def test_masks_are_each_picture_s_own(tmp_path: Path) -> None:
    """Those of a batch are those that each has alone."""
    found: list[list[ENTRY | None]] = []
    for size in (1, 3):
        plan, manifest, _, cache = test_masks.set_up(
            tmp_path, Mask(kind="file", folder="", floor=0.1)
        )
        plan, family = evolve(plan, vae_batch=size), Sociable()
        fill_latents(plan, manifest, family, cache, Silent())
        assert max(count for count, *_ in family.batches) == size
        found.append(entries(plan, manifest, family))
    masks = [[entry and entry.get(NAME) for entry in each] for each in found]
    shown = [(a, b) for a, b in zip(*masks, strict=True) if a is not None and b is not None]
    assert len(shown) == sum(mask is not None for mask in masks[0]) >= 4
    assert all(torch.equal(a, b) for a, b in shown)


def test_cuts_are_each_picture_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each picture's focus was found is cached with it, be it the first of its batch or
    not."""
    plan, manifest = made(tmp_path, 3)
    real, at = decode.decode_placed, {}

    def looked(data: bytes, placement: Placement, size: tuple[int, int]) -> Any:
        pixels, placed = real(data, placement, size)
        at[data] = (len(data) % 50, len(at))
        return pixels, evolve(placed, focus="face", crop_x=at[data][0], crop_y=at[data][1])

    monkeypatch.setattr(decode, "decode_placed", looked)
    family = Sociable()
    fill_latents(plan, manifest, family, Cache(Path(plan.cache_folder)), Silent())
    for row, entry in enumerate(entries(plan, manifest, family)):
        data = Path(manifest.path(row)).read_bytes()
        assert entry is not None and tuple(entry[OFFSET].tolist()) == at[data]


def test_pictures_are_decoded_a_batch_ahead(tmp_path: Path) -> None:
    """While one batch is encoded the next one is being decoded, whatever its size."""
    plan, manifest = made(tmp_path, 64)
    cache = Cache(Path(plan.cache_folder))
    names = sample_keys(plan, manifest, Sociable(), cache)  # type: ignore[arg-type]
    asked: list[int] = []

    def rows() -> Any:
        for row in range(7):
            asked.append(row)
            yield row

    given = keys.latent_keys(plan, Sociable(), cache)  # type: ignore[arg-type]
    for size, ahead in ((1, 3), (3, 5)):
        asked.clear()
        pictures = decode.decoded(rows(), evolve(plan, vae_batch=size), manifest, names, given)
        next(pictures)
        assert len(asked) == ahead, "three of the one worker, and the rest of a batch"
        pictures.close()  # type: ignore[attr-defined]


def test_the_key_says_how_many_are_encoded_together() -> None:
    """One at a time has the keys that it had before there was a choice."""
    placed = Placement(resize_width=80, resize_height=64, crop_x=8, crop_y=0, width=64, height=64)

    def base(together: int) -> str:
        plan: Any = SimpleNamespace(precision=SimpleNamespace(cache="bfloat16"), vae_batch=together)
        return keys._latent_keys(plan, "sana", [["vae", "float32", "00ff"]]).base

    assert base(1) == "6bef86e16d4acf46837498e2eca138df62a36b1322ab019e75a8167be89d4a8f"
    first = keys.LatentKeys(base(1)).key(bytes(range(32)), placed)
    assert first.hex() == "222344011cb24d6aa580e61274e0754d2509b46c88255fd76f5cb531167abe0f"
    assert len({base(together) for together in range(1, 65)}) == 64


def test_texts_do_not_depend_on_it(tmp_path: Path) -> None:
    plan, _ = made(tmp_path, 1)
    family, cache = Sociable(), Cache(Path(plan.cache_folder))
    both = [
        (keys.text_keys(each, family, cache).base, keys.latent_keys(each, family, cache).base)  # type: ignore[arg-type]
        for each in (plan, evolve(plan, vae_batch=2))
    ]
    assert both[0][0] == both[1][0] and both[0][1] != both[1][1]


def sample(number: int, source: int, width: int) -> Sample:
    placed = Placement(
        resize_width=width, resize_height=64, crop_x=0, crop_y=0, width=width, height=64
    )
    return Sample(
        source=source, key=f"{number:03}.png", bytes=1, width=width, height=64, placement=placed,
        captions=("",),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([64, 96]), st.integers(0, 9)), max_size=30
    ),
    st.integers(1, 8),
    st.data(),
)
def test_every_key_is_in_one_batch(
    drawn: list[tuple[int, int, int]], size: int, data: st.DataObject
) -> None:
    """Against lists of rows: each key once, where it comes first; of one bucket, in order."""
    samples = [sample(n, source, width) for n, (source, width, _) in enumerate(drawn)]
    manifest = Manifest([Folder(id=i, path=f"/{i}") for i in "ab"], samples)
    contents = {f"{n:03}.png": (width, content) for n, (_, width, content) in enumerate(drawn)}
    names = [repr(contents[manifest[row].key]).encode().ljust(32) for row in range(len(manifest))]
    found = vae_batches(manifest, Keys.of(names), size)
    expected: list[list[int]] = []
    seen: set[bytes] = set()
    for members in manifest.buckets:
        rows = [r for n, r in enumerate(members.samples) if names[r] not in seen]
        rows = [r for n, r in enumerate(rows) if names[r] not in {names[o] for o in rows[:n]}]
        seen |= {names[r] for r in rows}
        expected += [rows[at : at + size] for at in range(0, len(rows), size)]
    assert [found[n].tolist() for n in range(len(found))] == expected
    lacking = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(drawn), max_size=len(drawn))), bool
    )
    unfinished = [n for n, rows in enumerate(expected) if any(lacking[r] for r in rows)]
    assert found.unfinished(lacking).tolist() == unfinished
