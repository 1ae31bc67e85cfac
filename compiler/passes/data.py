"""What it is trained on: sources, pictures, geometry, captions. Reads headers, writes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import lcm
from pathlib import Path
from typing import Any

from compiler import plan
from compiler.data.captions import caption_all
from compiler.data.geometry import place, unusable
from compiler.data.manifest import Folder, Manifest, Sample
from compiler.data.scan import Fault, Picture, Scan, scan, shown
from compiler.draft import Draft
from compiler.schema import CaptionsRecipe, SourceRecipe
from compiler.spans import KeyPath

FIELD_MULTIPLE = 64  # pixels; what the field's buckets are cut to, so that they stay few
LARGE = 512  # pixels; from here on a step of 64 is fine enough
LISTED = 8  # files named in one message


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
    found = [_source(draft, number, ids[number], recipes[number]) for number in range(len(recipes))]
    kept = [each for each in found if each is not None]
    if len(kept) < len(recipes):
        return
    draft.sources = tuple(source for source, _ in kept)
    draft.manifest = Manifest(
        [Folder(id=source.id, path=source.path) for source, _ in kept],
        (sample for _, samples in kept for sample in samples),
    )


def _workers(draft: Draft) -> int:
    asked = draft.recipe.data.workers
    count = max(1, min(8, draft.machine.cores)) if asked == "auto" else asked
    draft.decide(("data", "workers"), count, by="this machine", why=f"{draft.machine.cores} cores")
    return count


def _ids(draft: Draft, recipes: Sequence[SourceRecipe]) -> list[str]:
    """The sources' names: as given, else the folder's, made unique by a number."""
    ids: list[str] = []
    for number, recipe in enumerate(recipes):
        name = recipe.id or Path(recipe.path).name or "source"
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
    draft: Draft, number: int, name: str, recipe: SourceRecipe
) -> tuple[plan.DataSource, list[Sample]] | None:
    where: KeyPath = ("data", "source", number)
    geometry = _geometry(draft, where, recipe)
    captions = _captions(draft, where, recipe)
    folder = _folder(draft, where, recipe)
    if folder is None or geometry is None or captions is None:
        return None
    try:
        found = scan(folder, draft.index)
    except OSError as error:
        draft.error(
            "unreadable-folder",
            (*where, "path"),
            f"`{recipe.path}` can't be read: {error.strerror or error}",
        )
        return None
    return _samples(draft, where, name, recipe, folder, found, geometry, captions)


def _folder(draft: Draft, where: KeyPath, recipe: SourceRecipe) -> Path | None:
    try:
        folder = (draft.folder / Path(recipe.path).expanduser()).absolute()
        if folder.is_dir():
            return Path(os.path.normpath(folder))
        what = "is a file, not a folder" if folder.exists() else "does not exist"
    except (OSError, ValueError, RuntimeError) as error:
        what = f"is no path: {error}"
    draft.error(
        "missing-path",
        (*where, "path"),
        f"the data folder `{recipe.path}` {what}",
        help=f"paths are relative to the recipe: looked in {shown(str(draft.folder))}",
    )
    return None


def _geometry(draft: Draft, where: KeyPath, recipe: SourceRecipe) -> plan.Geometry | None:
    data = draft.recipe.data
    kind = recipe.resolution_type or data.resolution_type
    resolution = _resolution(draft, where, recipe, kind)
    if resolution is None:
        return None
    edge = (resolution * 1e6) ** 0.5 if kind == "area" else resolution
    return plan.Geometry(
        resolution=resolution,
        resolution_type=kind,
        aspect=_inherited(draft, where, "crop", "aspect"),
        crop=_inherited(draft, where, "crop", "style"),
        multiple=_multiple(draft, edge),
    )


def _resolution(draft: Draft, where: KeyPath, recipe: SourceRecipe, kind: str) -> float | None:
    assert draft.model is not None
    family, default = draft.model.family, ("data", "resolution")
    if recipe.resolution is not None:
        value, path = float(recipe.resolution), (*where, "resolution")
    elif draft.recipe.data.resolution != "auto":
        value, path = float(draft.recipe.data.resolution), default
    else:
        value, path = float(_native_resolution(draft)), default
        if kind == "area":
            value = value**2 / 1e6
        draft.decide(default, value, by="the base", why="the size it was made for")
    edge = (value * 1e6) ** 0.5 if kind == "area" else value
    least = family.multiple(draft.model.configs)
    if kind == "area" and value > 64:
        draft.error(
            "out-of-range",
            path,
            f"{value:g} megapixels is out of range",
            help='for an edge length in pixels say resolution_type = "pixel_area"',
        )
        return None
    if edge < least or edge > 8192:
        draft.error(
            "out-of-range",
            path,
            f"a resolution of {edge:g} pixels is out of range",
            label=f"{least} to 8192 pixels",
            help='for megapixels say resolution_type = "area"' if edge < least else "",
        )
        return None
    draft.decide(path, value)
    return value


def _native_resolution(draft: Draft) -> int:
    """Pixels: as the card states for a known model, else sample size times VAE factor."""
    assert draft.model is not None
    facts, family = draft.model, draft.model.family
    if facts.known is not None:
        return facts.known.resolution
    size = facts.configs[family.trained_component].get("sample_size")
    if isinstance(size, int):
        return size * family.vae_factor(facts.configs["vae"])
    return family.default_resolution


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


def _inherited(draft: Draft, where: KeyPath, table: str, key: str, name: str = "") -> Any:
    """A value of a source's table, else of `[data]`'s table of that name, key by key."""
    number = where[2]
    assert isinstance(number, int)
    own = getattr(draft.recipe.data.source[number], table)
    of_source = own is not None and draft.given((*where, table, key))
    holder = own if of_source else getattr(draft.recipe.data, table)
    value = getattr(holder, name or key)
    path: KeyPath = (*where, table, key) if of_source else ("data", table, key)
    draft.decide(path, value)
    return value


def _captions(draft: Draft, where: KeyPath, recipe: SourceRecipe) -> plan.Captions | None:
    kind = _inherited(draft, where, "captions", "from", "source")
    own: CaptionsRecipe | None = recipe.captions
    prompt = own.prompt if own is not None and own.prompt else draft.recipe.data.captions.prompt
    stated = own is not None and draft.given((*where, "captions"))
    table: KeyPath = (*where, "captions") if stated else ("data", "captions")
    if kind == "instance" and not prompt.strip():
        draft.error(
            "missing-key",
            table if draft.given(table) else where,
            '`from = "instance"` needs a `prompt`',
            help='captions = { from = "instance", prompt = "a photo of sks dog" }',
        )
        return None
    if kind != "instance" and own is not None and draft.given((*where, "captions", "prompt")):
        draft.error(
            "no-effect",
            (*where, "captions", "prompt"),
            f'`prompt` belongs to `from = "instance"`; these captions come from `{kind}`',
            of="key",
        )
    return plan.Captions(
        kind=kind,
        prompt=prompt if kind == "instance" else "",
        missing=_inherited(draft, where, "captions", "missing"),
        multiline=_inherited(draft, where, "captions", "multiline"),
        dropout=float(_inherited(draft, where, "captions", "dropout")),
    )


def _samples(
    draft: Draft,
    where: KeyPath,
    name: str,
    recipe: SourceRecipe,
    folder: Path,
    found: Scan,
    geometry: plan.Geometry,
    captions: plan.Captions,
) -> tuple[plan.DataSource, list[Sample]] | None:
    broken = recipe.broken or draft.recipe.data.broken
    usable, skipped = _usable(draft, where, recipe, found, broken)
    kept = _with_captions(draft, where, recipe, folder, usable, captions)
    skipped += len(usable) - len(kept)
    if not kept:
        errors = [d.path for d in draft.diagnostics if d.severity == "error"]
        if not any(path.startswith(f"data.source[{where[2]}]") for path in errors):
            draft.error(
                "no-images",
                (*where, "path"),
                f"there is no usable image in `{recipe.path}`",
                help=_why_none(found, skipped),
            )
        return None
    samples = [
        Sample(
            source=int(where[2]),
            key=picture.key,
            bytes=picture.bytes,
            width=picture.width,
            height=picture.height,
            placement=place(
                picture.width, picture.height, geometry, seed=draft.recipe.seed, key=picture.key
            ),
            caption=caption,
        )
        for picture, caption in kept
    ]
    repeats = (
        draft.located.snippet((*where, "repeats")) if draft.given((*where, "repeats")) else "1"
    )
    _upscaled(draft, where, recipe, samples)
    source = plan.DataSource(
        id=name,
        path=str(folder),
        repeats=_decimal(repeats, recipe.repeats),
        geometry=geometry,
        captions=captions,
        broken=broken,
        images=len(samples),
        skipped=skipped,
    )
    draft.decide((*where, "repeats"), recipe.repeats)
    return source, samples


def _decimal(text: str, value: float) -> str:
    """`repeats` exactly as it was written, as a decimal number that `Fraction` reads.

    What is written may not be what holds (a refused value is judged as if it were left out).
    """
    plain = text.replace("_", "").strip().lstrip("+")
    decimal = plain and all(c in "0123456789.eE-+" for c in plain)
    return plain if decimal and float(plain) == value else repr(value)


def _why_none(found: Scan, skipped: int) -> str:
    if found.others or found.hidden:
        return f"it holds {found.others} other files and {found.hidden} hidden ones"
    return f"{skipped} were skipped" if skipped else "the folder is empty"


def _usable(
    draft: Draft, where: KeyPath, recipe: SourceRecipe, found: Scan, broken: str
) -> tuple[list[Picture], int]:
    """Pictures that are whole, large enough and not too elongated; how many are skipped."""
    least = recipe.min_size if recipe.min_size is not None else draft.recipe.data.min_size
    odd = [
        Fault(path=p.key, why=why) for p in found.pictures if (why := unusable(p.width, p.height))
    ]
    faults = [*found.faults, *odd]
    if faults:
        _report_faults(draft, where, recipe, faults, broken)
    pictures = [p for p in found.pictures if not unusable(p.width, p.height)]
    large = [p for p in pictures if min(p.width, p.height) >= least]
    if len(large) < len(pictures):
        count = len(pictures) - len(large)
        draft.warn(
            "too-small",
            (*where, "path"),
            f"{count} of {len(pictures)} images in `{recipe.path}` have an edge below "
            f"{least} pixels and are skipped",
            help=_named([p.key for p in pictures if min(p.width, p.height) < least]),
        )
        _note_skipped(draft, where, [f"an edge below {least} pixels"] * count)
    _note_skipped(draft, where, [fault.why for fault in faults])
    return large, len(faults) + len(pictures) - len(large)


def _note_skipped(draft: Draft, where: KeyPath, reasons: Sequence[str]) -> None:
    number = where[2]
    assert isinstance(number, int)
    for why in dict.fromkeys(reasons):
        draft.skips.append((number, reasons.count(why), why))


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


def _with_captions(
    draft: Draft,
    where: KeyPath,
    recipe: SourceRecipe,
    folder: Path,
    pictures: Sequence[Picture],
    captions: plan.Captions,
) -> list[tuple[Picture, str]]:
    """Each picture with its caption; those without one as `missing` says."""
    texts = caption_all(str(folder), [p.key for p in pictures], captions)
    faults = [text for text in texts if isinstance(text, Fault)]
    if faults:
        draft.error(
            "broken-captions",
            (*where, "path"),
            f"{len(faults)} caption files in `{recipe.path}` can't be read",
            notes=tuple(str(fault) for fault in faults[:LISTED]),
        )
    pairs = [(p, t) for p, t in zip(pictures, texts, strict=True) if isinstance(t, str)]
    without = [picture.key for picture, text in pairs if not text]
    if not without or captions.missing == "empty":
        return pairs
    message = f"{len(without)} of {len(pictures)} images in `{recipe.path}` have no caption"
    if captions.missing == "error":
        draft.error(
            "missing-captions",
            (*where, "path"),
            message,
            help=_named(without) + "\n" + _caption_ways(captions.kind),
        )
        return []
    draft.warn(
        "missing-captions", (*where, "path"), message + " and are skipped", help=_named(without)
    )
    _note_skipped(draft, where, ["no caption"] * len(without))
    return [(picture, text) for picture, text in pairs if text]


def _caption_ways(kind: str) -> str:
    ways = {
        "textfile": "write a .txt file beside each image, or choose another source: "
        'captions = { from = "filename" } or { from = "instance", prompt = "..." }',
        "filename": "these names hold no words: rename the files, or choose "
        'captions = { from = "instance", prompt = "..." }',
        "instance": "give a prompt with words in it",
    }
    return ways[kind] + '; or captions = { missing = "skip" }'


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(shown(name) for name in names[:LISTED]) + more


def _upscaled(
    draft: Draft, where: KeyPath, recipe: SourceRecipe, samples: Sequence[Sample]
) -> None:
    """Warn of pictures that are enlarged by more than a tenth: they train blur."""
    enlarged = [s.key for s in samples if s.placement.resize_width > 1.1 * s.width]
    if enlarged:
        draft.warn(
            "upscaled",
            (*where, "path"),
            f"{len(enlarged)} of {len(samples)} images in `{recipe.path}` are smaller than their "
            "bucket and are enlarged",
            help=f"a lower resolution, or min_size to skip them: {_named(enlarged)}",
        )
