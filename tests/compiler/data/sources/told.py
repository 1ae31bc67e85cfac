"""Pictures that every kind of container is made of, and what is found in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from compiler.data.captions import all_captions
from compiler.data.scan import Picture, Scan
from compiler.data.sources import gather
from compiler.data.sources.listing import Wanted
from compiler.data.sources.spots import spot_of
from compiler.plan import Captions
from tests.compiler.data import containers
from tests.compiler.data.pictures import encoded, picture

JPEG = encoded(picture(70, 50), "JPEG")
PNG = encoded(picture(40, 30, seed=1), "PNG")
TOLD = {
    "dog/01.jpg": (encoded(picture(64, 48, seed=2), "JPEG"), "a dog"),
    "dog/00.jpg": (JPEG, "a first dog"),
    "b.png": (PNG, "second"),
    "a/deep/\u00fc 1.webp": (encoded(picture(33, 44), "WEBP"), "K\u00e4se, with a comma"),
    "0.gif": (encoded(picture(20, 21), "GIF"), "none"),
}
KINDS = ("table", "csv", "webdataset", "parquet", "arrow", "feather")


def rules(kind: str = "column", **changes: Any) -> Captions:
    given: dict[str, Any] = {"prompt": "", "multiline": "join", "key": "caption"}
    given |= {"column": "text", "fallback": ()} if kind == "column" else {}
    return Captions(
        kind=kind,  # type: ignore[arg-type]
        missing="error",
        dropout=0.0,
        **(given | changes),
    )


def found(path: Path, captions: Captions | None = None, **rest: Any) -> Scan:
    """All of a source; `rest` may hold its format, files, image column, downloads and index."""
    spot = spot_of(path, rest.get("format", "auto"), rest.get("files", ()))
    assert spot is not None
    said = captions or rules("textfile" if spot.kind in ("folder", "webdataset") else "column")
    wanted = Wanted(image=rest.get("image", ""), captions=said)
    downloads = rest.get("downloads", path.parent / "downloads")
    return gather.gather(spot, wanted, downloads, rest.get("index"))[0]


def why(result: Scan) -> dict[str, str]:
    return {os.path.basename(fault.path): fault.why for fault in result.faults}


def texts(result: Scan, captions: Captions) -> list[Any]:
    return all_captions("", result, result.pictures, captions)


def made(folder: Path, kind: str) -> Path:
    if kind in ("table", "csv"):
        ending = "jsonl" if kind == "table" else "csv"
        return containers.as_table(containers.as_folder(folder, TOLD) / f"t.{ending}", TOLD)
    folder.mkdir(exist_ok=True)
    if kind == "webdataset":
        return containers.as_tar(folder / "t.tar", TOLD)
    if kind == "parquet":
        return containers.as_parquet(folder / "t.parquet", TOLD)
    return containers.as_arrow(folder / f"t.{kind}", TOLD, stream=kind == "arrow")


def item(one: Picture, kind: str, column: str = "") -> Any:
    from compiler.data.manifest import Item

    return Item(file=one.file, at=one.at, bytes=one.bytes, kind=kind, column=column)


def whole_names(result: Scan) -> dict[str, str]:
    return {fault.path: fault.why for fault in result.faults}


def heic_tar(folder: Path, data: bytes) -> Path:
    return containers.tar_of(folder / "t.tar", [containers.member("a.heic", data)])
