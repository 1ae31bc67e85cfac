"""How many cached latents a second one process feeds, and in how much memory.

    python benchmarks/feed.py [COUNT ...]

Latents of 32 x 32 x 32 in float16 (64 KiB) are read from a cache's shards and stacked, in the order
of training, in batches of 16: that is `read`. `noise` is drawing it, `windows` all that a step is
given: both, and noise levels, captions, everything as float32. `waited` is the share of its time
that a step of 10 ms (1,600 samples a second) waits for the thread that makes windows. Each count is
measured in a process of its own, with the files in the system's page cache; noise is drawn by as
many threads as there are processors, all else by one.

A million latents would be 61 GiB: above `DISTINCT` the index has a row for each sample, and samples
share what the rows point to.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
DISTINCT = 4_000
BATCH = 16
WANTED = 20_000  # a second
STEP_SECONDS = 0.01
STEPS = 300
MIB = 2**20


def main() -> None:
    counts = [int(word) for word in sys.argv[1:]] or COUNTS
    print(
        f"{'samples':>9}  {'read /s':>8}  {'noise /s':>8}  {'windows /s':>10}  {'waited':>6}  "
        f"{'resident':>10}  grown by feeding"
    )
    for count in counts:
        subprocess.run([sys.executable, __file__, "--one", str(count)], check=True)


def measure(count: int) -> None:
    """Print one row of the table. Fails if fewer latents are read than are wanted."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        feed = made(Path(place), count)
        order, cache, located = feed._order, feed._cache, feed._latents
        feed.window(0)  # the epoch's order is made once
        before = resident()
        seconds, read, step = 0.0, 0, 0
        while seconds < 3.0:
            (batch,) = order.window(step)
            start = time.perf_counter()
            cache.stack(located, batch.rows, ("mean",))
            seconds += time.perf_counter() - start
            read, step = read + len(batch.rows), step + 1
        start, fed = time.perf_counter(), 0
        while time.perf_counter() - start < 3.0:
            fed += feed.window(step).samples
            step += 1
        windows = fed / (time.perf_counter() - start)
        start, drawn = time.perf_counter(), 0
        while time.perf_counter() - start < 2.0:
            drawn += len(
                feed._normal("noise", torch.Size((BATCH, 32, 32, 32)), drawn, range(BATCH))
            )
        noise = drawn / (time.perf_counter() - start)
        waited = share_waited(feed, min(STEPS, -(-count // BATCH)))
        after = resident()
    print(
        f"{count:>9,}  {read / seconds:>8,.0f}  {noise:>8,.0f}  {windows:>10,.0f}  {waited:>6.1%}  "
        f"{after / MIB:>6,.0f} MiB  {(after - before) / MIB:,.0f} MiB"
    )
    assert read / seconds >= WANTED, f"fewer than {WANTED:,} latents a second"


def share_waited(feed, steps: int) -> float:  # type: ignore[no-untyped-def]
    """Of a loop whose steps take `STEP_SECONDS`, after the first one."""
    waited, windows = 0.0, feed.windows(0)
    next(windows)
    begun = time.perf_counter()
    for _ in range(steps - 1):
        time.sleep(STEP_SECONDS)
        asked = time.perf_counter()
        next(windows)
        waited += time.perf_counter() - asked
    windows.close()
    return waited / (time.perf_counter() - begun)


def resident() -> int:
    """Bytes of this process that are in memory, file pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def made(folder: Path, count: int):  # type: ignore[no-untyped-def]
    """A feed of `count` pictures that were never there."""
    import torch
    from attrs import evolve

    from compiler.data.counts import bucket_rows
    from compiler.data.geometry import Placement
    from compiler.data.manifest import Folder, Manifest, Sample
    from runtime.data import feed as feeding
    from runtime.data.cache import Cache
    from runtime.data.keys import text_keys
    from runtime.families import family_of
    from tests.runtime.plans import draw_data, source_of, tiny_plan
    from tests.runtime.tiny import make_tiny

    base = make_tiny("sana", folder / "base")
    source = source_of(draw_data(folder / "data", [(64, 64)]))
    plan, _ = tiny_plan("sana", base, [source], folder / "run", steps=-(-count // BATCH))
    placed = Placement(
        resize_width=256, resize_height=256, crop_x=0, crop_y=0, width=256, height=256
    )
    source = evolve(source, images=count)
    manifest = Manifest(
        [Folder(id=source.id, path=source.path)],
        (
            Sample(
                source=0,
                key=f"{number:07}.png",
                bytes=1,
                width=256,
                height=256,
                placement=placed,
                captions=(source.captions.prompt,),
            )
            for number in range(count)
        ),
    )
    plan = evolve(plan, sources=(source,), buckets=bucket_rows(manifest, [source], [BATCH]))
    batches = -(-count // BATCH)
    steps = evolve(
        plan.steps, per_epoch=batches, batches_per_epoch=batches, samples_per_epoch=count
    )
    plan = evolve(plan, steps=steps, workers=os.cpu_count() or 1)
    family, cache = family_of("sana"), Cache(folder / "cache")
    keys = [number.to_bytes(32, "little") for number in range(count)]
    generator = torch.Generator().manual_seed(0)
    for key in keys[:DISTINCT]:
        cache.put(key, {"mean": torch.randn(32, 32, 32, generator=generator).half()})
    cache.put(
        text_keys(plan, family, cache).key(source.captions.prompt),
        {
            "encoder_hidden_states": torch.randn(20, 16, generator=generator).half(),
            "encoder_attention_mask": torch.ones(20, dtype=torch.int64),
        },
    )
    cache.flush()
    with cache.store.writing() as database:
        there = set(keys[:DISTINCT])
        found = database.execute("SELECT key, shard, layout, offsets FROM entries").fetchall()
        rows = [row[1:] for row in found if row[0] in there]
        database.executemany(
            "INSERT INTO entries VALUES (?, ?, ?, ?)",
            ((keys[n], *rows[n % len(rows)]) for n in range(DISTINCT, count)),
        )
    setattr(feeding, "sample_keys", lambda *_: keys)  # noqa: B010
    return feeding.Feed(plan, manifest, family, cache, torch.device("cpu"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(int(sys.argv[2]))
    else:
        main()
