"""Parquet and Arrow shards: pictures in one column, captions in others.

The picture's column holds `{bytes, path}` as Hugging Face writes it, plain binary, or texts: paths
beside the shard, or URLs. Of a struct the bytes count and `path` is the picture's name; where the
bytes are absent, the path is read. Shards of any length are read a few rows at a time. pyarrow is
imported here and nowhere else in the compiler, and only where a recipe has such a source.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import IO, Any

from attrs import evolve, frozen

from compiler.data.captions import lines_of_value
from compiler.data.scan import Fault
from compiler.data.sources.listing import Entry, Listing, SourceUnfit, Wanted, sized

IMAGES = (
    *("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "content"),
    *("file_name", "image_path", "path", "file", "filename", "image_url", "url"),
)
"""Names under which the picture's column is looked for, in this order, in whatever case."""
NAMES = ("file_name", "__key__", "filename", "name")
"""Columns that name the picture of a binary column."""

Seen = Callable[[bytes | None], None]

_ROWS = 32  # read at a time: their pictures are held in memory


@frozen(kw_only=True)
class _Roles:
    """What each column of a shard is for."""

    image: str
    name: str  # "" without one
    texts: tuple[str, ...]  # of captions, the first that says something counts

    @property
    def all(self) -> list[str]:
        return list(dict.fromkeys([self.image, *([self.name] if self.name else []), *self.texts]))


def list_parquet(
    path: str, wanted: Wanted, file: IO[bytes] | None = None, seen: Seen | None = None
) -> Listing:
    """All rows of the Parquet file at `path`, or in an open `file`; `seen` is told of each row's
    picture. Raises OSError and SourceUnfit."""
    pyarrow()
    parquet = importlib.import_module("pyarrow.parquet")
    os.stat(path)
    with _guarded() as broken, parquet.ParquetFile(file or path) as shard:
        roles = _roles(path, shard.schema_arrow, wanted)
        batches = shard.iter_batches(batch_size=_ROWS, columns=roles.all)
        return _listed(batches, roles, shard.schema_arrow, seen)
    return Listing(faults=(("", f"not a whole Parquet file: {broken[0]}"),))


def list_arrow(path: str, wanted: Wanted) -> Listing:
    """All rows of the Arrow file or stream at `path` (`.feather` too). Raises OSError and
    SourceUnfit."""
    pyarrow()
    os.stat(path)
    with _guarded() as broken, opened_arrow(path) as (schema, batches):
        roles = _roles(path, schema, wanted)
        return _listed((validated(batch.select(roles.all)) for batch in batches), roles, schema)
    return Listing(faults=(("", f"not a whole Arrow file: {broken[0]}"),))


@cache
def pyarrow() -> Any:
    """The library. Raises SourceUnfit where it is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise SourceUnfit(
            "missing-package",
            "Parquet and Arrow files are read with the package pyarrow, which is not installed "
            "here",
            help='pip install "tuner[parquet]"',
        )
    return importlib.import_module("pyarrow")


@contextmanager
def opened_arrow(path: str) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Schema and batches of an Arrow file, or of a stream, which is what `datasets` saves."""
    pa = pyarrow()
    with pa.memory_map(path) as file:
        try:
            reader = pa.ipc.open_file(file)
        except pa.ArrowInvalid:
            file.seek(0)
            stream = pa.ipc.open_stream(file)
            yield stream.schema, iter(stream)
            return
        count = reader.num_record_batches
        yield reader.schema, (reader.get_batch(number) for number in range(count))


def validated(columns: Any) -> Any:
    """The batch or column itself. Arrow takes offsets in a file at their word, so that damaged
    ones would read outside of it: raises ArrowInvalid for those."""
    columns.validate(full=True)
    return columns


@contextmanager
def _guarded() -> Iterator[list[str]]:
    """What a damaged shard makes pyarrow raise, as text in the list."""
    broken: list[str] = []
    try:
        yield broken
    except (pyarrow().ArrowException, OSError, ValueError, MemoryError) as error:
        broken.append((str(error) or type(error).__name__).splitlines()[0])


def _roles(path: str, schema: Any, wanted: Wanted) -> _Roles:
    label = os.path.basename(path)
    image = _image(label, schema, wanted.image)
    texts: list[str] = []
    if wanted.captions.kind == "column":
        asked = [wanted.captions.column, *wanted.captions.fallback]
        for name, key in zip(asked, ("column", *["fallback"] * len(asked)), strict=False):
            texts.append(_text_column(label, schema, name, f"captions.{key}"))
    binary = image_kind(schema.field(image).type) == "binary"
    name = next((n for n in NAMES if binary and _is_text(schema, n)), "")
    return _Roles(image=image, name=name, texts=tuple(texts))


def _image(label: str, schema: Any, asked: str) -> str:
    if asked:
        _require(label, schema, asked, "image")
        if not image_kind(schema.field(asked).type):
            raise SourceUnfit(
                "wrong-column",
                f"the column `{asked}` of `{label}` holds {schema.field(asked).type}, no images",
                help=_columns_of(schema),
                key="image",
            )
        return asked
    by_name = {name.lower(): name for name in reversed(schema.names)}
    found = [by_name[n] for n in IMAGES if n in by_name and _holds_images(schema, by_name[n])]
    others = [n for n in schema.names if image_kind(_type(schema, n)) in ("struct", "binary")]
    if found or len(others) == 1:
        return str((found or others)[0])
    raise SourceUnfit(
        "wrong-column",
        f"no column of `{label}` is known to hold images",
        help=f'{_columns_of(schema)}\nsay which one: image = "..."',
        key="path",
    )


def _holds_images(schema: Any, name: str) -> bool:
    return bool(image_kind(_type(schema, name)))


def _type(schema: Any, name: str) -> Any:
    """The type of a column; None where several have the name."""
    return schema.field(name).type if schema.names.count(name) == 1 else None


def image_kind(kind: Any) -> str:
    """ "struct", "binary" or "text" for a type that may hold pictures, else ""."""
    types = pyarrow().types
    if kind is None:
        return ""
    if types.is_struct(kind):
        inner = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)}
        return "struct" if image_kind(inner.get("bytes")) == "binary" else ""
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "binary"
    return "text" if types.is_string(kind) or types.is_large_string(kind) else ""


def _text_column(label: str, schema: Any, name: str, key: str) -> str:
    _require(label, schema, name, key)
    kind, types = schema.field(name).type, pyarrow().types
    inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    inner = inner.value_type if types.is_dictionary(inner) else inner
    if image_kind(inner) != "text" and not types.is_null(inner):
        raise SourceUnfit(
            "wrong-column",
            f"the column `{name}` of `{label}` holds {kind}, no text",
            help=_columns_of(schema),
            key=key,
        )
    return name


def _require(label: str, schema: Any, name: str, key: str) -> None:
    count = schema.names.count(name)
    if count != 1:
        raise SourceUnfit(
            "wrong-column",
            f"`{label}` has {'no column' if count == 0 else f'{count} columns'} `{name}`",
            help=_columns_of(schema),
            key=key,
        )


def _columns_of(schema: Any) -> str:
    return "it has " + ", ".join(_spelt(schema))


def _spelt(schema: Any) -> tuple[str, ...]:
    return tuple(f"`{field.name}` ({_short(field.type)})" for field in schema)


def _short(kind: Any) -> str:
    text = str(kind)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_text(schema: Any, name: str) -> bool:
    return schema.names.count(name) == 1 and image_kind(schema.field(name).type) == "text"


def _listed(
    batches: Iterator[Any], roles: _Roles, schema: Any, seen: Seen | None = None
) -> Listing:
    """Raises what pyarrow raises; what was read before that is lost with it, for a shard that
    breaks off is not to be trusted in part."""
    entries: list[Entry] = []
    for batch in batches:
        data, names = image_cells(batch.column(roles.image))
        if roles.name:
            names = _named(batch.column(roles.name).to_pylist(), roles)
        texts = [(name, batch.column(name).to_pylist()) for name in roles.texts]
        for row in range(batch.num_rows):
            if seen is not None:
                seen(data[row])
            entry = _entry(data[row], names[row], len(entries))
            told = [(name, values[row]) for name, values in texts]
            entries.append(with_lines(entry, told))
    return Listing(entries=tuple(entries), columns=_spelt(schema), image=roles.image)


def image_cells(column: Any) -> tuple[list[bytes | None], list[str | None]]:
    """The pictures of a column, and their names or paths; either may be None."""
    kind = image_kind(column.type)
    if kind == "text":
        return [None] * len(column), column.to_pylist()
    if kind == "binary":
        return column.to_pylist(), [None] * len(column)
    parts = dict(zip((field.name for field in column.type), column.flatten(), strict=True))
    paths = parts.get("path")
    if paths is None or image_kind(paths.type) != "text":
        return parts["bytes"].to_pylist(), [None] * len(column)
    return parts["bytes"].to_pylist(), paths.to_pylist()


def _named(names: Sequence[str | None], roles: _Roles) -> list[str | None]:
    """A key of WebDataset gets the ending that its column is called by."""
    ending = f".{roles.image}" if roles.name == "__key__" else ""
    return [name + ending if name else None for name in names]


def _entry(data: bytes | None, name: str | None, row: int) -> Entry:
    name = (name or "").removeprefix("./").lstrip("/") if data is not None else name
    if data is not None:
        found = sized(name or "", data, at=row)
        return found or Entry(
            name=name or "", at=row, why="not an image: the content is of no format that is read"
        )
    if name:
        return Entry(name=name, file=name)
    return Entry(at=row, why="no image in this row")


def with_lines(entry: Entry, told: Sequence[tuple[str, Any]]) -> Entry:
    """The entry with the caption's lines: of the first column that says something."""
    for name, value in told:
        lines = lines_of_value(value, name, "")
        if isinstance(lines, Fault):
            return evolve(entry, no_lines=lines.why)
        if any(line.strip() for line in lines):
            return evolve(entry, lines=tuple(lines))
    return entry
