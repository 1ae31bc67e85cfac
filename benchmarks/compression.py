"""Whether compressing what is cached would pay: sizes and speeds of zstd.

    python benchmarks/compression.py FOLDER

Latents of the photographs below FOLDER by a tiny VAE, standard normal numbers (what the latents of
a trained VAE are close to) and embeddings with channels of very different spread, each as float16
and bfloat16. `shuffled` puts all first bytes of the numbers before all second ones. How fast a
cache is read as it is, `benchmarks/feed.py` tells. Needs pyarrow, for its zstd.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

MIB = 2**20


def main() -> None:
    kinds = {"normal numbers": normal(), "embeddings": embeddings(), **photographs(sys.argv[1:])}
    print(f"{'':<32}{'size':>6}  {'packed MiB/s':>12}  {'unpacked MiB/s':>14}")
    for name, values in kinds.items():
        for kind, data in formats(values).items():
            for way, form in (("", data), (" shuffled", shuffled(data))):
                size, packed, unpacked = measured(form)
                words = f"{name} {kind}{way}"
                print(f"{words:<32}{size:>6.0%}  {packed:>12,.0f}  {unpacked:>14,.0f}")


def normal() -> np.ndarray:  # type: ignore[type-arg]
    """(values,) float32."""
    return np.random.default_rng(0).standard_normal(8 << 20, np.float32)


def embeddings() -> np.ndarray:  # type: ignore[type-arg]
    """(tokens, channels) float32: channels of very different spread, as encoders have them."""
    random = np.random.default_rng(1)
    spread = np.exp(random.normal(-1.0, 1.0, 4096)).astype(np.float32)
    return random.standard_normal((2048, 4096), np.float32) * spread


def photographs(folders: list[str]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """Latents of a tiny VAE with random weights, by name; none without a folder."""
    if not folders:
        return {}
    import tempfile

    from runtime.data.cache import Cache
    from runtime.data.fill import fill_latents
    from runtime.data.located import sample_keys
    from runtime.events import Silent
    from runtime.families import family_of
    from tests.runtime.plans import source_of, tiny_plan
    from tests.runtime.tiny import make_tiny

    with tempfile.TemporaryDirectory() as place:
        base = make_tiny("sd3", Path(place, "base"))
        source = source_of(Path(folders[0]), size=512)
        plan, manifest = tiny_plan("sd3", base, [source], Path(place, "run"), workers=2)
        family, cache = family_of("sd3"), Cache(Path(place, "cache"))
        fill_latents(plan, manifest, family, cache, Silent())
        located = cache.locate(sample_keys(plan, manifest, family, cache))
        found = [cache.read(located, row)["mean"].numpy().ravel() for row in range(len(manifest))]
        return {"photographs": np.concatenate(found)}


def formats(values: np.ndarray) -> dict[str, bytes]:  # type: ignore[type-arg]
    """The numbers as they would be cached."""
    import torch

    tensor = torch.from_numpy(values.copy())
    return {
        "fp16": tensor.half().numpy().tobytes(),
        "bf16": tensor.bfloat16().view(torch.int16).numpy().tobytes(),
    }


def shuffled(data: bytes) -> bytes:
    """All first bytes of the 16-bit numbers, then all second ones."""
    return np.frombuffer(data, np.uint8).reshape(-1, 2).T.tobytes()


def measured(data: bytes) -> tuple[float, float, float]:
    """(share of the size that is left, MiB packed a second, MiB unpacked a second)."""
    import pyarrow

    codec = pyarrow.Codec("zstd", compression_level=3)
    start = time.perf_counter()
    packed = codec.compress(data)
    middle = time.perf_counter()
    codec.decompress(packed, len(data))
    end = time.perf_counter()
    size = len(data) / MIB
    return len(packed) / len(data), size / (middle - start), size / (end - middle)


if __name__ == "__main__":
    main()
