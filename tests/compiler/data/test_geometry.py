"""Geometry: exact on known sizes, and its promises on any size."""

from __future__ import annotations

import itertools
import math
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.data.geometry import (
    Placement,
    Shown,
    cover,
    enlarged,
    place,
    ratio,
    shown_to_model,
    unusable,
)
from compiler.plan import Geometry


def geometry(**changes: Any) -> Geometry:
    values: dict[str, Any] = {
        "resolution": 1024.0,
        "resolution_type": "pixel_area",
        "aspect": "preserve",
        "crop": "center",
        "multiple": 64,
    }
    return Geometry(**(values | changes))


def bucket(placement: Placement) -> tuple[int, int]:
    return placement.width, placement.height


@pytest.mark.parametrize(
    ("size", "changes", "expected"),
    [
        ((1536, 1024), {}, (1280, 832)),  # 1254.1 x 836.1
        ((1024, 1536), {}, (832, 1280)),
        ((1920, 1080), {}, (1344, 768)),  # 1365.3 x 768
        ((3000, 3000), {}, (1024, 1024)),
        ((10, 10), {}, (1024, 1024)),
        ((1536, 1024), {"resolution_type": "pixel"}, (1536, 1024)),
        ((1536, 1024), {"resolution_type": "pixel", "aspect": "square"}, (1024, 1024)),
        ((2000, 1000), {"resolution_type": "pixel", "resolution": 540.0}, (1024, 512)),
        ((1000, 1000), {"resolution_type": "area", "resolution": 0.5, "multiple": 8}, (704, 704)),
        ((1000, 1000), {"resolution_type": "area", "resolution": 0.25, "multiple": 4}, (500, 500)),
        ((1000, 1000), {"resolution_type": "area", "resolution": 1.0, "multiple": 1}, (1000, 1000)),
        ((1600, 100), {"resolution": 64.0, "multiple": 32}, (128, 32)),  # the area, not the aspect
        ((500, 400), {"resolution": 3.0, "resolution_type": "pixel"}, (64, 64)),
    ],
)
def test_known_buckets(
    size: tuple[int, int], changes: dict[str, Any], expected: tuple[int, int]
) -> None:
    assert bucket(place(*size, geometry(**changes))) == expected


def test_cuts() -> None:
    cut = {
        style: place(1001, 600, geometry(resolution=512.0, aspect="square", crop=style))
        for style in ("center", "corner")
    }
    assert cut["center"] == Placement(
        resize_width=854, resize_height=512, crop_x=171, crop_y=0, width=512, height=512
    )
    assert (cut["corner"].crop_x, cut["corner"].crop_y) == (342, 0)


def test_random_cut_follows_seed_and_key_only() -> None:
    settings = geometry(resolution=256.0, aspect="square", crop="random")
    cuts = {(s, k): place(4096, 256, settings, seed=s, key=k) for s in range(3) for k in "abc"}
    assert len({c.crop_x for c in cuts.values()}) > 6
    assert cuts == {(s, k): place(4096, 256, settings, seed=s, key=k) for s, k in cuts}
    offsets = [place(4096, 256, settings, key=str(i)).crop_x for i in range(2000)]
    assert min(offsets) < 20 and max(offsets) > 3820
    assert abs(sum(offsets) / len(offsets) - 1920) < 4 * 3840 / math.sqrt(12 * 2000)
    assert place(300, 200, settings, key="a\udcff").width == 256  # a name that is not UTF-8


def test_elongated_pictures_are_refused() -> None:
    assert unusable(1, 17) == "1x17 pixels are more elongated than 16:1"
    assert unusable(160, 10) == ""
    with pytest.raises(ValueError, match="more elongated"):
        place(1, 1000, geometry())


def test_half_a_megapixel_is_half_a_megapixel() -> None:
    """In multiples of 64 too: no rounding up to 0.59."""
    for size in ((1000, 1000), (1500, 1000), (1600, 900), (700, 2000)):
        placed = place(*size, geometry(resolution=0.5, resolution_type="area"))
        assert 0.46 < placed.width * placed.height / 1e6 < 0.55


LISTED = ("1:1", "3:2", "2:3", "16:9")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 100), (64, 64)),
        ((122, 100), (64, 64)),  # 1.22 < sqrt(1.5) = 1.2247...
        ((123, 100), (96, 64)),
        ((100, 123), (64, 96)),
        ((1500, 100), (128, 64)),
        ((100, 1500), (64, 96)),  # there is nothing more upright in the list
    ],
)
def test_closest_is_nearest_by_ratio(size: tuple[int, int], expected: tuple[int, int]) -> None:
    rule = geometry(
        aspect="closest", buckets=LISTED, resolution=64.0, resolution_type="pixel", multiple=32
    )
    assert bucket(place(*size, rule)) == expected


def test_of_two_equally_near_ratios_the_first_counts() -> None:
    for buckets, expected in ((("2:1", "1:2"), (96, 64)), (("1:2", "2:1"), (64, 96))):
        rule = geometry(aspect="closest", buckets=buckets, resolution=64.0, multiple=32)
        chosen = bucket(place(500, 500, rule))
        assert (chosen[0] > chosen[1]) == (expected[0] > expected[1])


def test_random_aspects_follow_seed_and_key_and_are_even() -> None:
    rule = geometry(
        aspect="random", buckets=LISTED, resolution=64.0, resolution_type="pixel", multiple=32
    )
    keys = [str(number) for number in range(2000)]
    chosen = [bucket(place(640, 480, rule, seed=3, key=key)) for key in keys]
    counts = {shape: chosen.count(shape) for shape in set(chosen)}
    assert set(counts) == {(64, 64), (96, 64), (64, 96), (128, 64)}
    assert all(abs(count - 500) < 5 * math.sqrt(375) for count in counts.values())
    assert chosen == [bucket(place(999, 1999, rule, seed=3, key=key)) for key in keys]
    assert chosen != [bucket(place(640, 480, rule, seed=4, key=key)) for key in keys]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3:2", (3, 2)),
        ("16:1", (16, 1)),
        ("1:16", (1, 16)),
        ("17:1", None),
        ("0:1", None),
        ("3:0", None),
        ("3", None),
        ("3:2:1", None),
        ("3x2", None),
        ("-3:2", None),
        ("1.5:1", None),
        ("\u0663:2", None),
        ("999999999999:1", None),
        ("", None),
        (":", None),
    ],
)
def test_ratios(text: str, expected: tuple[int, int] | None) -> None:
    assert ratio(text) == expected


@pytest.mark.parametrize(
    ("size", "max_size", "resized"),
    [
        ((300, 200), 0, (300, 200)),  # as it is
        ((300, 200), 200, (300, 200)),
        ((300, 200), 4000, (300, 200)),  # never up
        ((300, 200), 150, (225, 150)),
        ((200, 301), 150, (150, 226)),
        ((300, 200), 100, (150, 100)),
        ((300, 200), 10, (96, 64)),  # not below what covers the bucket
        ((300, 64), 10, (300, 64)),
    ],
)
def test_cut_from_the_picture_at_its_own_size(
    size: tuple[int, int], max_size: int, resized: tuple[int, int]
) -> None:
    rule = geometry(resolution=64.0, aspect="square", resize="none", max_size=max_size, multiple=32)
    placed = place(*size, rule)
    assert (placed.resize_width, placed.resize_height) == resized
    assert bucket(placed) == (64, 64) and not enlarged(*size, placed)
    assert placed.crop_x == (resized[0] - 64) // 2 and placed.crop_y == (resized[1] - 64) // 2


def test_a_picture_below_its_bucket_is_enlarged_and_says_so() -> None:
    for resize in ("cover", "none"):
        placed = place(63, 200, geometry(resolution=64.0, aspect="square", resize=resize))
        assert (placed.resize_width, placed.resize_height) == (64, 203)
        assert enlarged(63, 200, placed)
        assert not enlarged(64, 200, place(64, 200, geometry(resolution=64.0, aspect="square")))


def test_a_focus_is_looked_for_only_where_there_is_a_choice() -> None:
    for crop in ("face", "saliency"):
        rule = geometry(resolution=64.0, aspect="square", crop=crop)
        middle = place(200, 100, geometry(resolution=64.0, aspect="square"))
        found = place(200, 100, rule)
        assert found.focus == crop and found.crop_x == middle.crop_x == 32
        assert place(100, 100, rule).focus == ""


def test_what_sdxl_is_told() -> None:
    """Cut a marked pixel out by hand and find it where the numbers say."""
    placed = place(200, 100, geometry(resolution=64.0, aspect="square", crop="corner"))
    assert shown_to_model(200, 100, placed) == Shown(
        original_width=200, original_height=100, crop_x=64, crop_y=0, width=64, height=64
    )
    mirrored = attrs.evolve(placed, mirrored=True)
    # the right half of the picture is the left half of its mirror image
    assert shown_to_model(200, 100, mirrored).crop_x == 0
    assert shown_to_model(200, 100, placed, (10, 0)).crop_x == 10
    assert shown_to_model(200, 100, mirrored, (10, 0)).crop_x == 54


settings = st.builds(
    geometry,
    resolution=st.floats(32, 4096).map(lambda x: round(x, 2)),
    resolution_type=st.sampled_from(["pixel", "pixel_area"]),
    aspect=st.sampled_from(["square", "preserve"]),
    crop=st.sampled_from(["center", "corner", "random"]),
    multiple=st.sampled_from([1, 8, 16, 32, 64]),
) | st.builds(
    geometry,
    resolution=st.floats(0.01, 8.0).map(lambda x: round(x, 4)),
    resolution_type=st.just("area"),
    aspect=st.sampled_from(["square", "preserve"]),
    multiple=st.sampled_from([8, 16, 32, 64]),
)
free = st.builds(
    geometry,
    resolution=st.floats(32, 2048).map(lambda x: round(x, 2)),
    resolution_type=st.sampled_from(["pixel", "pixel_area"]),
    aspect=st.sampled_from(["square", "preserve", "closest", "random"]),
    buckets=st.just(LISTED),
    crop=st.sampled_from(["center", "corner", "random", "face"]),
    multiple=st.sampled_from([8, 32, 64]),
    resize=st.just("none"),
    max_size=st.integers(0, 3000),
)
sizes = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)).filter(lambda s: not unusable(*s))


@given(sizes, settings, st.integers(0, 5), st.text(max_size=5))
def test_covers_cuts_inside_and_does_not_distort(
    size: tuple[int, int], settings: Geometry, seed: int, key: str
) -> None:
    width, height = size
    placed = place(width, height, settings, seed=seed, key=key)
    assert placed == place(width, height, settings, seed=seed, key=key)
    assert placed.width % settings.multiple == placed.height % settings.multiple == 0
    assert placed.width >= settings.multiple and placed.height >= settings.multiple
    assert 0 <= placed.crop_x <= placed.resize_width - placed.width
    assert 0 <= placed.crop_y <= placed.resize_height - placed.height
    scale = max(placed.width / width, placed.height / height)
    assert abs(placed.resize_width - scale * width) <= 0.5 + 1e-6
    assert abs(placed.resize_height - scale * height) <= 0.5 + 1e-6
    assert placed.resize_width == placed.width or placed.resize_height == placed.height


@given(sizes, free, st.integers(0, 5), st.text(max_size=5))
def test_own_size_never_enlarges_and_never_falls_short(
    size: tuple[int, int], settings: Geometry, seed: int, key: str
) -> None:
    width, height = size
    placed = place(width, height, settings, seed=seed, key=key)
    resized = (placed.resize_width, placed.resize_height)
    assert 0 <= placed.crop_x <= resized[0] - placed.width
    assert 0 <= placed.crop_y <= resized[1] - placed.height
    covering = cover(width, height, placed.width, placed.height)
    if covering[0] > width or covering[1] > height:
        assert resized == covering and enlarged(width, height, placed)
        return
    assert resized[0] <= width and resized[1] <= height and not enlarged(width, height, placed)
    assert resized[0] >= covering[0] and resized[1] >= covering[1]
    if resized != covering and settings.max_size:
        assert min(resized) == min(width, height, settings.max_size)
    if not settings.max_size:
        assert resized in (size, covering)
    scales = resized[0] / width, resized[1] / height
    assert abs(scales[0] * height - resized[1]) <= 0.5 + 0.5 * height / width + 1e-6


def wanted(size: tuple[int, int], settings: Geometry) -> tuple[float, float]:
    """(area, aspect) in floating point, independently of the code under test."""
    aspect = 1.0 if settings.aspect == "square" else size[0] / size[1]
    scale = 1e6 if settings.resolution_type == "area" else settings.resolution
    return settings.resolution * scale, aspect


@given(sizes, settings.filter(lambda g: g.resolution_type != "pixel"))
def test_no_other_bucket_is_nearer(size: tuple[int, int], settings: Geometry) -> None:
    """Brute force over the neighbours: none has a smaller error of area and aspect."""
    area, aspect = wanted(size, settings)
    chosen = bucket(place(*size, settings))
    step = settings.multiple

    def error(edges: tuple[int, int]) -> float:
        return math.hypot(
            math.log(edges[0] * edges[1] / area), math.log(edges[0] / edges[1] / aspect)
        )

    if math.sqrt(area / max(aspect, 1 / aspect)) >= step:
        around = itertools.product(*([e - step, e, e + step] for e in chosen))
        best = min(error(edges) for edges in around if min(edges) > 0)
        assert error(chosen) <= best + 1e-9


@given(sizes, settings.filter(lambda g: g.resolution_type != "pixel"))
def test_area_is_met_within_the_rounding_of_two_edges(
    size: tuple[int, int], settings: Geometry
) -> None:
    area, _ = wanted(size, settings)
    if area < settings.multiple**2:
        return
    chosen = bucket(place(*size, settings))
    low = high = 1.0
    for edge in chosen:  # an edge of k steps stands for sqrt((k-1)k) to sqrt(k(k+1)) steps
        count = edge // settings.multiple
        low *= math.sqrt(count / (count + 1))
        high *= math.sqrt(count / (count - 1)) if count > 1 else math.sqrt(2.0)
    assert low - 1e-9 <= chosen[0] * chosen[1] / area <= high + 1e-9


@given(sizes, settings.filter(lambda g: g.resolution_type == "pixel"))
def test_pixel_meets_the_shorter_edge_then_the_aspect(
    size: tuple[int, int], settings: Geometry
) -> None:
    placed = place(*size, settings)
    step = settings.multiple
    short, long = sorted(bucket(placed))
    count = short // step
    assert step * math.sqrt(max(0, (count - 1) * count)) - 1e-6 <= max(settings.resolution, step)
    assert settings.resolution <= step * math.sqrt(count * (count + 1)) + 1e-6
    aspect = 1.0 if settings.aspect == "square" else max(size) / min(size)
    around = (round(short * aspect / step) * step + shift for shift in (-step, 0, step))
    best = min(abs(math.log(e / (short * aspect))) for e in around if e > 0)
    assert abs(math.log(long / (short * aspect))) <= best + 1e-9
