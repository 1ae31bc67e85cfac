"""Fills the cache: every prompt and every picture of a run is encoded once, then the encoders go.

Prompts and pictures are encoded one at a time. What is cached must be a function of its key alone:
kernels are chosen by batch size, so that the same picture in other company differs in its last bits
(SD3's VAE on the CPU, four pictures or one: by 1e-6 in float32, 8e-3 in bfloat16), and a run that
was killed here and started again would then train on other numbers. It also makes the peak memory
of these phases that of one item. Threads decode ahead of the encoder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from compiler.compile import default_cache
from compiler.data.index import HEADERS, Index
from compiler.data.manifest import Item, Manifest
from compiler.data.prompts import prompts_of
from compiler.data.scan import ALONE, shown
from compiler.plan import Plan
from runtime.data import masks
from runtime.data.cache import Cache
from runtime.data.decode import Ready, decoded
from runtime.data.encoders import TOGETHER, Encoders, PhaseOf, free, load
from runtime.data.focus import require_opencv
from runtime.data.hashes import item_hashes
from runtime.data.keys import latent_keys, mask_names, text_keys
from runtime.data.pixels import BrokenPicture
from runtime.errors import RunFailed
from runtime.events import Events
from runtime.families.base import Family, TextEmbedding
from runtime.families.common import DTYPES

OFFSET = "crop"
"""In an entry of latents: x and y of a cut that was found by looking at the pixels."""
_NAMED = 20  # files named in one message
NOTHING_SHOWN = "its mask shows nothing of what is cut out"
_MEND = (
    "headers and endings looked right, so the plan counts them, and its steps can't change any "
    "more. They are noted now: run the recipe again and the plan will name them, or leave them out "
    'with broken = "skip"; all others are cached'
)
_MEND_MASKS = (
    "mend the masks or remove these pictures; a `floor` above 0 learns something of each; all "
    "others are cached"
)


class BrokenData(RunFailed):
    """Pictures whose pixels or masks can't be used. `files` are (path, why)."""

    def __init__(self, files: Sequence[tuple[str, BrokenPicture]]) -> None:
        lines = [f"  {shown(path)}: {why}" for path, why in files[:_NAMED]]
        if len(files) > _NAMED:
            lines.append(f"  and {len(files) - _NAMED} more")
        count = "1 picture" if len(files) == 1 else f"{len(files)} pictures"
        masked = all(isinstance(why, masks.BrokenMask) for _, why in files)
        super().__init__(
            f"{count} can't be {'used' if masked else 'decoded'}:\n" + "\n".join(lines),
            help=_MEND_MASKS if masked else _MEND,
        )
        self.files = tuple(files)


def fill_text(
    plan: Plan,
    manifest: Manifest,
    family: Family,
    cache: Cache,
    events: Events,
    phase: PhaseOf = lambda name: nullcontext(),
) -> None:
    """Encode all prompts that are not cached; loads nothing if there are none.

    The encoders are on the device one after the other, each inside `phase(its name)`. Raises
    CacheNotWritable.
    """
    wanted = prompts_of(plan, manifest)
    keys = text_keys(plan, family, cache)
    missing = cache.missing(keys.key(p.text, negative=p.negative) for p in wanted)
    events.phase("text", len(wanted), "prompts")
    events.advance(len(wanted) - len(missing))
    if not missing:
        return
    todo = {keys.key(p.text, negative=p.negative): p for p in wanted}
    todo = {key: prompt for key, prompt in todo.items() if key in missing}
    encoders = Encoders(plan, family, phase, waiting=len(todo) > TOGETHER)
    done = len(wanted) - len(todo)
    try:
        for start in range(0, len(todo), TOGETHER):
            batch = dict(list(todo.items())[start : start + TOGETHER])
            advance = partial(_advance, events, done)
            for key, embedding in zip(batch, encoders(list(batch.values()), advance), strict=True):
                cache.put(key, _stored(embedding, plan))
            done += len(batch)
    finally:
        encoders.free()
        cache.flush()


def _advance(events: Events, done: int, more: float) -> None:
    events.advance(done + int(more))


def fill_latents(
    plan: Plan, manifest: Manifest, family: Family, cache: Cache, events: Events
) -> None:
    """Encode all pictures that are not cached, bucket by bucket; loads nothing if there are none.

    Raises BrokenData, after all others were cached, CacheNotWritable, and MachineUnfit where
    nothing here can find the faces that the plan cuts around.
    """
    keys = sample_keys(plan, manifest, family, cache)
    missing = cache.missing(keys)
    todo = _once(_by_bucket(manifest), keys, missing)
    total, done = len(set(keys)), len(set(keys)) - len(missing)
    events.phase("latents", total, "pictures")
    events.advance(done)
    if not todo:
        return
    if any(manifest.placement(row).focus for row in todo):
        require_opencv()
    parts = load(plan, family, ("vae",))
    latents = latent_keys(plan, family, cache)
    broken: dict[bytes, BrokenPicture] = {}
    try:
        for row, ready in decoded(todo, plan, manifest, keys, latents):
            if isinstance(ready, BrokenPicture):
                broken[keys[row]] = ready
                continue
            moments = family.encode_pixels(parts["vae"], ready.pixels.to(plan.device))
            entry = _entry(moments, ready)
            rules = plan.sources[manifest.source(row)].mask
            if rules is not None and rules.floor == 0 and not entry[masks.NAME].any():
                broken[keys[row]] = masks.BrokenMask(NOTHING_SHOWN)
                continue
            cache.put(keys[row], _stored(entry, plan))
            done += 1
            events.advance(done)
    finally:
        try:
            cache.flush()
        finally:
            parts.clear()
            free(plan)
    if broken:
        rows = [(row, broken[key]) for row, key in enumerate(keys) if key in broken]
        _condemn(
            [(manifest.item(r), str(w)) for r, w in rows if not isinstance(w, masks.BrokenMask)]
        )
        raise BrokenData([(_called(manifest, row), why) for row, why in rows])


def _entry(moments: Mapping[str, Tensor], ready: Ready) -> dict[str, Tensor]:
    """What is cached of one picture."""
    entry = {name: t[0] for name, t in moments.items()}
    if ready.placement.focus:
        entry[OFFSET] = torch.tensor([ready.placement.crop_x, ready.placement.crop_y])
    if ready.mask is not None:
        entry[masks.NAME] = masks.pooled(ready.mask, *entry["mean"].shape[-2:])
    return entry


def sample_keys(plan: Plan, manifest: Manifest, family: Family, cache: Cache) -> list[bytes]:
    """The cache key of each row's latents. Raises FileGone."""
    keys = latent_keys(plan, family, cache)
    items = [manifest.item(row) for row in range(len(manifest))]
    contents = item_hashes(cache, items, plan.workers)
    names = mask_names(plan, manifest, cache)
    return [
        keys.key(content, manifest.placement(row), names[row])
        for row, content in enumerate(contents)
    ]


def prompt_embeddings(
    plan: Plan, family: Family, cache: Cache, prompts: Iterable[str], *, negative: bool = False
) -> dict[str, TextEmbedding]:
    """The cached embeddings of prompts, by text. Raises CacheIncomplete."""
    keys = text_keys(plan, family, cache)
    return {text: cache.get(keys.key(text, negative=negative)) for text in prompts}


def _stored(entry: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Numbers in the plan's cache format; masks and indices as they are."""
    dtype = DTYPES[plan.precision.cache]
    return {n: t.to("cpu", dtype) if t.is_floating_point() else t.cpu() for n, t in entry.items()}


def _by_bucket(manifest: Manifest) -> Iterator[int]:
    for members in manifest.buckets:
        if manifest.folders[members.source].kind == "folder":
            yield from members.samples
        else:  # containers are read from front to back
            yield from sorted(members.samples, key=lambda row: _position(manifest.item(row)))


def _position(item: Item) -> tuple[str, int]:
    return item.file, item.at


def _once(rows: Iterable[int], keys: Sequence[bytes], missing: set[bytes]) -> list[int]:
    """The first row of each missing key: equal pictures are encoded once."""
    left, chosen = set(missing), []
    for row in rows:
        if keys[row] in left:
            left.remove(keys[row])
            chosen.append(row)
    return chosen


def _called(manifest: Manifest, row: int) -> str:
    """The path of a picture, or of its container and its name there."""
    item = manifest.item(row)
    return item.file if item.at == ALONE else f"{item.file} ({manifest[row].key})"


def _condemn(broken: Sequence[tuple[Item, str]]) -> None:
    """Tell the next plan, through the index of headers that plans are made with."""
    index = Index(default_cache() / HEADERS)
    for item, why in broken:
        if os.path.exists(item.file):
            index.condemn(item.file, why, item.at)
