"""What encoders made, kept by content: append-only safetensors shards and an SQLite index.

    cache-1.sqlite         entries (key -> shard and offsets), shards, hashes of files
    shards-1/NAME.safetensors

An entry is a dict of tensors. A shard is written beside, fsynced and renamed, and only then are its
rows committed: whatever is killed at whatever instant, a row points at a whole file. At worst a
file without rows remains (`runtime.data.keep` removes it). Shards never change, so they are
memory-mapped and readers need no lock; several processes may write at once, each its own shards. A
shard that was deleted or cut off counts as absent, and what it held as missing. Deleting the folder
costs only time. The index must lie on a disk with working locks (not on NFS).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from compiler.data.nameless import mapped
from compiler.data.stamp import Stamp
from runtime.data.packed import spans
from runtime.data.shards import Part, Shards
from runtime.data.store import INDEX, SHARDS, CacheNotWritable, Store
from runtime.errors import RunFailed
from runtime.files import partial_file

SHARD_BYTES = 64 << 20
"""A shard is written when it is this large, or `SHARD_SECONDS` after its first entry."""
SHARD_SECONDS = 30.0
HELD = 4096
"""Entries whose places stay in memory; those of more lie on the disk."""

_NOWHERE = -1
"""In place of a shard's number: SQLite counts from 1."""
_ABSENT = (_NOWHERE, _NOWHERE, b"")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # as safetensors names them

_USE = "INSERT OR REPLACE INTO uses VALUES (?, ?, ?)"

Entry = dict[str, Tensor]
Rows = NDArray[np.int64]
Layout = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
"""Of an entry: (name, type, shape) of each tensor, in the order of its offsets."""


class CacheIncomplete(RunFailed):
    """An entry that should be there is not."""


@frozen(kw_only=True)
class Located:
    """Where many entries lie, in arrays: about 30 bytes an entry, of many on the disk."""

    shards: NDArray[np.int32]
    layouts: NDArray[np.int32]
    offsets: NDArray[np.int64]  # (entries, most tensors of one entry)

    def lacking(self) -> NDArray[np.bool_]:
        """Of each entry whether it was not there when it was looked for."""
        found: NDArray[np.bool_] = self.shards == _NOWHERE
        return found

    def part(self, rows: slice) -> Located:
        """Some of them."""
        return Located(
            shards=self.shards[rows], layouts=self.layouts[rows], offsets=self.offsets[rows]
        )


class Cache:
    """The cache in `folder`. May be used by several threads. Making one writes nothing."""

    def __init__(self, folder: Path, *, run: str = "") -> None:
        """For the run in the folder `run`, which is noted to use what it writes."""
        self.folder = folder
        self.run = run
        self.store = Store(folder / INDEX)
        self._shard_folder = folder / SHARDS
        self._pending: dict[bytes, Entry] = {}
        self._pending_bytes = 0
        self._pending_since = 0.0
        self._layouts: dict[int, Layout] = {}
        self._shards = Shards(self.store.lock)
        self.folders: dict[tuple[Path, tuple[Stamp, ...]], str] = {}  # of `hashes.folder_hash`
        self.filled: dict[tuple[Any, ...], Located] = {}  # of `runtime.data.located`

    def missing(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of `keys` that have no entry."""
        wanted = set(keys)
        self._shards.forget_missing()
        return wanted - {row[0] for row in self._rows(wanted) if self._is_whole(row[1])}

    def _noted(self, shards: set[int]) -> bool:
        """Note that the run uses these; whether all were still there."""
        if not (self.run and shards):
            return True
        self._note(self.run, shards)
        numbers = sorted(shards)
        there = list(self.store.rows("SELECT id FROM shards WHERE id IN (?)", numbers))
        return len(there) == len(shards)

    def get(self, key: bytes) -> Entry:
        """The entry of `key`, memory-mapped. Raises CacheIncomplete if there is none."""
        return self.read(self.locate([key]), 0)

    def locate(self, keys: Sequence[bytes]) -> Located:
        """Where the entries of `keys` lie. Raises CacheIncomplete if one is missing.

        Shards stay readable from here on, even if their files are removed.
        """
        found = self.find(keys)
        if absent := int(found.lacking().sum()):
            raise CacheIncomplete(
                f"{absent} of {len(keys)} entries are not in the cache {self.folder}",
                help="run the recipe again: what is missing is made anew",
            )
        return self.settled(found)

    def find(self, keys: Sequence[bytes], *, noted: bool = False) -> Located:
        """As `locate`, where entries may be missing. `noted`: the run uses those that are there
        from here on, so that they are not pruned while it makes the others."""
        while True:
            found = self._look(keys)
            shards = set(np.unique(found.shards[~found.lacking()]).tolist())
            if not noted or self._noted(shards):
                return found

    def _look(self, keys: Sequence[bytes]) -> Located:
        shards, layouts = np.empty(len(keys), np.int32), np.empty(len(keys), np.int32)
        offsets = np.zeros((len(keys), 0), np.int64)
        self._shards.forget_missing()
        for span in spans(len(keys)):
            found = self._find(keys[span])
            if (width := found.offsets.shape[1]) > offsets.shape[1]:
                offsets, narrow = np.zeros((len(keys), width), np.int64), offsets
                offsets[:, : narrow.shape[1]] = narrow
            shards[span], layouts[span] = found.shards, found.layouts
            offsets[span, :width] = found.offsets
        return Located(shards=shards, layouts=layouts, offsets=offsets)

    def settled(self, located: Located) -> Located:
        """The same, of many entries on the disk."""
        return located if len(located.shards) <= HELD else self._on_disk(located)

    def _on_disk(self, located: Located) -> Located:
        """The same, mapped; as it is in a cache that can't be written."""
        arrays = (located.shards, located.layouts, located.offsets)
        try:
            shards, layouts, offsets = mapped([array.data for array in arrays], self.folder)
        except OSError:
            return located
        return Located(
            shards=np.frombuffer(shards, np.int32),
            layouts=np.frombuffer(layouts, np.int32),
            offsets=np.frombuffer(offsets, np.int64).reshape(located.offsets.shape),
        )

    def _find(self, keys: Sequence[bytes]) -> Located:
        whole = lru_cache(maxsize=None)(self._is_whole)
        rows = {row[0]: row[1:] for row in self._rows(set(keys)) if whole(row[1])}
        found = [rows.get(key, _ABSENT) for key in keys]
        widest = max((len(row[2]) for row in found), default=0)
        places = b"".join([row[2].ljust(widest, b"\0") for row in found])
        return Located(
            shards=np.array([row[0] for row in found], np.int32),
            layouts=np.array([row[1] for row in found], np.int32),
            offsets=np.frombuffer(places, np.int64).reshape(len(keys), widest // 8),
        )

    def read(self, located: Located, number: int) -> Entry:
        """Entry `number` of those located, memory-mapped (a write to it stays in this process)."""
        shard = self._shards.data(int(located.shards[number]))
        entry: Entry = {}
        layout = self._layout(int(located.layouts[number]))
        for (name, dtype, shape), offset in zip(layout, located.offsets[number], strict=False):
            start = int(offset)
            count = torch.Size(shape).numel() * dtype.itemsize
            entry[name] = shard[start : start + count].view(dtype).view(shape)
        return entry

    def stack(self, located: Located, numbers: Rows, names: Sequence[str]) -> Entry:
        """The tensors `names` of many entries, each copied into one tensor (entries, *shape).

        Names that the first entry lacks are left out; all entries must agree with it in what is
        asked for. What was read does not stay resident. Raises ShardDamaged.
        """
        first = self._layout(int(located.layouts[numbers[0]]))
        wanted = {name: (dtype, shape) for name, dtype, shape in first if name in names}
        made = {
            name: np.empty((len(numbers), torch.Size(shape).numel() * dtype.itemsize), np.uint8)
            for name, (dtype, shape) in wanted.items()
        }
        self._shards.copy(list(self._parts(located, numbers, wanted, made)))
        self.let_go()
        return {
            name: torch.from_numpy(made[name]).view(dtype).view(len(numbers), *shape)
            for name, (dtype, shape) in wanted.items()
        }

    def _parts(
        self,
        located: Located,
        numbers: Rows,
        wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        made: Mapping[str, NDArray[np.uint8]],
    ) -> Iterator[Part]:
        """What is to be copied into the rows of `made`."""
        out = {name: rows.reshape(-1).data for name, rows in made.items()}
        each = zip(
            located.shards[numbers].tolist(),
            located.layouts[numbers].tolist(),
            located.offsets[numbers].tolist(),
            strict=True,
        )
        for place, (shard, layout, offsets) in enumerate(each):
            for (name, dtype, shape), start in zip(self._layout(layout), offsets, strict=False):
                if name in wanted:
                    assert wanted[name] == (dtype, shape), "entries of one bucket are alike"
                    length = made[name].shape[1]
                    yield Part(shard, start, out[name][place * length : (place + 1) * length])

    def let_go(self) -> None:
        """What was read so far has been copied: from time to time its pages are given back."""
        self._shards.let_go()

    def put(self, key: bytes, entry: Mapping[str, Tensor]) -> None:
        """Add an entry; it is safe on disk after the next `flush`, which large amounts cause.

        Raises CacheNotWritable; what was not yet flushed is then lost, and nothing else.
        """
        # copies: views of one storage can't be saved, and would keep all of it in memory
        held = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in entry.items()
        }
        with self.store.lock:
            if not self._pending:
                self._pending_since = time.monotonic()
            self._pending[key] = held
            self._pending_bytes += sum(tensor.nbytes for tensor in held.values())
            waited = time.monotonic() - self._pending_since
            if self._pending_bytes >= SHARD_BYTES or waited >= SHARD_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write what was put as one shard and commit it. Raises CacheNotWritable."""
        with self.store.lock:
            if not self._pending:
                return
            pending, self._pending = self._pending, {}
            size, self._pending_bytes = self._pending_bytes, 0
            count = "1 entry" if len(pending) == 1 else f"{len(pending)} entries"
            with self.store.explained(f"{count} of {size / 2**20:,.1f} MiB"):
                self._write(pending)

    def _write(self, pending: Mapping[bytes, Entry]) -> None:
        payload = save(
            {
                f"{key.hex()}/{name}": tensor
                for key, entry in pending.items()
                for name, tensor in entry.items()
            }
        )
        path = self._shard_folder / f"{uuid.uuid4().hex}.safetensors"
        self._shard_folder.mkdir(parents=True, exist_ok=True)
        with partial_file(path) as partial:
            partial.write_bytes(payload)
        try:
            self._commit(path.name, payload, pending)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def used_by(self, run: str, *located: Located) -> None:
        """Note that a run reads these entries; not in a cache that can't be written."""
        self._note(run, {int(number) for each in located for number in np.unique(each.shards)})

    def _note(self, run: str, shards: set[int]) -> None:
        now = time.time()
        with suppress(CacheNotWritable), self.store.writing() as database:
            database.executemany(_USE, [(run, shard, now) for shard in sorted(shards)])

    def close(self) -> None:
        """Flush and let go of the index; mapped entries stay valid."""
        self.flush()
        self.store.close()

    def _rows(self, keys: Iterable[bytes]) -> Iterable[tuple[Any, ...]]:
        query = "SELECT key, shard, layout, offsets FROM entries WHERE key IN (?)"
        return self.store.rows(query, sorted(keys))

    def _commit(self, name: str, payload: bytes, pending: Mapping[bytes, Entry]) -> None:
        head = int.from_bytes(payload[:8], "little")
        places = json.loads(payload[8 : 8 + head])
        digest = hashlib.sha256(payload).digest()
        with self.store.writing() as database:
            shard = database.execute(
                "INSERT INTO shards (name, bytes, sha256, written) VALUES (?, ?, ?, ?)",
                (name, len(payload), digest, time.time()),
            ).lastrowid
            for key, entry in pending.items():
                parts = [(part, places[f"{key.hex()}/{part}"]) for part in entry]
                text = json.dumps([[part, p["dtype"], p["shape"]] for part, p in parts])
                offsets = np.array([8 + head + p["data_offsets"][0] for _, p in parts], np.int64)
                database.execute(
                    "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)",
                    (key, shard, _layout_number(database, text), offsets.tobytes()),
                )
            if self.run:
                database.execute(_USE, (self.run, shard, time.time()))

    def _is_whole(self, number: int) -> bool:
        """Whether a shard is there, neither deleted nor cut off."""
        with self.store.lock:
            if number not in self._shards:
                query = "SELECT name, bytes FROM shards WHERE id IN (?)"
                for name, size in self.store.rows(query, [number]):
                    self._shards.add(number, self._shard_folder / name, size)
            return number in self._shards and self._shards.whole(number)

    def _layout(self, number: int) -> Layout:
        if number not in self._layouts:
            query = "SELECT text FROM layouts WHERE id IN (?)"
            ((text,),) = self.store.rows(query, [number])
            self._layouts[number] = tuple(
                (name, _DTYPES[dtype], tuple(shape)) for name, dtype, shape in json.loads(text)
            )
        return self._layouts[number]


def _layout_number(database: sqlite3.Connection, text: str) -> int:
    database.execute("INSERT OR IGNORE INTO layouts (text) VALUES (?)", (text,))
    row = database.execute("SELECT id FROM layouts WHERE text = ?", (text,)).fetchone()
    return int(row[0])
