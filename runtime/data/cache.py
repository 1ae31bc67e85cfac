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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
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
from runtime.data.packed import Keys, spans
from runtime.data.pages import not_resident
from runtime.data.store import INDEX, SHARDS, CacheNotWritable, Store
from runtime.errors import RunFailed
from runtime.files import partial_file

SHARD_BYTES = 64 << 20
"""A shard is written when it is this large, or `SHARD_SECONDS` after its first entry."""
SHARD_SECONDS = 30.0
READS_HELD = 64
"""After so many reads the pages of shards leave this process (not the page cache). It is reads that
are counted, not bytes: to read 64 KiB the system may map as much as 2 MiB around them."""
HELD = 4096
"""Entries whose places stay in memory; those of more lie on the disk."""

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


class Cache:
    """The cache in `folder`. May be used by several threads. Making one writes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / INDEX)
        self._shard_folder = folder / SHARDS
        self._pending: dict[bytes, Entry] = {}
        self._pending_bytes = 0
        self._pending_since = 0.0
        self._layouts: dict[int, Layout] = {}
        self._maps: dict[int, Tensor | None] = {}
        self._touched: set[int] = set()  # shards read since their pages were given back
        self._reads = 0  # since then
        self.folders: dict[tuple[Path, tuple[Stamp, ...]], str] = {}  # of `hashes.folder_hash`

    def missing(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of `keys` that have no entry."""
        wanted = set(keys)
        self._maps = {number: shard for number, shard in self._maps.items() if shard is not None}
        return wanted - {row[0] for row in self._rows(wanted) if self._mapped(row[1]) is not None}

    def lacks(self, keys: Keys) -> NDArray[np.bool_]:
        """Of each of `keys` whether it has no entry."""
        found = np.zeros(len(keys), bool)
        for span in spans(len(keys)):
            part = keys[span]
            absent = self.missing(part)
            found[span] = [key in absent for key in part]
        return found

    def get(self, key: bytes) -> Entry:
        """The entry of `key`, memory-mapped. Raises CacheIncomplete if there is none."""
        return self.read(self.locate([key]), 0)

    def locate(self, keys: Sequence[bytes]) -> Located:
        """Where the entries of `keys` lie. Raises CacheIncomplete if one is missing.

        Shards stay readable from here on, even if their files are removed.
        """
        shards, layouts = np.empty(len(keys), np.int32), np.empty(len(keys), np.int32)
        offsets = np.zeros((len(keys), 0), np.int64)
        absent = 0
        for span in spans(len(keys)):
            found = self._locate(keys[span])
            if isinstance(found, set):
                absent += len(found)
                continue
            if (width := found.offsets.shape[1]) > offsets.shape[1]:
                offsets, narrow = np.zeros((len(keys), width), np.int64), offsets
                offsets[:, : narrow.shape[1]] = narrow
            shards[span], layouts[span] = found.shards, found.layouts
            offsets[span, :width] = found.offsets
        if absent:
            raise CacheIncomplete(
                f"{absent} of {len(keys)} entries are not in the cache {self.folder}",
                help="run the recipe again: what is missing is made anew",
            )
        located = Located(shards=shards, layouts=layouts, offsets=offsets)
        return located if len(keys) <= HELD else self._on_disk(located)

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

    def _locate(self, keys: Sequence[bytes]) -> Located | set[bytes]:
        """Where these entries lie, or which of them are missing."""
        if absent := self.missing(keys):
            return absent
        found = {row[0]: row[1:] for row in self._rows(set(keys))}
        rows = [found[key] for key in keys]
        widest = max((len(row[2]) // 8 for row in rows), default=0)
        offsets = np.zeros((len(rows), widest), np.int64)
        for number, (_, _, packed) in enumerate(rows):
            offsets[number, : len(packed) // 8] = np.frombuffer(packed, np.int64)
        return Located(
            shards=np.array([row[0] for row in rows], np.int32),
            layouts=np.array([row[1] for row in rows], np.int32),
            offsets=offsets,
        )

    def read(self, located: Located, number: int) -> Entry:
        """Entry `number` of those located, memory-mapped (a write to it stays in this process)."""
        shard = self._located(int(located.shards[number]))
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
        asked for. What was read does not stay resident.
        """
        first = self._layout(int(located.layouts[numbers[0]]))
        wanted = {name: (dtype, shape) for name, dtype, shape in first if name in names}
        made = {
            name: np.empty((len(numbers), torch.Size(shape).numel() * dtype.itemsize), np.uint8)
            for name, (dtype, shape) in wanted.items()
        }
        for place, number in enumerate(numbers.tolist()):
            shard = self._located(int(located.shards[number])).numpy()
            layout = self._layout(int(located.layouts[number]))
            for part, (name, dtype, shape) in enumerate(layout):
                if name in wanted:
                    assert wanted[name] == (dtype, shape), "entries of one bucket are alike"
                    start = int(located.offsets[number, part])
                    rows = made[name]
                    rows[place] = shard[start : start + rows.shape[1]]
        self.let_go()
        return {
            name: torch.from_numpy(made[name]).view(dtype).view(len(numbers), *shape)
            for name, (dtype, shape) in wanted.items()
        }

    def _located(self, number: int) -> Tensor:
        """The bytes of a shard that was mapped when its entries were located."""
        shard = self._maps.get(number)
        assert shard is not None, "what was located was mapped"
        self._touched.add(number)
        self._reads += 1
        return shard

    def let_go(self) -> None:
        """What was read so far has been copied: from time to time its pages are given back."""
        with self.store.lock:
            if self._reads < READS_HELD:
                return
            touched, self._touched, self._reads = self._touched, set(), 0
        for number in touched:
            if (shard := self._maps[number]) is not None:
                not_resident(shard)

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
        shards = {int(number) for each in located for number in np.unique(each.shards)}
        now = time.time()
        with suppress(CacheNotWritable), self.store.writing() as database:
            database.executemany(
                "INSERT OR REPLACE INTO uses VALUES (?, ?, ?)",
                [(run, shard, now) for shard in sorted(shards)],
            )

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

    def _mapped(self, number: int) -> Tensor | None:
        """The bytes of a shard as a (bytes,) tensor; None if the file is gone or cut off."""
        with self.store.lock:
            if number not in self._maps:
                query = "SELECT name, bytes FROM shards WHERE id IN (?)"
                ((name, size),) = self.store.rows(query, [number])
                self._maps[number] = _map(self._shard_folder / name, size)
            return self._maps[number]

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


def _map(path: Path, size: int) -> Tensor | None:
    try:
        if path.stat().st_size != size:
            return None
    except FileNotFoundError:
        return None
    # private: pages are shared with other processes until one writes, which never reaches the file
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
