"""How one source's pictures are cut, and what of that the recipe leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

from compiler import plan
from compiler.data.geometry import MAX_ASPECT, ratio
from compiler.draft import Draft
from compiler.machine import OPENCV
from compiler.passes.inherited import Effects, inherited, own_or_data, path_of
from compiler.schema import SourceRecipe
from compiler.spans import KeyPath

FIELD_MULTIPLE = 64  # pixels; what the field's buckets are cut to, so that they stay few
LARGE = 512  # pixels; from here on a step of 64 is fine enough


def resolve_geometries(
    draft: Draft, where: KeyPath, recipe: SourceRecipe, effects: Effects
) -> list[plan.Geometry] | None:
    """One geometry for each resolution of a source; None after an error."""
    kind = own_or_data(draft, where, "resolution_type")
    resolutions = _resolutions(draft, where, recipe, kind)
    aspect = inherited(draft, where, "crop", "aspect")
    buckets = _buckets(draft, where, aspect, effects)
    resize = inherited(draft, where, "crop", "resize")
    max_size = own_or_data(draft, where, "max_size")
    effects.note(
        draft,
        where,
        "max_size",
        used=resize == "none" or max_size == 0,
        why='each image is scaled to its bucket anyway; it is for `resize = "none"`',
        help='crop = { resize = "none" }',
    )
    style = inherited(draft, where, "crop", "style")
    if style in ("face", "saliency") and OPENCV in draft.machine.missing:
        draft.warn(
            "missing-package",
            path_of(draft, where, "crop", "style"),
            f"a {style} crop needs the package {OPENCV}, which is not installed here",
            help='pip install "tuner[crop]"',
        )
    if resolutions is None or buckets is None:
        return None
    return [
        plan.Geometry(
            resolution=resolution,
            resolution_type=kind,
            aspect=aspect,
            crop=style,
            multiple=_multiple(draft, _edge(resolution, kind)),
            buckets=buckets,
            resize=resize,
            max_size=max_size if resize == "none" else 0,
            upscale=own_or_data(draft, where, "upscale"),
            flip=own_or_data(draft, where, "flip"),
        )
        for resolution in resolutions
    ]


def _edge(resolution: float, kind: str) -> float:
    """Pixels: the edge, or the root of the area."""
    return (resolution * 1e6) ** 0.5 if kind == "area" else resolution


def _resolutions(
    draft: Draft, where: KeyPath, recipe: SourceRecipe, kind: str
) -> list[float] | None:
    asked = draft.recipe.data.resolution if recipe.resolution is None else recipe.resolution
    path = (*where, "resolution") if recipe.resolution is not None else ("data", "resolution")
    if asked == "auto":
        assert draft.model is not None
        native = float(draft.model.native_resolution)
        value = native**2 / 1e6 if kind == "area" else native
        draft.decide(path, value, by="the base", why="the size it was made for")
        return [value] if _possible(draft, path, value, kind) else None
    values = [float(one) for one in (asked if isinstance(asked, tuple) else (asked,))]
    if not values:
        draft.error("out-of-range", path, "an empty list of resolutions", help=f"{path[-1]} = 1024")
        return None
    if len(set(values)) < len(values):
        draft.error(
            "conflict",
            path,
            "one resolution stands twice",
            help=f"{path[-1]} = {_spelled(list(dict.fromkeys(values)))}; for more passes over the "
            "images there is `repeats`",
        )
        return None
    possible = [_possible(draft, path, value, kind) for value in values]  # each says what is wrong
    if not all(possible):
        return None
    draft.decide(path, tuple(values) if isinstance(asked, tuple) else values[0])
    return values


def _spelled(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def _possible(draft: Draft, path: KeyPath, value: float, kind: str) -> bool:
    assert draft.model is not None
    least = draft.model.family.multiple(draft.model.configs)
    edge = _edge(value, kind)
    if kind == "area" and value > 64:
        draft.error(
            "out-of-range",
            path,
            f"{value:g} megapixels is out of range",
            help='for an edge length in pixels say resolution_type = "pixel_area"',
        )
        return False
    if edge < least or edge > 8192:
        draft.error(
            "out-of-range",
            path,
            f"a resolution of {edge:g} pixels is out of range",
            label=f"{least} to 8192 pixels",
            help='for megapixels say resolution_type = "area"' if edge < least else "",
        )
        return False
    return True


def _buckets(draft: Draft, where: KeyPath, aspect: str, effects: Effects) -> tuple[str, ...] | None:
    """The ratios to choose from; () where none are needed, None after an error."""
    listed: tuple[str, ...] = inherited(draft, where, "crop", "buckets")
    path = path_of(draft, where, "crop", "buckets")
    needed = aspect in ("closest", "random")
    why = f'it is for aspect "closest" and "random"; this one is "{aspect}"'
    help = 'aspect = "closest"'
    effects.note(draft, where, "crop", "buckets", used=needed, why=why, help=help)
    if not needed:
        return ()
    if not listed:
        draft.error(
            "missing-key",
            path_of(draft, where, "crop", "aspect"),
            f'`aspect = "{aspect}"` needs a list of `buckets`',
            help=f'crop = {{ aspect = "{aspect}", buckets = ["1:1", "4:3", "3:4"] }}',
        )
        return None
    wrong = [text for text in listed if ratio(text) is None]
    if wrong:
        draft.error(
            "bad-ratio",
            (*path, listed.index(wrong[0])),
            f"`{wrong[0]}` is no aspect ratio of a bucket",
            label=f"width and height as whole numbers, at most {MAX_ASPECT}:1",
            help='buckets = ["1:1", "4:3", "3:4"]; their size follows from `resolution`',
        )
        return None
    return listed


def _multiple(draft: Draft, edge: float) -> int:
    assert draft.model is not None
    least = draft.model.family.multiple(draft.model.configs)
    asked, where = draft.recipe.data.multiple, ("data", "multiple")
    if asked == "auto":
        value = lcm(least, FIELD_MULTIPLE) if edge >= LARGE else least
        why = f"the model needs multiples of {least}"
        if value != least:
            why += f"; {FIELD_MULTIPLE} keeps the buckets few"
        draft.decide(where, value, by="decided", why=why)
        return value
    if asked % least:
        if not any(d.path == "data.multiple" for d in draft.diagnostics):
            draft.error(
                "bad-multiple",
                where,
                f"{asked} does not fit this model: bucket edges must be multiples of {least}",
                help=f"multiple = {max(1, round(asked / least)) * least}",
            )
        return least
    draft.decide(where, asked)
    return asked
