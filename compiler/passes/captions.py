"""How one source's captions are made, and what each of its pictures is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from compiler import plan
from compiler.data.captions import COMPANION, all_captions, from_name, tidy
from compiler.data.scan import Fault, Picture, Scan, shown
from compiler.data.sources.spots import metadata_tables
from compiler.data.variants import PLACEHOLDER, forms, is_random, named, says, tags_of
from compiler.draft import Draft
from compiler.passes.inherited import Effects, inherited, path_of
from compiler.schema import SourceRecipe
from compiler.source import dotted
from compiler.spans import KeyPath

LISTED = 8  # files named in one message
TABLE = "captions"
TABULAR = ("parquet", "arrow", "table")
"""Sources whose captions stand in a column, unless the recipe says otherwise."""


@frozen(kw_only=True)
class Captioned:
    """The pictures that are trained, with all that each may be told."""

    pictures: tuple[tuple[Picture, tuple[str, ...]], ...]
    skipped: tuple[str, ...]  # for want of a caption
    broken: tuple[str, ...]  # skipped because theirs can't be read
    fallbacks: int  # told what `missing` says instead


def resolve_captions(
    draft: Draft, where: KeyPath, effects: Effects, place: str
) -> plan.Captions | None:
    """One source's rules for captions; None after an error. `place` is the kind of the source."""

    def value(key: str, name: str = "") -> object:
        return inherited(draft, where, TABLE, key, name)

    kind = _kind(draft, where, place)
    if kind is None:
        return None
    made = plan.Captions(
        kind=kind,  # type: ignore[arg-type]
        prompt=str(value("prompt")),
        key=str(value("key")),
        column=str(value("column")) if kind == "column" else "",
        fallback=value("fallback") if kind == "column" else (),  # type: ignore[arg-type]
        missing=value("missing"),  # type: ignore[arg-type]
        multiline=value("multiline"),  # type: ignore[arg-type]
        dropout=float(str(value("dropout"))),
        prefix=str(value("prefix")),
        suffix=str(value("suffix")),
        trigger=tidy(str(value("trigger"))),
        shuffle=bool(value("shuffle")),
        keep_tokens=int(str(value("keep_tokens"))),
        separator=str(value("separator")),
        tag_dropout=float(str(value("tag_dropout"))),
        variants=int(str(value("variants"))),
    )
    _note_effects(draft, where, made, effects)
    sound = _has_prompt(draft, where, made) and _has_variants(draft, where, made)
    return made if sound else None


def _kind(draft: Draft, where: KeyPath, place: str) -> str | None:
    """Where captions come from, if a source of this kind can hold them; None after an error."""
    path = path_of(draft, where, TABLE, "from")
    if place in TABULAR and not draft.given(path):
        why = "a table holds its own captions"
        draft.decide((*where, TABLE, "from"), "column", by="decided", why=why)
        return "column"
    kind = str(inherited(draft, where, TABLE, "from", "source"))
    if kind == "column" and place in ("folder", "webdataset"):
        draft.error(
            "captions-elsewhere",
            path,
            f"a {'folder' if place == 'folder' else 'tar'} has no columns to take captions from",
            help='captions = { from = "textfile" }',
        )
        return None
    if kind in COMPANION and place in ("parquet", "arrow"):
        draft.error(
            "captions-elsewhere",
            path,
            f"images in {place} shards have no {COMPANION[kind]} files beside them",
            help='captions = { from = "column", column = "text" }',
        )
        return None
    return kind


def _note_effects(draft: Draft, where: KeyPath, made: plan.Captions, effects: Effects) -> None:
    random = is_random(made)
    why = "it belongs to `shuffle` and `tag_dropout`, which are off"
    for key in ("keep_tokens", "separator", "variants"):
        effects.note(draft, where, TABLE, key, used=random, why=why, help="shuffle = true")
    takes_prompt = "instance" in (made.kind, made.missing)
    why = f'`prompt` belongs to `from = "instance"`; these captions come from `{made.kind}`'
    effects.note(draft, where, TABLE, "prompt", used=takes_prompt, why=why)
    why = f'it belongs to `from = "json"`; these captions come from `{made.kind}`'
    effects.note(draft, where, TABLE, "key", used=made.kind == "json", why=why)
    for key in ("column", "fallback"):
        why = f'it belongs to `from = "column"`; these captions come from `{made.kind}`'
        effects.note(draft, where, TABLE, key, used=made.kind == "column", why=why)
    if made.dropout == 1:
        _warn_of_none(draft, where, "dropout", "each sample is trained with the empty prompt")
    if made.tag_dropout == 1:
        _warn_of_none(draft, where, "tag_dropout", "each tag that may be left out always is")
    lines = made.kind in (*COMPANION, "column")
    why = f"captions from `{made.kind}` have one line"
    effects.note(draft, where, TABLE, "multiline", used=lines, why=why)


def _warn_of_none(draft: Draft, where: KeyPath, key: str, what: str) -> None:
    path = path_of(draft, where, TABLE, key)
    if not any(fault.path == dotted(path) for fault in draft.diagnostics):
        draft.warn("no-effect", path, f"{what}: captions are never learned", help=f"{key} = 0.1")


def _has_prompt(draft: Draft, where: KeyPath, made: plan.Captions) -> bool:
    if "instance" not in (made.kind, made.missing) or made.prompt.strip():
        return True
    stated = path_of(draft, where, TABLE)
    key = "from" if made.kind == "instance" else "missing"
    draft.error(
        "missing-key",
        stated if draft.given(stated) else where,
        f'`{key} = "instance"` needs a `prompt`',
        help=f'captions = {{ {key} = "instance", prompt = "a photo of sks dog" }}',
    )
    return False


def _has_variants(draft: Draft, where: KeyPath, made: plan.Captions) -> bool:
    """What changes from use to use can't be cached, but some forms of it can."""
    if not is_random(made) or made.variants > 1:
        return True
    key = "shuffle" if made.shuffle else "tag_dropout"
    draft.error(
        "needs-variants",
        path_of(draft, where, TABLE, key),
        f"`{key}` has nothing to choose from: text embeddings are cached, each caption in one form",
        label="each use of an image would see the same tags in the same order",
        help="variants = 8",
        of="key",
    )
    return False


def captioned(
    draft: Draft,
    where: KeyPath,
    recipe: SourceRecipe,
    folder: Path,
    scan: Scan,
    captions: plan.Captions,
    broken: str,
) -> Captioned:
    """Each picture of `scan` with its captions; those without one as `missing` says, and those with
    one that can't be read as `broken` does."""
    pictures = scan.pictures
    found = all_captions(str(folder), scan, pictures, captions)
    faults = [texts for texts in found if isinstance(texts, Fault)]
    if faults:
        _report_faults(draft, where, recipe, faults, captions.kind in COMPANION, broken)
    pairs = [(p, t) for p, t in zip(pictures, found, strict=True) if not isinstance(t, Fault)]
    without = [picture for picture, texts in pairs if not texts]
    instead = {p.key: texts for p in without if (texts := _fallback(p.key, captions))}
    told = [(p, texts or instead.get(p.key, ())) for p, texts in pairs]
    left = [picture.key for picture, texts in told if not texts]
    skipped, unread = tuple(left), tuple(fault.path for fault in faults)
    tables = metadata_tables(str(folder)) if left and scan.lines is None else []
    if left and not _without(draft, where, recipe, left, len(pictures), captions, tables):
        return Captioned(pictures=(), skipped=skipped, broken=unread, fallbacks=len(instead))
    _judge(draft, where, recipe, [texts for _, texts in told if any(texts)], captions)
    return Captioned(
        pictures=tuple(
            (p, forms(texts, captions, seed=draft.recipe.seed, key=p.key))
            for p, texts in told
            if texts
        ),
        skipped=skipped,
        broken=unread,
        fallbacks=len(instead),
    )


def _report_faults(
    draft: Draft,
    where: KeyPath,
    recipe: SourceRecipe,
    faults: Sequence[Fault],
    files: bool,
    broken: str,
) -> None:
    """Name captions that can't be read, which stand in `files` of their own or in columns."""
    skipped = " and their images are skipped" if broken == "skip" else ""
    notes = tuple(str(fault) for fault in faults[:LISTED])
    if len(faults) > LISTED:
        notes += (f"and {len(faults) - LISTED:,} more",)
    draft.report(
        "warning" if skipped else "error",
        "broken-captions",
        (*where, "path"),
        f"{len(faults)} caption{' file' * files}{'s' * (len(faults) != 1)} in `{recipe.path}` "
        f"can't be read{skipped}",
        notes=notes,
        help="" if skipped else 'mend them (UTF-8 text is read), or say broken = "skip"',
    )


def _fallback(key: str, captions: plan.Captions) -> tuple[str, ...]:
    match captions.missing:
        case "empty":
            return ("",)
        case "filename":
            return (name,) if (name := from_name(key)) else ()
        case "instance":
            return (tidy(captions.prompt),)
    return ()


def _without(
    draft: Draft,
    where: KeyPath,
    recipe: SourceRecipe,
    left: Sequence[str],
    count: int,
    captions: plan.Captions,
    tables: Sequence[str],
) -> bool:
    """Say that pictures have no caption, which the `tables` beside them may hold; returns whether
    to go on without them."""
    message = f"{len(left)} of {count} images in `{recipe.path}` have no caption"
    if captions.missing == "skip":
        draft.warn(
            "missing-captions", (*where, "path"), message + " and are skipped", help=listed(left)
        )
        return True
    draft.error(
        "missing-captions",
        (*where, "path"),
        message,
        help="\n".join((listed(left), *_table(tables), _ways(captions))),
    )
    return False


def _table(names: Sequence[str]) -> list[str]:
    """How captions are read that stand in a table beside the images."""
    if not names:
        return []
    files = ", ".join(f'"{shown(name)}"' for name in names[:LISTED])
    return [f"they may stand in a table that lies there: files = [{files}]"]


def _ways(captions: plan.Captions) -> str:
    if captions.missing == "filename":
        return "nor do their names hold words: rename the files, or choose " + _INSTANCE
    ways = {
        "textfile": "write a .txt file beside each image, or choose another source: "
        'captions = { from = "filename" } or { from = "instance", prompt = "..." }',
        "json": f'write a .json file with the key "{captions.key}" beside each image, or choose '
        'another source: captions = { from = "textfile" }',
        "column": "fill the column, name others to fall back to: "
        'captions = { fallback = ["caption"] }',
        "filename": f"these names hold no words: rename the files, or choose {_INSTANCE}",
        "instance": "give a prompt with words in it",
    }
    return ways[captions.kind] + '; or captions = { missing = "skip" }'


_INSTANCE = 'captions = { from = "instance", prompt = "..." }'


def listed(names: Sequence[str]) -> str:
    """The first of `names` and how many more there are."""
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(shown(name) for name in names[:LISTED]) + more


def _judge(
    draft: Draft,
    where: KeyPath,
    recipe: SourceRecipe,
    told: Sequence[tuple[str, ...]],
    captions: plan.Captions,
) -> None:
    """Warn of captions that the settings do not fit."""
    plain = [text for texts in told for text in texts]
    if is_random(captions) and plain and not any(_has_loose(t, captions) for t in plain):
        draft.warn(
            "no-effect",
            path_of(draft, where, TABLE, "shuffle" if captions.shuffle else "tag_dropout"),
            f"no caption in `{recipe.path}` has tags to shuffle or drop: none holds "
            f"`{captions.separator}` behind its first {max(captions.keep_tokens, 1)} tags",
            of="key",
        )
    if captions.trigger:
        around = f"{captions.prefix} {captions.suffix}"
        silent = [t for t in plain if not says(f"{around} {named(t, captions)}", captions.trigger)]
        message = f"{len(silent)} of {len(plain)} captions in `{recipe.path}` never say"
        message += f" `{captions.trigger}`"
        help = f'prefix = "{captions.trigger},"'
    else:
        silent = [text for text in plain if PLACEHOLDER in text]
        message = f"{len(silent)} of {len(plain)} captions in `{recipe.path}` say `{PLACEHOLDER}`"
        message += ", and no `trigger` is set: it is trained as it stands"
        help = 'trigger = "k4s4"'
    if silent:
        path = path_of(draft, where, TABLE, "trigger")
        draft.warn(
            "no-trigger",
            path if draft.given(path) else (*where, "path"),
            message,
            help=help,
            notes=tuple(shown(text) for text in silent[:LISTED]),
        )


def _has_loose(text: str, captions: plan.Captions) -> bool:
    """Whether shuffling or dropping tags may change the caption."""
    loose = len(tags_of(text, captions.separator)) - captions.keep_tokens
    return loose > 1 or (loose == 1 and captions.tag_dropout > 0 and captions.keep_tokens > 0)
