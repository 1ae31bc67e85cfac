"""Masks from files to the loss, against sums in float64."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from compiler.data.geometry import Placement
from compiler.data.manifest import Manifest
from compiler.families import FAMILIES
from compiler.plan import DataSource, Mask, Plan
from runtime.batch import Batch, masked
from runtime.data.cache import Cache
from runtime.data.feed import Feed
from runtime.data.fill import BrokenData, fill_latents, fill_text
from runtime.data.located import sample_keys
from runtime.data.masks import alpha_mask, file_mask, pooled
from runtime.data.pixels import BrokenPicture
from runtime.events import Silent
from runtime.objective import per_sample_loss, place_weights
from tests.compiler.data.pictures import encoded
from tests.runtime.data.fakes import FakeFamily, fake_base
from tests.runtime.plans import draw_data, source_of, tiny_plan
from tests.runtime.test_objective import BASE
from tests.runtime.tiny import make_tiny

CPU = torch.device("cpu")


Box = tuple[Fraction, Fraction, Fraction, Fraction]


def area_mean(mask: np.ndarray[Any, Any], box: Box) -> float:
    """The mean of a picture over a box (left, upper, right, lower) with any edges, by hand."""
    left, upper, right, lower = box

    def shares(start: Fraction, end: Fraction, count: int) -> np.ndarray[Any, Any]:
        return np.array(
            [float(max(Fraction(0), min(end, n + 1) - max(start, n))) for n in range(count)]
        )

    rows, columns = shares(upper, lower, mask.shape[0]), shares(left, right, mask.shape[1])
    return float(rows @ mask @ columns / (rows.sum() * columns.sum()))


@pytest.mark.parametrize("mirrored", [False, True])
def test_shares_are_areas(mirrored: bool) -> None:
    """A picture of 96 x 64 scaled to 48 x 32, of which 32 x 32 are cut at x = 5."""
    values = np.random.default_rng(0).integers(0, 256, (64, 96)).astype(np.uint8)
    placed = Placement(
        resize_width=48, resize_height=32, crop_x=5, crop_y=0, width=32, height=32,
        mirrored=mirrored,
    )  # fmt: skip
    found = pooled(file_mask(encoded(Image.fromarray(values), "PNG"), placed, (96, 64)), 4, 4)
    for y in range(4):
        for x in range(4):
            left = Fraction(2 * (5 + 8 * (3 - x if mirrored else x)))
            box = (left, Fraction(16 * y), left + 16, Fraction(16 * y + 16))
            expected = area_mean(values / 255.0, box)
            assert found[y, x].item() == pytest.approx(expected, abs=1e-5)


def test_what_counts_as_shown() -> None:
    placed = Placement(resize_width=16, resize_height=16, crop_x=0, crop_y=0, width=16, height=16)
    clear = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 8, 16))
    left_opaque = alpha_mask(encoded(clear, "PNG"), placed)
    assert left_opaque[:, :8].min() == 1 and left_opaque[:, 8:].max() == 0
    assert file_mask(encoded(clear, "PNG"), placed, (16, 16)).max() == 0  # black, and transparent
    assert alpha_mask(encoded(Image.new("RGB", (16, 16)), "JPEG"), placed).min() == 1
    deep = Image.fromarray(np.full((16, 16), 32_896, np.uint16))
    assert file_mask(encoded(deep, "PNG"), placed, (16, 16))[0, 0] == np.float32(128 / 255)
    with pytest.raises(BrokenPicture, match="its mask has 16x16 pixels, not 16x17"):
        file_mask(encoded(clear, "PNG"), placed, (16, 17))
    with pytest.raises(BrokenPicture, match="its mask can't be decoded"):
        file_mask(b"rubbish", placed, (16, 16))


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0, 0.99),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from(["none", "diffusers-compat"]),
)
def test_the_masked_loss_in_float64(
    floor: float, seed: int, weighted: bool, weighting: Any
) -> None:
    """sum(w e) / sum(w) with w = floor + (1 - floor) m, e the mean over channels."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    latents, noise, prediction = (draw(3, 4, 6, 5) for _ in range(3))
    shown = (torch.rand(3, 6, 5, generator=generator) > 0.6).float()
    shown[:, 0, 0] = 0.5
    weights = torch.tensor([0.5, 1.0, 2.0]) if weighted else None
    sigmas = torch.tensor([0.001, 0.6, 1.0])
    batch = Batch(
        latents=latents, noise=noise, sigmas=sigmas, text={}, weights=weights,
        mask=place_weights(shown, floor),
    )  # fmt: skip
    found = per_sample_loss(prediction, batch, evolve(BASE, weighting=weighting))
    error = ((prediction - (noise - latents)).double() ** 2).mean(1)
    if weighting == "diffusers-compat":
        error = error * sigmas.double()[:, None, None] ** 2
    places = floor + (1 - floor) * shown.double()
    expected = (places * error).sum((1, 2)) / places.sum((1, 2))
    if weights is not None:
        expected = expected * weights.double()
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-9)


def test_a_mask_that_shows_all_changes_no_bit() -> None:
    torch.manual_seed(0)
    batch = Batch(
        latents=torch.randn(2, 4, 8, 8), noise=torch.randn(2, 4, 8, 8),
        sigmas=torch.tensor([0.2, 0.8]), text={},
    )  # fmt: skip
    prediction = torch.randn(2, 4, 8, 8)
    plain = per_sample_loss(prediction, batch, BASE)
    whole = masked(batch)
    assert whole.mask is not None and torch.equal(whole.mask, place_weights(whole.mask[:, 0], 0.3))
    assert torch.equal(plain, per_sample_loss(prediction, whole, BASE))
    (first, second) = whole.parts(1)
    assert first.mask is not None and first.mask.shape == second.mask.shape == (1, 1, 8, 8)  # type: ignore[union-attr]


def set_up(tmp_path: Path, rules: Mask) -> tuple[Plan, Manifest, FakeFamily, Cache]:
    """Eight pictures of which one source has masks, four without."""
    base = tmp_path.parent / "sana-base"
    if not base.exists():
        make_tiny("sana", base)
    if not (tmp_path / "dogs").exists():
        draw_data(tmp_path / "dogs", [(70, 70)] * 3 + [(128, 64)])
        draw_data(tmp_path / "cats", [(64, 64)] * 4)
        (tmp_path / "masks").mkdir()
        for number, size in enumerate([(70, 70)] * 3 + [(128, 64)]):
            half = Image.new("L", size)
            half.paste(255, (0, 0, size[0] // 2, size[1]))
            half.save(tmp_path / "masks" / f"0{number}.png")
    rules = evolve(rules, folder=str(tmp_path / "masks") if rules.kind == "file" else "")
    sources: list[DataSource] = [
        evolve(source_of(tmp_path / "dogs", prompt="a dog"), mask=rules),
        source_of(tmp_path / "cats", prompt="a cat"),
    ]
    plan, manifest = tiny_plan("sana", base, sources, tmp_path / "run", steps=8, accumulate=2)
    given = [
        evolve(s, mask=s.key if s.source == 0 and (tmp_path / "masks" / s.key).exists() else "")
        for s in manifest
    ]
    if rules.kind == "file":
        manifest = Manifest(manifest.folders, given)
    family, cache = FakeFamily(FAMILIES["sana"]), Cache(Path(plan.cache_folder))
    return fake_base(plan, tmp_path / "fake"), manifest, family, cache


def test_from_files_to_batches(tmp_path: Path) -> None:
    plan, manifest, family, cache = set_up(tmp_path, Mask(kind="file", floor=0.2))
    fill_text(plan, manifest, family, cache, Silent())
    fill_latents(plan, manifest, family, cache, Silent())
    seen = {"dogs": 0, "cats": 0}
    for window in Feed(plan, manifest, family, cache, CPU).windows(0):
        names = iter(window.names)
        for batch in window.batches:
            (source,) = {next(names).split("/")[0] for _ in batch.latents}
            seen[source] += 1
            if source == "cats":
                assert batch.mask is None
                continue
            assert batch.mask is not None and batch.mask.dtype == torch.float32
            assert batch.mask.shape == (len(batch.latents), 1, *batch.latents.shape[2:])
            torch.testing.assert_close(batch.mask.mean((1, 2, 3)), torch.ones(len(batch.latents)))
            ratio = batch.mask[..., 0] / batch.mask[..., -1]
            torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / 0.2))
    assert min(seen.values()) > 0


def test_keys_follow_masks(tmp_path: Path) -> None:
    plan, manifest, family, cache = set_up(tmp_path, Mask(kind="file", floor=0.2))
    fill_latents(plan, manifest, family, cache, Silent())
    assert family.pictures == 8
    other = evolve(plan, sources=tuple(
        evolve(s, mask=evolve(s.mask, floor=0.5) if s.mask else None) for s in plan.sources
    ))  # fmt: skip
    fill_latents(other, manifest, family, cache, Silent())
    assert family.pictures == 8  # the floor is no part of what is cached
    Image.new("L", (70, 70), 9).save(tmp_path / "masks" / "01.png")
    fill_latents(plan, manifest, family, cache, Silent())
    assert family.pictures == 9
    bare = Manifest(manifest.folders, [evolve(s, mask="") for s in manifest])
    fill_latents(plan, bare, family, cache, Silent())
    assert family.pictures == 13  # whole pictures of a source with masks
    for rules, count in ((Mask(kind="alpha", floor=0.0), 17), (None, 21)):
        sources = (evolve(plan.sources[0], mask=rules), plan.sources[1])
        fill_latents(evolve(plan, sources=sources), bare, family, cache, Silent())
        assert family.pictures == count
    keys = sample_keys(plan, bare, family, cache)
    torch.testing.assert_close(cache.get(keys[0])["mask"], torch.ones(8, 8))


def test_a_mask_that_shows_nothing_is_named(tmp_path: Path) -> None:
    plan, manifest, family, cache = set_up(tmp_path, Mask(kind="file", floor=0.0))
    Image.new("L", (70, 70)).save(tmp_path / "masks" / "01.png")
    (tmp_path / "masks" / "02.png").write_bytes(b"rubbish")
    with pytest.raises(BrokenData, match="2 pictures can't be used") as caught:
        fill_latents(plan, manifest, family, cache, Silent())
    assert "shows nothing" in caught.value.message and "floor" in caught.value.help
    assert not (Path(os.environ["XDG_CACHE_HOME"]) / "tuner" / "headers.sqlite").exists()
