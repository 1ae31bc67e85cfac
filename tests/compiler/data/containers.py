"""The same pictures and captions as a folder, a tar, a table, a Parquet and an Arrow shard."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Told = Mapping[str, tuple[bytes, str]]
"""By name: a picture's file and its caption."""

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def as_folder(folder: Path, told: Told) -> Path:
    for name, (data, text) in told.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return folder


def as_table(path: Path, told: Told) -> Path:
    """JSON lines, or CSV by the ending, with paths below the table's folder."""
    if path.suffix == ".csv":
        lines = ["file_name,text", *(f'{name},"{text}"' for name, (_, text) in told.items())]
    else:
        rows = [{"file_name": name, "text": text} for name, (_, text) in told.items()]
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def member(name: str, data: bytes = b"", **rest: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A tar's member; `rest` are its other fields."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in rest.items():
        setattr(info, key, value)
    return info, data


def tar_of(path: Path, members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def as_tar(path: Path, told: Told) -> Path:
    members = []
    for name, (data, text) in told.items():
        members.append(member(name, data))
        members.append(member(str(Path(name).with_suffix(".txt")), text.encode()))
    return tar_of(path, members)


def rows_of(told: Told) -> pa.Table:
    """As Hugging Face writes pictures: `{bytes, path}`, and captions in `text`."""
    cells = [{"bytes": data, "path": name} for name, (data, _) in told.items()]
    texts = [text for _, text in told.values()]
    return pa.table({"image": pa.array(cells, IMAGE), "text": texts})


def as_parquet(path: Path, told: Told, rows: int = 3) -> Path:
    pq.write_table(rows_of(told), path, row_group_size=rows)
    return path


def as_arrow(path: Path, told: Told, *, stream: bool = True, rows: int = 3) -> Path:
    """A stream, as `datasets` saves it, or a file of Arrow's other format."""
    table = rows_of(told)
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path
