"""How much memory and time a plan of a million pictures takes.

    python benchmarks/million.py [COUNT]

The rows are made up: what `scan` would have found in a folder of that many pictures is handed to
the compiler in its place. All else is the compiler as it is: geometry, captions, the list of
samples with its digest, buckets, steps, and the list written to a file and read again. Each figure
is of a process of its own.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GIB = 2**30
LIMIT = 2 * GIB


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    for captions in ("instance", "filename"):
        subprocess.run([sys.executable, __file__, str(count), captions], check=True)


def measure(count: int, captions: str) -> None:
    """Plan, save and load; prints the seconds and the greatest memory of this process."""
    from compiler.data.manifest import Manifest
    from compiler.data.scan import Picture, Scan
    from compiler.passes import places
    from tests.compiler.recipes import RECIPE, FixedMemory, compiled, project

    sizes = [(640 + 32 * n, 1280 - 32 * n) for n in range(20)]

    def made_up(*_: object, **__: object) -> Scan:
        pictures = (
            Picture(key=f"set {n % 997}/a dog {n:07}.jpg", bytes=10**5 + n, width=w, height=h)
            for n in range(count)
            for w, h in (sizes[n * n % 20],)
        )
        ordered = sorted(pictures, key=lambda picture: picture.key)
        return Scan(pictures=tuple(ordered), faults=(), hidden=0, others=0)

    places.scan = made_up  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as place:
        own = f'captions = {{ from = "{captions}" }}' if captions == "filename" else ""
        line = 'captions = { from = "instance", prompt = "a photo of sks dog" }'
        path = project(Path(place), RECIPE.replace(line, own) if own else RECIPE)
        start = time.perf_counter()
        found = compiled(path, memory_model=FixedMemory())
        planned = time.perf_counter() - start
        assert found.plan is not None and found.manifest is not None, found.diagnostics
        assert sum(bucket.images for bucket in found.plan.buckets) == count
        start = time.perf_counter()
        found.manifest.save(Path(place, "manifest.jsonl"))
        saved = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"plan of {count:,} rows, captions from {captions:<9}{planned:6.1f} s, "
        f"saved in {saved:4.1f} s, at most {peak / GIB:.2f} GiB"
    )
    assert peak < LIMIT, "more than 2 GiB"
    assert isinstance(found.manifest, Manifest)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(int(sys.argv[1]), sys.argv[2])
    else:
        main()
