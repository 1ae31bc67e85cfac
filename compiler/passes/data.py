"""What it is trained on: sources, pictures, geometry, captions. Reads headers, writes nothing.

Each entry of the recipe becomes one source of the plan, or one for each of its resolutions.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from attrs import Factory, define, evolve

from compiler import plan
from compiler.data.manifest import Folder, Manifest, Sample
from compiler.data.scan import ALONE, Picture, Scan
from compiler.data.sources.spots import Spot, name_of
from compiler.draft import Draft
from compiler.passes.balance import judge_leaks, judge_targets, moment, trained, with_repeats
from compiler.passes.captions import captioned, resolve_captions
from compiler.passes.geometry import resolve_geometries
from compiler.passes.inherited import Effects, own_or_data
from compiler.passes.masks import judge_masks, resolve_masks
from compiler.passes.places import resolve_spot, scanned
from compiler.passes.placing import Skip, held_out, placed, usable
from compiler.schema import SourceRecipe
from compiler.spans import KeyPath


@define(kw_only=True)
class Found:
    """What one entry of the recipe gives."""

    trained: set[str]  # identities of pictures, where any source holds some out
    held_out: dict[str, str]  # with what each is called
    judged: list[Sample] = Factory(list)  # of those held out
    sources: list[plan.DataSource] = Factory(list)
    samples: list[Sample] = Factory(list)
    skips: list[tuple[int, tuple[str, ...], str]] = Factory(list)  # as in a Draft


def resolve_data(draft: Draft) -> None:
    """Fill in `draft.sources` and `draft.manifest`."""
    if draft.model is None:
        return
    recipes = draft.recipe.data.source
    if not recipes:
        draft.error(
            "missing-key",
            ("data", "source") if draft.given(("data", "source")) else ("data",),
            "there is no data source",
            help='[[data.source]]\npath = "datasets/pictures"',
        )
        return
    draft.workers = _workers(draft)
    ids = _ids(draft, recipes)
    effects = Effects()
    found: list[Found] = []
    for number, recipe in enumerate(recipes):
        first = sum(len(each.sources) for each in found)
        made = _source(draft, number, ids[number], recipe, effects, first)
        found += [made] if made else []
    effects.report(draft)
    if len(found) < len(recipes):
        return
    judge_leaks(draft, [(each.trained, each.held_out) for each in found])
    judge_targets(draft)
    groups = with_repeats(draft, [each.sources for each in found], [_counts(e) for e in found])
    if groups is None or not _differ(draft, [source for group in groups for source in group]):
        return
    draft.skips = [row for each in found for row in each.skips]
    draft.sources = tuple(source for group in groups for source in group)
    draft.manifest = Manifest(
        [
            Folder(id=source.id, path=source.path, kind=source.kind, column=source.column)
            for source in draft.sources
        ],
        (sample for each in found for sample in each.samples),
        _judged(draft, found),
    )


def _counts(found: Found) -> list[int]:
    """The images of each bucket."""
    places = ((each.source, each.placement) for each in found.samples)
    return list(Counter((source, at.width, at.height) for source, at in places).values())


def _judged(draft: Draft, found: Sequence[Found]) -> list[Sample] | None:
    """What of the held-out pictures is judged; None if nothing is."""
    samples = [sample for each in found for sample in each.judged]
    return None if draft.recipe.evaluation.every.is_off or not samples else samples


def _differ(draft: Draft, sources: Sequence[plan.DataSource]) -> bool:
    """Whether no name that was made for a resolution is the name of another source."""
    names = [source.id for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None and all(fault.code != "duplicate-id" for fault in draft.diagnostics):
        draft.error(
            "duplicate-id",
            ("data", "source"),
            f"two sources are called `{twice}`",
            help="a source with several resolutions is named with each of them behind an @",
        )
    return twice is None


def _workers(draft: Draft) -> int:
    asked = draft.recipe.data.workers
    count = max(1, min(8, draft.machine.cores)) if asked == "auto" else asked
    draft.decide(("data", "workers"), count, by="this machine", why=f"{draft.machine.cores} cores")
    return count


def _ids(draft: Draft, recipes: Sequence[SourceRecipe]) -> list[str]:
    """The sources' names: as given, else the folder's, made unique by a number."""
    ids: list[str] = []
    for number, recipe in enumerate(recipes):
        name = recipe.id or name_of(recipe.path) or "source"
        if recipe.id and name in ids:
            draft.error(
                "duplicate-id",
                ("data", "source", number, "id"),
                f"two sources are called `{name}`",
                help="ids must differ, because the plan and the caches name sources by them",
            )
        while name in ids and not recipe.id:
            name = f"{name}-{number + 1}"
        draft.decide(("data", "source", number, "id"), name, by="decided", why="its folder's name")
        ids.append(name)
    return ids


def _source(
    draft: Draft, number: int, name: str, recipe: SourceRecipe, effects: Effects, first: int
) -> Found | None:
    """One entry of the recipe; its sources in the plan are numbered from `first` on."""
    where: KeyPath = ("data", "source", number)
    geometries = resolve_geometries(draft, where, recipe, effects)
    spot = resolve_spot(draft, where, recipe)
    captions = resolve_captions(draft, where, effects, spot.kind if spot else "")
    if spot is None or geometries is None or captions is None:
        return None
    listed = scanned(draft, where, recipe, spot, captions)
    if listed is None:
        return None
    (found, column), folder = listed, Path(spot.root)
    if found.hidden:
        draft.hidden.append((name, found.hidden, found.hidden_names))
    masks = resolve_masks(draft, where, recipe, folder, found)
    if masks is None:
        return None
    found = masks.scan
    broken = own_or_data(draft, where, "broken")
    pictures, skips = usable(draft, where, recipe, found, broken)
    told = captioned(
        draft, where, recipe, folder, evolve(found, pictures=tuple(pictures)), captions, broken
    )
    if told.skipped:
        skips.append(Skip(names=told.skipped, why="no caption"))
    if told.broken:
        skips.append(Skip(names=told.broken, why="a caption that can't be read"))
    identities = _identities(draft, spot, [picture for picture, _ in told.pictures])
    kept = trained(draft, where, recipe, told.pictures, identities)
    if kept is None:
        return None
    masked = [picture for picture, _ in kept or told.pictures]
    if not judge_masks(draft, where, recipe, masks, masked, folder):
        return None
    base = plan.DataSource(
        id=name,
        path=spot.path,
        kind=spot.kind,
        files=len(spot.files),
        column=column,
        repeats="1",
        geometry=geometries[0],
        captions=captions,
        broken=broken,
        images=0,
        skipped=0,
        fallbacks=told.fallbacks,
        held_out=len(told.pictures) - len(kept),
        regularisation=recipe.regularisation is not None,
        loss_weight=recipe.regularisation.weight if recipe.regularisation else 1.0,
        target=recipe.regularisation.target if recipe.regularisation else "image",
        mask=masks.rules,
        first=moment(draft, where, "from", recipe.start),
        until=moment(draft, where, "until", recipe.until),
    )
    made = Found(trained=set(), held_out={})
    seen = {picture.key for picture, _ in kept} if identities else set()
    for (picture, _), identity in zip(told.pictures, identities, strict=False):  # or there are none
        if picture.key in seen:
            made.trained.add(identity)
        else:
            made.held_out[identity] = _called(spot, picture)
    for geometry in geometries:
        source = first + len(made.sources)
        samples, left = placed(draft, where, recipe, kept, geometry, source)
        judged = held_out(draft, told.pictures, kept, geometry, source)
        if not (samples or (recipe.holdout == "all" and judged)):
            _report_none(draft, where, recipe, spot, found, [*skips, *left])
            return None
        made.sources.append(
            evolve(
                base,
                id=name if len(geometries) == 1 else f"{name}@{geometry.resolution:g}",
                geometry=geometry,
                images=len(samples),
                skipped=sum(skip.images for skip in (*skips, *left)),
                texts=len({text for sample in samples for text in sample.captions}),
            )
        )
        made.samples += masks.given(samples)
        made.judged += masks.given(judged)
        number = first + len(made.sources) - 1
        made.skips += [(number, skip.names, skip.why) for skip in (*skips, *left)]
    return made


def _report_none(
    draft: Draft,
    where: KeyPath,
    recipe: SourceRecipe,
    spot: Spot,
    found: Scan,
    skips: Sequence[Skip],
) -> None:
    errors = [d.path for d in draft.diagnostics if d.severity == "error"]
    if not any(path.startswith(f"data.source[{where[2]}]") for path in errors):
        draft.error(
            "no-images",
            (*where, "path"),
            f"there is no usable image in `{recipe.path}`",
            help=_why_none(spot, found, skips),
        )


def _identities(draft: Draft, spot: Spot, pictures: Sequence[Picture]) -> list[str]:
    """Of each picture what is the same by whatever path, link or row it is found: its file, and its
    place where that is a container. Empty where no source holds any out, and nobody asks."""
    if not any(recipe.holdout for recipe in draft.recipe.data.source):
        return []
    folder = lru_cache(maxsize=256)(os.path.realpath)
    found = []
    for picture in pictures:
        above, name = os.path.split(picture.file or f"{spot.root}/{picture.key}")
        path = os.path.join(folder(above), name)
        path = os.path.realpath(path) if os.path.islink(path) else path
        found.append(path if picture.at == ALONE else f"{path}/{picture.at}")
    return found


def _called(spot: Spot, picture: Picture) -> str:
    if not picture.file:
        return f"{spot.root}/{picture.key}"
    return picture.file if picture.at == ALONE else f"{picture.file}/{picture.key}"


def _why_none(spot: Spot, found: Scan, skips: Sequence[Skip]) -> str:
    if skips:
        why = "; ".join(f"{skip.images}: {skip.why}" for skip in skips)
        return f"{sum(skip.images for skip in skips)} were skipped ({why})"
    if found.others or found.hidden:
        return f"it holds {found.others} other files and {found.hidden} hidden ones"
    if spot.kind == "folder":
        empty = not any(Path(spot.root).iterdir())
        return "the folder is empty" if empty else "it holds texts alone, and no image"
    return "it has no rows" if spot.kind != "webdataset" else "no member of it ends like an image"
