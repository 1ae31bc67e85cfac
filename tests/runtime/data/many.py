"""A run of many pictures that were never there, whose encodings are cached all the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from attrs import evolve

from compiler.data.counts import bucket_rows
from compiler.data.geometry import Placement
from compiler.data.manifest import Folder, Manifest, Sample
from compiler.data.stamp import Stamp
from compiler.plan import Plan
from runtime.data.cache import Cache
from runtime.data.hashes import name_of
from runtime.data.keys import latent_keys, text_keys
from runtime.families import family_of
from tests.runtime.plans import draw_data, source_of, tiny_plan
from tests.runtime.tiny import make_tiny


def many(
    folder: Path, count: int, *, batch: int, distinct: int, size: int, channels: int
) -> tuple[Plan, Manifest]:
    """`count` pictures of a tar, each with a caption of its own, for two epochs.

    The cache's index knows the hash of each, and has a row for each picture and each caption. What
    these point to is there `distinct` times: latents of (`channels`, `size`, `size`).
    """
    tar = folder / "pictures.tar"
    tar.touch()
    base = make_tiny("sana", folder / "base")
    source = source_of(draw_data(folder / "data", [(64, 64)]))
    batches = -(-count // batch)
    plan, _ = tiny_plan("sana", base, [source], folder / "run", steps=2 * batches)
    source = evolve(source, path=str(tar), kind="webdataset", images=count)
    placed = Placement(
        resize_width=256, resize_height=256, crop_x=0, crop_y=0, width=256, height=256
    )
    manifest = Manifest(
        [Folder(id=source.id, path=source.path, kind=source.kind)],
        (
            Sample(
                source=0,
                key=f"pictures/{number:07}.png",
                bytes=1,
                width=256,
                height=256,
                placement=placed,
                captions=(f"a photo of sks dog, number {number}",),
                file=str(tar),
                at=number,
            )
            for number in range(count)
        ),
    )
    steps = evolve(
        plan.steps, per_epoch=batches, batches_per_epoch=batches, samples_per_epoch=count, epochs=2
    )
    plan = evolve(
        plan,
        sources=(source,),
        manifest=manifest.digest,
        buckets=bucket_rows(manifest, [source], [batch]),
        steps=steps,
    )
    _cached(plan, manifest, placed, Stamp.of(tar.stat()), distinct, (channels, size, size))
    return plan, manifest


def _cached(
    plan: Plan,
    manifest: Manifest,
    placed: Placement,
    stamp: Stamp,
    distinct: int,
    shape: tuple[int, ...],
) -> None:
    family, cache = family_of("sana"), Cache(Path(plan.cache_folder))
    generator = torch.Generator().manual_seed(0)
    contents = [number.to_bytes(32, "little") for number in range(len(manifest))]
    pictures = latent_keys(plan, family, cache)
    keys = [pictures.key(content, placed) for content in contents]
    for key in keys[:distinct]:
        cache.put(key, {"mean": torch.randn(shape, generator=generator).half()})
    cache.flush()
    _share(cache, keys, distinct)
    prompts = text_keys(plan, family, cache)
    keys = [prompts.key(text) for text in manifest.texts]
    mask = torch.ones(20, dtype=torch.int64)
    for key in keys[:distinct]:
        states = torch.randn(20, 16, generator=generator).half()
        cache.put(key, {"encoder_hidden_states": states, "encoder_attention_mask": mask})
    cache.flush()
    _share(cache, keys, distinct)
    times = (stamp.bytes, stamp.mtime_ns, stamp.ctime_ns)
    with cache.store.writing() as database:
        database.executemany(
            "INSERT INTO files VALUES (?, ?, ?, ?, ?)",
            ((name_of(manifest.item(n)), *times, contents[n]) for n in range(len(contents))),
        )
    cache.close()


def _share(cache: Cache, keys: Sequence[bytes], distinct: int) -> None:
    """Let the keys behind the first `distinct` point to what those point to."""
    find = "SELECT shard, layout, offsets FROM entries WHERE key = ?"
    with cache.store.writing() as database:
        rows = [database.execute(find, (key,)).fetchone() for key in keys[:distinct]]
        database.executemany(
            "INSERT INTO entries VALUES (?, ?, ?, ?)",
            sorted((key, *rows[n % len(rows)]) for n, key in enumerate(keys[distinct:])),
        )
