"""How much of the time of filling a cache is the encoder's own.

    python benchmarks/fill.py FOLDER [--batch 1,4] [FAMILY ...]

Photographs below FOLDER are cut to about 512 x 512 pixels and encoded by a tiny VAE with random
weights, on one thread, while the plan's workers decode. `encoder` is the time inside of it, `wall`
the time from the first picture to the last shard on disk; hashing the files and loading the VAE are
told apart. A real VAE takes hundreds of times as long for a picture and waits less. With several
numbers after `--batch`, each is what `[cache] batch` says in a row of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

WANTED = 0.9  # share of the encoder
WORKERS = 2


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("folder", type=Path)
    words.add_argument("families", nargs="*", default=["sd3", "sana"])
    words.add_argument("--batch", default="1")
    asked = words.parse_args()
    for name in asked.families:
        for batch in map(int, asked.batch.split(",")):
            measure(asked.folder, name, batch)


def measure(folder: Path, name: str, batch: int) -> None:
    """Print one line for a family. Fails if its encoder waits for more than a tenth."""
    import torch

    from runtime.data import fill, located
    from runtime.data.cache import Cache
    from runtime.events import Silent
    from runtime.families import family_of
    from tests.runtime.plans import source_of, tiny_plan
    from tests.runtime.tiny import make_tiny

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        base = make_tiny(name, Path(place, "base"))
        source = source_of(folder, size=512)
        settings = {"workers": WORKERS, "vae_batch": batch}
        plan, manifest = tiny_plan(name, base, [source], Path(place, "run"), **settings)
        family, cache = family_of(name), Cache(Path(place, "cache"))
        start = time.perf_counter()
        located.sample_keys(plan, manifest, family, cache)
        hashed = time.perf_counter() - start
        spent, first, real = 0.0, 0.0, family.encode_pixels

        def timed(vae: Any, pixels: Any) -> Any:
            nonlocal spent, first
            begun = time.perf_counter()
            first = first or begun
            found = real(vae, pixels)
            spent += time.perf_counter() - begun
            return found

        object.__setattr__(family, "encode_pixels", timed)
        last, flush = 0.0, cache.flush

        def flushed() -> None:
            nonlocal last
            flush()
            last = time.perf_counter()

        cache.flush = flushed  # type: ignore[method-assign]
        fill.fill_latents(plan, manifest, family, cache, Silent())
        wall = last - first
    print(
        f"{name:<5} {len(manifest)} pictures, batch {batch}: encoder {spent:.2f} s of {wall:.2f} s "
        f"= {spent / wall:.0%}, {len(manifest) / wall:.0f} a second; hashed in {hashed:.2f} s"
    )
    assert spent / wall >= WANTED, "the encoder waits"


if __name__ == "__main__":
    main()
