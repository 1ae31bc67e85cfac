"""Where a run's encodings lie in the cache: found once, when it is filled, and told to those that
read it. To find a million anew would take a minute."""

from __future__ import annotations

from typing import Any

from compiler.data.manifest import Manifest
from compiler.plan import Plan
from runtime.data.cache import Cache, Located
from runtime.data.hashes import item_hashes
from runtime.data.keys import LatentKeys, TextKeys, latent_keys, mask_names
from runtime.data.packed import Keys, reading_order, spans
from runtime.families.base import Family


def sample_keys(plan: Plan, manifest: Manifest, family: Family, cache: Cache) -> Keys:
    """The cache key of each row's latents. Raises FileGone."""
    keys, found = latent_keys(plan, family, cache), Keys(len(manifest))
    order = reading_order(manifest)
    for span in spans(len(order)):
        rows = order[span].tolist()
        contents = item_hashes(cache, [manifest.item(row) for row in rows], plan.workers)
        names = mask_names(plan, manifest, cache, rows)
        for row, content, name in zip(rows, contents, names, strict=True):
            found[row] = keys.key(content, manifest.placement(row), name)
    return found


def latents_found(
    plan: Plan, manifest: Manifest, family: Family, cache: Cache, found: Located
) -> None:
    """Remember where each row's latents lie."""
    keys = latent_keys(plan, family, cache)
    cache.filled[_pictures(plan, manifest, keys)] = cache.settled(found)


def latents_located(plan: Plan, manifest: Manifest, family: Family, cache: Cache) -> Located:
    """Where each row's latents lie. Raises CacheIncomplete, and FileGone where a picture's content
    can't be told any more."""
    known = cache.filled.get(_pictures(plan, manifest, latent_keys(plan, family, cache)))
    return known or cache.locate(sample_keys(plan, manifest, family, cache))


def captions_found(manifest: Manifest, keys: TextKeys, cache: Cache, found: Located) -> None:
    """Remember where the embeddings of `manifest.texts` lie."""
    cache.filled[manifest, keys] = cache.settled(found)


def captions_located(manifest: Manifest, keys: TextKeys, cache: Cache) -> Located:
    """Where the embeddings of `manifest.texts` lie. Raises CacheIncomplete."""
    known = cache.filled.get((manifest, keys))
    return known or cache.locate(Keys.of(map(keys.key, manifest.texts)))


def _pictures(plan: Plan, manifest: Manifest, keys: LatentKeys) -> tuple[Any, ...]:
    """All that names of pictures are made of, but their content, which was read when it was filled.
    A manifest is immutable, and no other is equal to it."""
    return manifest, keys, tuple(source.mask for source in plan.sources)
