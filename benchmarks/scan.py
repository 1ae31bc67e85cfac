"""How fast a folder of pictures is scanned: files a second, opened and again unchanged.

    python benchmarks/scan.py [COUNT] [RUNS]

Real files in a temporary folder, 1,000 to a folder, whose headers (PNG, JPEG and WebP) are read
from the system's file cache ("warm"). The second scan has the index of the first, and opens
nothing; the benchmark fails if it does. Figures are of whole scans, least, median and most of
several.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from compiler.data import scan as scanning
from compiler.data.index import HEADERS, Index
from compiler.data.stamp import Stamp

PER_FOLDER = 1000
KINDS = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    runs = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as place:
        root, index = Path(place, "pictures"), Path(place, HEADERS)
        make(root, count)
        scanning.scan(root)  # warms the system's caches
        opened = [timed(root, None, count) for _ in range(runs)]
        show("opened", count, opened)
        first = Index(index)
        scanning.scan(root, first)
        # Files of this very second are not remembered: their time could hide a change.
        while not Stamp.of(os.stat(root / "000" / "000000.png")).settled:
            time.sleep(0.5)
        scanning.scan(root, first)
        assert first.save()
        scanning.read_header = refuse  # type: ignore[assignment]
        show("unchanged", count, [timed(root, Index(index), count) for _ in range(runs)])


def make(root: Path, count: int) -> None:
    """`count` pictures of three kinds and several sizes."""
    contents = []
    for ending, kind in KINDS:
        for size in ((640, 480), (512, 768), (1024, 1024)):
            buffer = io.BytesIO()
            Image.new("RGB", size, (90, 120, 150)).save(buffer, kind)
            contents.append((ending, buffer.getvalue()))
    for number in range(count):
        folder = root / f"{number // PER_FOLDER:03}"
        if number % PER_FOLDER == 0:
            folder.mkdir(parents=True)
        ending, content = contents[number % len(contents)]
        (folder / f"{number:06}.{ending}").write_bytes(content)


def refuse(path: str) -> None:
    raise AssertionError(f"{path} is unchanged, but was opened")


def timed(root: Path, index: Index | None, count: int) -> float:
    """Seconds of one scan, which must find every picture."""
    start = time.perf_counter()
    found = scanning.scan(root, index)
    seconds = time.perf_counter() - start
    assert len(found.pictures) == count, (len(found.pictures), found.faults[:3])
    return seconds


def show(name: str, count: int, seconds: list[float]) -> None:
    rates = sorted(count / one for one in seconds)
    print(
        f"scan, {name:<10} {count:>9,} files   {rates[0]:>9,.0f} to {rates[-1]:>9,.0f} a second"
        f"   median {statistics.median(rates):>9,.0f}   {min(seconds):6.2f} s at best"
    )


if __name__ == "__main__":
    main()
