"""Which pictures of a source are used, and where each of them goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import evolve, frozen

from compiler import plan
from compiler.data.geometry import Placement, enlarged, place, unusable
from compiler.data.manifest import Sample
from compiler.data.scan import Fault, Picture, Scan
from compiler.draft import Draft
from compiler.passes.captions import LISTED, listed
from compiler.passes.inherited import own_or_data, path_of
from compiler.schema import SourceRecipe
from compiler.spans import KeyPath

BLURRED = 1.1  # enlarged by more than this, a picture is worth a warning

Told = tuple[Picture, tuple[str, ...]]
"""A picture and what it may be told."""


@frozen(kw_only=True)
class Skip:
    """Pictures of one source that are left out, for one reason."""

    names: tuple[str, ...]
    why: str

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.names)


def usable(
    draft: Draft, where: KeyPath, recipe: SourceRecipe, found: Scan, broken: str
) -> tuple[list[Picture], list[Skip]]:
    """Pictures that are whole, large enough and of an allowed shape."""
    odd = [
        Fault(path=p.key, why=why) for p in found.pictures if (why := unusable(p.width, p.height))
    ]
    faults = [*found.faults, *odd]
    if faults:
        _report_faults(draft, where, recipe, faults, broken)
    reasons: dict[str, list[str]] = {}
    for fault in faults:
        reasons.setdefault(fault.why, []).append(fault.path)
    skips = [Skip(names=tuple(names), why=why) for why, names in reasons.items()]
    pictures = [p for p in found.pictures if not unusable(p.width, p.height)]
    least = own_or_data(draft, where, "min_size")
    for code, why, fits in (
        ("too-small", f"an edge below {least} pixels", lambda p: min(p.width, p.height) >= least),
        *_aspects(draft, where),
    ):
        pictures, left = _parted(pictures, fits)
        if left:
            _report_skipped(draft, where, recipe, code, why, left, len(pictures) + len(left))
            skips.append(Skip(names=tuple(p.key for p in left), why=why))
    return pictures, skips


def _aspects(draft: Draft, where: KeyPath) -> list[tuple[str, str, Callable[[Picture], bool]]]:
    """What the recipe says of shapes: (code, why a picture is left out, whether it fits)."""
    low, high = own_or_data(draft, where, "min_aspect"), own_or_data(draft, where, "max_aspect")
    if low is not None and high is not None and low > high:
        draft.error(
            "conflict",
            path_of(draft, where, "min_aspect"),
            f"no image is at least {low:g} and at most {high:g} times as wide as high",
            help=f"min_aspect = {high:g}, max_aspect = {low:g}",
        )
        return []
    found: list[tuple[str, str, Callable[[Picture], bool]]] = []
    if low is not None:
        why = f"less than {low:g} times as wide as high"
        found.append(("out-of-aspect", why, lambda p: p.width >= low * p.height))
    if high is not None:
        why = f"more than {high:g} times as wide as high"
        found.append(("out-of-aspect", why, lambda p: p.width <= high * p.height))
    return found


def _parted(
    pictures: Sequence[Picture], fits: Callable[[Picture], bool]
) -> tuple[list[Picture], list[Picture]]:
    return [p for p in pictures if fits(p)], [p for p in pictures if not fits(p)]


def placed(
    draft: Draft,
    where: KeyPath,
    recipe: SourceRecipe,
    told: Sequence[Told],
    geometry: plan.Geometry,
    source: int,
) -> tuple[list[Sample], list[Skip]]:
    """The samples of one source at one resolution; `source` is its number in the plan."""
    places = [
        place(p.width, p.height, geometry, seed=draft.recipe.seed, key=p.key) for p, _ in told
    ]
    pairs = list(zip(told, places, strict=True))
    small = [p for (p, _), placement in pairs if enlarged(p.width, p.height, placement)]
    skips: list[Skip] = []
    if small and not geometry.upscale:
        why = f"smaller than {'its' if len(small) == 1 else 'their'} bucket"
        _report_skipped(draft, where, recipe, "too-small", why, small, len(told))
        left = {p.key: None for p in small}
        skips.append(Skip(names=tuple(left), why="smaller than the bucket"))
        pairs = [pair for pair in pairs if pair[0][0].key not in left]
    elif small and geometry.resize == "none":
        _report_too_large(draft, where, recipe, small, places, told)
    else:
        _warn_enlarged(draft, where, recipe, pairs)
    samples = [
        _sample(source, one, placed)
        for one, placement in pairs
        for placed in _ways(placement, geometry.flip)
    ]
    return samples, skips


def held_out(
    draft: Draft,
    told: Sequence[Told],
    kept: Sequence[Told],
    geometry: plan.Geometry,
    source: int,
) -> list[Sample]:
    """What of `told` is not among those `kept` for training, placed as these are, but never
    mirrored. What could not be trained for its size is not judged either."""
    trained, found = {picture.key for picture, _ in kept}, []
    for one in told:
        picture, _ = one
        if picture.key in trained:
            continue
        placement = place(
            picture.width, picture.height, geometry, seed=draft.recipe.seed, key=picture.key
        )
        fits = geometry.upscale and geometry.resize != "none"
        if fits or not enlarged(picture.width, picture.height, placement):
            found.append(_sample(source, one, placement))
    return found


def _sample(source: int, told: Told, placement: Placement) -> Sample:
    picture, texts = told
    return Sample(
        source=source,
        key=picture.key,
        bytes=picture.bytes,
        width=picture.width,
        height=picture.height,
        placement=placement,
        captions=texts,
        file=picture.file,
        at=picture.at,
    )


def _ways(placement: Placement, flip: bool) -> list[Placement]:
    return [placement, evolve(placement, mirrored=True)] if flip else [placement]


def _report_too_large(
    draft: Draft,
    where: KeyPath,
    recipe: SourceRecipe,
    small: Sequence[Picture],
    places: Sequence[Placement],
    told: Sequence[Told],
) -> None:
    first = next(at for at, (picture, _) in enumerate(told) if picture is small[0])
    cut = places[first]
    draft.error(
        "crop-too-large",
        path_of(draft, where, "crop", "resize"),
        f"the cut is larger than {len(small)} of {len(told)} images in `{recipe.path}`: "
        f"{small[0].width}x{small[0].height} pixels can't give {cut.width}x{cut.height}",
        help='resize = "cover" to scale them, or upscale = false to skip them: '
        + listed([p.key for p in small]),
    )


def _warn_enlarged(
    draft: Draft,
    where: KeyPath,
    recipe: SourceRecipe,
    pairs: Sequence[tuple[Told, Placement]],
) -> None:
    """Of pictures that are enlarged by more than a tenth: they train blur."""
    blurred = [p.key for (p, _), placed in pairs if placed.resize_width > BLURRED * p.width]
    if blurred:
        draft.warn(
            "upscaled",
            (*where, "path"),
            f"{len(blurred)} of {len(pairs)} images in `{recipe.path}` are smaller than their "
            "bucket and are enlarged",
            help="a lower resolution, or upscale = false or min_size to skip them: "
            + listed(blurred),
        )


def _report_skipped(
    draft: Draft,
    where: KeyPath,
    recipe: SourceRecipe,
    code: str,
    why: str,
    left: Sequence[Picture],
    count: int,
) -> None:
    have = f"have {why}" if why.startswith("an edge") else f"are {why}"
    message = f"{len(left)} of {count} images in `{recipe.path}` {have} and are skipped"
    path, help = (*where, "path"), listed([p.key for p in left])
    if code == "too-small":
        draft.warn("too-small", path, message, help=help)
    else:
        draft.warn("out-of-aspect", path, message, help=help)


def _report_faults(
    draft: Draft, where: KeyPath, recipe: SourceRecipe, faults: Sequence[Fault], broken: str
) -> None:
    count = f"{len(faults)} file{'s' * (len(faults) != 1)}"
    notes = tuple(str(fault) for fault in faults[:LISTED])
    if len(faults) > LISTED:
        notes += (f"and {len(faults) - LISTED} more",)
    draft.report(
        "error" if broken == "error" else "warning",
        "broken-images",
        (*where, "path"),
        f"{count} in `{recipe.path}` can't be used"
        + ("" if broken == "error" else f" and {'is' if len(faults) == 1 else 'are'} skipped"),
        help='mend or remove them, or say broken = "skip"' if broken == "error" else "",
        notes=notes,
    )
