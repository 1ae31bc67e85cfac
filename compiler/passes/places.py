"""Where one source lies, and what is found there."""

from __future__ import annotations

import re
from pathlib import Path

from attrs import evolve

from compiler import plan
from compiler.data.scan import Scan, scan, shown
from compiler.data.sources.listing import PATH, SourceUnfit, Wanted
from compiler.data.sources.remote import HUB, Remote, copied, hub_parts, is_remote
from compiler.data.sources.spots import Spot, spot_of
from compiler.data.sources.streams import judge
from compiler.draft import Draft
from compiler.passes.captions import LISTED, listed
from compiler.passes.inherited import own_or_data
from compiler.passes.masks import stated
from compiler.schema import SourceRecipe
from compiler.spans import KeyPath

HUB_PAGE = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/datasets/([\w.-]+/[\w.-]+)(?:/tree/[^/]+)?/?"
)


def resolve_spot(draft: Draft, where: KeyPath, recipe: SourceRecipe) -> Spot | None:
    """What the source's path leads to; None after an error."""
    if where[2] in draft.entangled:
        return None  # it may be a whole disk
    if not recipe.path.strip():
        draft.error("missing-path", (*where, "path"), "`path` is empty", help='path = "pictures"')
        return None
    try:
        path = _path(draft, where, recipe)
        if path is None:
            return None
        remote = is_remote(recipe.path)
        files = () if remote and not path.is_dir() else recipe.files
        spot = spot_of(path, recipe.format, files)
        if recipe.streaming and spot is not None:
            judge(recipe.path, spot.kind)
        what = "does not exist"
    except SourceUnfit as error:
        _report(draft, where, recipe, error)
        return None
    except (OSError, ValueError, RuntimeError) as error:
        spot, what = None, f"is no path: {error}"
    if spot is None:
        draft.error(
            "missing-path",
            (*where, "path"),
            f"no file matches `{recipe.path}`"
            if "*" in recipe.path
            else f"the data folder `{recipe.path}` {what}",
            help=_where_else(draft, recipe.path),
        )
        return None
    draft.decide((*where, "format"), spot.kind, by="decided", why="by what lies at `path`")
    draft.decide((*where, "files"), recipe.files or "all")
    draft.decide((*where, "streaming"), recipe.streaming)
    return spot


def _where_else(draft: Draft, path: str) -> str:
    """What was probably meant by a path that leads to nothing."""
    looked = f"paths are relative to the recipe: looked in {shown(str(draft.folder))}"
    if "$" in path or "%" in path:
        return f"environment variables are not read into recipes; {looked}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and hub_parts(HUB + path) is not None:
        return f'{looked}. A data set of the hub is path = "{HUB}{path}"'
    return looked


def _path(draft: Draft, where: KeyPath, recipe: SourceRecipe) -> Path | None:
    """The absolute path of the source, or of the copy of a remote one; None after an error."""
    if not is_remote(recipe.path):
        if recipe.streaming:
            draft.error(
                "no-effect",
                (*where, "streaming"),
                "`streaming` has no effect: the data lie on this machine",
            )
            return None
        return (draft.folder / Path(recipe.path).expanduser()).absolute()
    if recipe.path.startswith(HUB) and hub_parts(recipe.path) is None:
        draft.error(
            "bad-path",
            (*where, "path"),
            f"`{recipe.path}` is no data set of the hub",
            help='path = "hub:owner/name", or "hub:owner/name@revision"',
        )
        return None
    page = HUB_PAGE.fullmatch(recipe.path)
    if page is not None:
        draft.error(
            "bad-path",
            (*where, "path"),
            f"`{recipe.path}` is a page about a data set, and no data",
            help=f'path = "{HUB}{page[1]}"',
        )
        return None
    if recipe.streaming:
        judge(recipe.path)
    remote = Remote(url=recipe.path, files=recipe.files, streamed=recipe.streaming)
    copy = copied(draft.downloads, remote)
    if copy is None:
        draft.remotes.append(remote)
        draft.error(
            "not-downloaded",
            (*where, "path"),
            f"what `{recipe.path}` holds is not known on this machine yet"
            if recipe.streaming
            else f"`{recipe.path}` has not been copied to this machine yet",
            help=_HOW_STREAMED if recipe.streaming else _HOW,
        )
        return None
    draft.copies.append(remote)
    return Path(copy)


def _have(count: int, path: str) -> str:
    return f"{_images(count, path)} {'has' if count == 1 else 'have'}"


def _images(count: int, path: str) -> str:
    return f"1 image of `{path}`" if count == 1 else f"{count} images of `{path}`"


_HOW = "`tuner run` copies it first, once; a plan opens no connection"
_HOW_STREAMED = "`tuner run` looks into it first, once; a plan opens no connection"


def scanned(
    draft: Draft, where: KeyPath, recipe: SourceRecipe, spot: Spot, captions: plan.Captions
) -> tuple[Scan, str] | None:
    """All that lies there, and the images' column; None after an error."""
    if not _judge_image(draft, where, recipe, spot):
        return None
    try:
        if spot.kind == "folder":
            return scan(Path(spot.root), draft.index), ""
        from compiler.data.sources.gather import gather

        image = "" if recipe.image == "auto" else recipe.image
        wanted = Wanted(image=image, captions=captions)
        found, column = gather(spot, wanted, draft.downloads, draft.index)
    except SourceUnfit as error:
        _report(draft, where, recipe, error)
        return None
    except OSError as error:
        draft.error(
            "unreadable-folder",
            (*where, "path"),
            f"`{recipe.path}` can't be read: {error.strerror or error}",
        )
        return None
    if found.unlisted:
        draft.unlisted += found.unlisted
        draft.error(
            "not-downloaded",
            (*where, "path"),
            f"what {len(found.unlisted)} files of `{recipe.path}` hold is not known on this "
            "machine yet",
            help=_HOW_STREAMED,
        )
        return None
    draft.decide((*where, "image"), column or "none", by="decided", why="by its name")
    draft.fetched += found.fetched
    urls = [url for url, _ in found.later]
    if found.absent:
        draft.absent += [*found.absent, *urls]
        draft.error(
            "not-downloaded",
            (*where, "path"),
            f"{_have(len(found.absent), recipe.path)} not been copied to this machine yet",
            help=f"{_HOW}: {listed(found.absent)}",
        )
        return None
    if urls and own_or_data(draft, where, "broken") == "error":
        draft.absent += urls
        draft.error(
            "not-downloaded",
            (*where, "path"),
            f"{_images(len(urls), recipe.path)} could not be reached when last asked for",
            help='`tuner run` asks again; to go on without, broken = "skip"',
            notes=tuple(str(fault) for _, fault in found.later[:LISTED]),
        )
        return None
    draft.later += urls
    faults = sorted((*found.faults, *(fault for _, fault in found.later)), key=lambda f: f.path)
    return evolve(found, faults=tuple(faults)), column


def _judge_image(draft: Draft, where: KeyPath, recipe: SourceRecipe, spot: Spot) -> bool:
    """Refuse what has no effect or can't be read here."""
    if recipe.image != "auto" and spot.kind in ("folder", "webdataset"):
        draft.error(
            "no-effect",
            (*where, "image"),
            "`image` has no effect: it names a column, and this is no shard or table",
            of="key",
        )
        return False
    mask, path = stated(draft, where, recipe)
    if mask is not None and mask.source == "file" and not mask.folder and spot.kind != "folder":
        draft.error(
            "conflict",
            path,
            "masks that lie beside the images are only read from folders",
            help='mask = { from = "file", folder = "masks" }'
            + (', or mask = "none" for this source' if path == ("data", "mask") else ""),
        )
        return False
    return True


def _report(draft: Draft, where: KeyPath, recipe: SourceRecipe, error: SourceUnfit) -> None:
    """Blame the source's key, or that of its captions where it is stated."""
    keys = error.key.split(".")
    path = (*where, *keys)
    if not draft.given(path) and draft.given(("data", *keys)):
        path = ("data", *keys)
    if not draft.given(path):
        path = (*where, "path")
    message = error.message
    if error.code in ("missing-path", "unreadable-source"):
        message = f"`{recipe.path}`: {message}"
    help = error.help.replace(PATH, recipe.path.rstrip("/"))
    draft.report("error", error.code, path, message, help=help)
