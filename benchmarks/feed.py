"""How many cached latents a second one process feeds, and in how much memory.

    python benchmarks/feed.py [COUNT ...]

Latents of 32 x 32 x 32 in float16 (64 KiB) are read from a cache's shards and stacked, in the order
of training, in batches of 16: that is `read`, and `of CPU` the same by the seconds that the thread
had a processor, which is what counts on a machine that does other things as well. `faults` is page
faults of a latent while it is read. The reads are warm: before they are timed the shards are thrown
out of the system's page cache and read from front to back, so that each count finds them there in
pieces of one size (in which they lie depends otherwise on how full the memory was when they were
written). `disk` is how much of what was read came from the disk all the same. `noise` is
drawing it, `windows` all that a step is given: both, and noise levels, captions, everything as
float32. `waited` is the share of its time that a step of 10 ms (1,600 samples a second) waits for
the thread that makes windows.

`begun` is the seconds of all processors from the saved list of samples to the first window: reading
the list, whose digest is made again, and finding where each sample's encodings lie.

Memory is that of a process of its own for each count, which does what a run does: it reads the
saved list of samples, asks of each picture and each caption (every picture has another) whether it
is cached, and feeds. `libraries` is what the process holds before that, `beginning` the most until
the first window is there, `feeding` the most from then on, an epoch's turn included: all three are
RssAnon, what can't be given back. `files` is RssFile at the end: libraries, shards, and the list of
samples, whose pages are the system's page cache.

A million latents would be 61 GiB: above `DISTINCT` the index has a row for each sample, and samples
share what the rows point to. The pictures were never there: the index knows their hashes.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
DISTINCT = 4_000
BATCH = 16
WANTED = 20_000  # a second
FLAT = 48  # MiB that feeding any count may take more than feeding the smallest
STEP_SECONDS = 0.01
STEPS = 300
MIB = 2**20
LATENT = 32 * 32 * 32 * 2  # bytes
PLAN, MANIFEST = "plan.lock.toml", "manifest.jsonl"


def main() -> None:
    counts = [int(word) for word in sys.argv[1:]] or COUNTS
    print(
        f"{'samples':>9}  {'begun':>7}  {'read /s':>8}  {'of CPU':>8}  {'faults':>6}  {'disk':>5}  "
        f"{'noise /s':>8}  {'windows /s':>10}  "
        f"{'waited':>6}  {'libraries':>9}  {'beginning':>9}  {'feeding':>7}  {'files':>7}"
    )
    least: int | None = None
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            _in_a_process("--make", place, str(count))
            grown = int(_in_a_process("--one", place, str(count)))
        least = grown if least is None else least
        assert grown - least < FLAT, f"feeding {count:,} takes {grown - least} MiB more"


def _in_a_process(*arguments: str) -> str:
    """The last line that it prints; what stands before it is shown."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    *rows, last = done.stdout.splitlines() or [""]
    print("\n".join(rows), end="\n" if rows else "", flush=True)
    done.check_returncode()
    return last


def measure(folder: Path, count: int) -> None:
    """Print one row of the table, and the MiB by which feeding has grown the process. Fails if
    fewer latents are read than are wanted."""
    import torch
    from attrs import evolve

    from compiler import lock
    from compiler.data.manifest import Manifest
    from runtime.data.cache import Cache
    from runtime.data.feed import Feed
    from runtime.data.fill import fill_latents, fill_text
    from runtime.data.pages import trimmed
    from runtime.events import Silent
    from runtime.families import family_of

    torch.set_num_threads(1)
    family, before = family_of("sana"), anonymous()
    began = time.process_time()
    with most() as beginning:
        plan = evolve(lock.read(folder / PLAN), workers=os.cpu_count() or 1)
        manifest = Manifest.load(folder / MANIFEST)
        manifest.to_disk(folder)
        trimmed()
        cache = Cache(Path(plan.cache_folder))
        fill_text(plan, manifest, family, cache, Silent())
        fill_latents(plan, manifest, family, cache, Silent())
        feed = Feed(plan, manifest, family, cache, torch.device("cpu"))
        feed.window(0)
    began = time.process_time() - began
    warm(Path(plan.cache_folder))
    disk, faults = from_disk(), page_faults()
    read, possible, step = reading(feed)
    faults = (page_faults() - faults) / (step * BATCH)
    disk = (from_disk() - disk) / (step * BATCH * LATENT)
    with most() as feeding:
        start, fed = time.perf_counter(), 0
        while time.perf_counter() - start < 3.0:
            fed += feed.window(step).samples
            step += 1
        windows = fed / (time.perf_counter() - start)
        start, drawn = time.perf_counter(), 0
        while time.perf_counter() - start < 2.0:
            shape = torch.Size((BATCH, 32, 32, 32))
            drawn += len(feed._normal("noise", shape, drawn, range(BATCH)))
        noise = drawn / (time.perf_counter() - start)
        waited = share_waited(feed, min(STEPS, -(-count // BATCH)))
        feed.window(plan.steps.per_epoch)  # of the next epoch
    print(
        f"{count:>9,}  {began:>5,.1f} s  {read:>8,.0f}  {possible:>8,.0f}  {faults:>6.2f}  "
        f"{disk:>5.1%}  {noise:>8,.0f}  "
        f"{windows:>10,.0f}  {waited:>6.1%}  {before / MIB:>5,.0f} MiB  "
        f"{beginning[0] / MIB:>5,.0f} MiB  {feeding[0] / MIB:>3,.0f} MiB  "
        f"{status('RssFile') / MIB:>3,.0f} MiB"
    )
    print(round((feeding[0] - before) / MIB))
    assert possible >= WANTED, f"fewer than {WANTED:,} latents a second of the processor"


def reading(feed) -> tuple[float, float, int]:  # type: ignore[no-untyped-def]
    """Latents a second of the clock and of the processor, and the steps that it took."""
    seconds, busy, read, step = 0.0, 0.0, 0, 0
    while seconds < 3.0:
        (batch,) = feed._order.window(step)
        start, begun = time.perf_counter(), time.thread_time()
        feed._cache.stack(feed._latents, batch.rows, ("mean",))
        seconds, busy = seconds + time.perf_counter() - start, busy + time.thread_time() - begun
        read, step = read + len(batch.rows), step + 1
    return read / seconds, read / busy, step


def warm(folder: Path) -> None:
    """Read all shards from front to back, into a page cache that holds none of them."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(MIB):
                pass


def from_disk() -> int:
    """Bytes that this process had the system fetch from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def page_faults() -> int:
    """Of this thread, small and great."""
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_minflt + usage.ru_majflt


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


def status(name: str) -> int:
    """Bytes of this process, by a name of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def anonymous() -> int:
    """Bytes of this process that are in memory and stand in no file."""
    return status("RssAnon")


@contextmanager
def most():  # type: ignore[no-untyped-def]
    """The most anonymous bytes in the block, looked at fifty times a second."""
    found, over = [anonymous()], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            found[0] = max(found[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def make(folder: Path, count: int) -> None:
    """Save a plan of `count` pictures that were never there, and their list."""
    from compiler import lock
    from tests.runtime.data.many import many

    plan, manifest = many(folder, count, batch=BATCH, distinct=DISTINCT, size=32, channels=32)
    (folder / PLAN).write_text(lock.dumps(plan))
    manifest.save(folder / MANIFEST)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--one", place, number]:
            measure(Path(place), int(number))
        case ["--make", place, number]:
            make(Path(place), int(number))
        case _:
            main()
