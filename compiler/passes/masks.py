"""Masks: which part of each picture is learned, and where that is written down.

A mask is the picture's own transparency, or a picture of the same size. A file is found by name:
the picture `a/dog.jpg` has the mask `a/dog-mask.png` with the suffix "-mask", in the folder of
masks or beside it; the ending is any that pictures have. Masks that lie among the pictures are not
trained.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import evolve, frozen

from compiler import plan
from compiler.data.headers import may_be_transparent
from compiler.data.manifest import Sample
from compiler.data.scan import ALONE, Fault, Picture, Scan, scan, shown
from compiler.draft import Draft
from compiler.passes.captions import LISTED, listed
from compiler.passes.inherited import path_of
from compiler.schema import MaskRecipe, SourceRecipe
from compiler.spans import KeyPath

LOOKED_AT = 64  # pictures, for their transparency
_OF_FILES = ("folder", "suffix", "missing")  # keys of masks from files


@frozen(kw_only=True)
class Masks:
    """One source's masks: the rules (None: it has none) and the files, by picture without ending
    and suffix."""

    rules: plan.Mask | None
    scan: Scan  # of the source, without its masks
    files: Mapping[str, Sequence[Picture]] = {}
    faults: Sequence[Fault] = ()

    def given(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their masks."""
        if not self.files:
            return list(samples)
        return [evolve(sample, mask=self._key(sample.key)) for sample in samples]

    def _key(self, key: str) -> str:
        found = self.files.get(stem(key), ())
        return found[0].key if found else ""


def stem(key: str) -> str:
    """A key without the ending of its name."""
    return os.path.splitext(key)[0]


def stated(draft: Draft, where: KeyPath, recipe: SourceRecipe) -> tuple[MaskRecipe | None, KeyPath]:
    """What holds for a source, and where it says so: its own table, completed key by key by that of
    `[data]` where both speak of one kind of masks, or else `[data]`'s."""
    own, default = recipe.mask, draft.recipe.data.mask
    if own is None:
        return default, ("data", "mask")
    path = (*where, "mask")
    if isinstance(own, str):
        return None, path
    taken = _taken(draft, path, own)
    return evolve(own, **{key: getattr(default, key) for key in taken}), path


def _taken(draft: Draft, path: KeyPath, own: MaskRecipe) -> list[str]:
    """Keys of a source's table that it leaves to `[data]`'s."""
    default = draft.recipe.data.mask
    if default is None or path == ("data", "mask"):
        return []
    alike = _OF_FILES if own.source == default.source else ()
    return [key for key in ("floor", *alike) if not draft.given((*path, key))]


def resolve_masks(
    draft: Draft, where: KeyPath, recipe: SourceRecipe, folder: Path, found: Scan
) -> Masks | None:
    """What the recipe says of masks, and the files there are. None after an error."""
    table, path = stated(draft, where, recipe)
    if table is None:
        return Masks(rules=None, scan=found)
    if not _effective(draft, path, table.source):
        return None
    taken = _taken(draft, path, table)
    for key in ("floor", *_OF_FILES):
        if key not in taken:
            draft.decide((*path, key), getattr(table, key))
    draft.decide((*path, "from"), table.source)
    rules = plan.Mask(kind=table.source, floor=table.floor)
    if table.source == "alpha":
        return Masks(rules=rules, scan=found)
    place = _place(draft, path_of(draft, where, "mask", "folder"), table.folder, folder)
    if place is None:
        return None
    if place == folder and not table.suffix:
        draft.error(
            "missing-key",
            path,
            "masks from files need a `folder` of their own or a `suffix` to be told by",
            help='mask = { from = "file", suffix = "-mask" }',
        )
        return None
    rules = evolve(rules, folder=str(place), suffix=table.suffix, missing=table.missing)
    if place == folder:
        return _beside(rules, found)
    try:
        there = scan(place, draft.index)
    except OSError as error:
        draft.error(
            "unreadable-folder",
            path_of(draft, where, "mask", "folder"),
            f"`{table.folder}` can't be read: {error.strerror or error}",
        )
        return None
    files = _by_picture(there.pictures, table.suffix)
    return Masks(rules=rules, scan=_without(found, folder, place), files=files, faults=there.faults)


def _effective(draft: Draft, path: KeyPath, kind: str) -> bool:
    idle = [key for key in _OF_FILES if draft.given((*path, key))]
    if kind == "file" or not idle:
        return True
    draft.error(
        "no-effect",
        (*path, idle[0]),
        f'`{idle[0]}` has no effect: it belongs to `from = "file"`',
        of="key",
    )
    return False


def _place(draft: Draft, path: KeyPath, stated: str, folder: Path) -> Path | None:
    """The folder of masks; by default the pictures' own."""
    if not stated:
        return folder
    try:
        place = Path(os.path.normpath((draft.folder / Path(stated).expanduser()).absolute()))
        if place.is_dir():
            return place
        what = "is a file, not a folder" if place.exists() else "does not exist"
    except (OSError, ValueError, RuntimeError) as error:
        what = f"is no path: {error}"
    draft.error(
        "missing-path",
        path,
        f"the folder of masks `{stated}` {what}",
        help=f"paths are relative to the recipe: looked in {shown(str(draft.folder))}",
    )
    return None


def _by_picture(pictures: Sequence[Picture], suffix: str) -> dict[str, list[Picture]]:
    files: dict[str, list[Picture]] = {}
    for picture in pictures:
        name = stem(picture.key)
        if name.endswith(suffix):
            files.setdefault(name[: len(name) - len(suffix)], []).append(picture)
    return files


def _beside(rules: plan.Mask, found: Scan) -> Masks:
    """Masks among the pictures: whatever is called as a picture with the suffix behind it."""
    names = {stem(picture.key) for picture in found.pictures}
    files = {
        name: masks
        for name, masks in _by_picture(found.pictures, rules.suffix).items()
        if name in names
    }
    keys = {mask.key for masks in files.values() for mask in masks}
    left = tuple(picture for picture in found.pictures if picture.key not in keys)
    return Masks(rules=rules, scan=evolve(found, pictures=left), files=files, faults=found.faults)


def _without(found: Scan, folder: Path, masks: Path) -> Scan:
    """A folder of masks below that of the pictures holds no pictures to train."""
    if not masks.is_relative_to(folder):
        return found
    below = f"{masks.relative_to(folder).as_posix()}/"
    left = tuple(picture for picture in found.pictures if not picture.key.startswith(below))
    return evolve(found, pictures=left)


def _judge_alpha(
    draft: Draft,
    path: KeyPath,
    recipe: SourceRecipe,
    pictures: Sequence[Picture],
    folder: Path,
) -> None:
    """Warn if none of a source's pictures has transparency, as far as headers tell. Of many some
    are looked at, spread evenly; those in containers are not."""
    files = [p for p in pictures if p.at == ALONE]
    some = files[:: max(1, -(-len(files) // LOOKED_AT))]
    refused = any(fault.severity == "error" for fault in draft.diagnostics)
    if refused or not some or len(files) < len(pictures):
        return
    if any(may_be_transparent(one.file or str(folder / one.key)) for one in some):
        return
    looked = f"{len(some)} of them looked at" if len(some) < len(files) else "all looked at"
    draft.warn(
        "opaque-images",
        path,
        f"no image in `{recipe.path}` has transparency ({looked}): their masks are all of them",
        help="leave `mask` out, or save the images with their background transparent",
    )


def judge_masks(
    draft: Draft,
    where: KeyPath,
    recipe: SourceRecipe,
    masks: Masks,
    pictures: Sequence[Picture],
    folder: Path,
) -> bool:
    """Whether each picture has one mask of its own size, where it needs a file; warns where none
    seems to be transparent. `folder` is the source's."""
    rules = masks.rules
    if rules is None:
        return True
    if rules.kind == "alpha":
        _judge_alpha(draft, path_of(draft, where, "mask"), recipe, pictures, folder)
        return True
    path, each = (
        path_of(draft, where, "mask"),
        [(p, masks.files.get(stem(p.key), ())) for p in pictures],
    )
    without = [p.key for p, found in each if not found]
    if without and (rules.missing == "error" or len(without) == len(pictures)):
        draft.error(
            "missing-masks",
            path,
            f"{len(without)} of {len(pictures)} images in `{recipe.path}` have no mask",
            help=f'{listed(without)}\nto learn all of these: missing = "whole"',
            notes=tuple(str(fault) for fault in masks.faults[:LISTED]),
        )
        return False
    twice = [p.key for p, found in each if len(found) > 1]
    if twice:
        draft.error(
            "missing-masks",
            path,
            f"{len(twice)} of {len(pictures)} images in `{recipe.path}` have several masks, which "
            "differ in their endings",
            help=listed(twice),
        )
        return False
    odd = [(p, m) for p, found in each for m in found if (p.width, p.height) != (m.width, m.height)]
    if odd:
        first, mask = odd[0]
        draft.error(
            "mask-size",
            path,
            f"{len(odd)} of {len(pictures)} masks of `{recipe.path}` have another size than "
            f"their image: {shown(first.key)} has {first.width}x{first.height} pixels, its mask "
            f"{mask.width}x{mask.height}",
            help=listed([mask.key for _, mask in odd]),
        )
        return False
    return True
