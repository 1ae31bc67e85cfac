"""Fills the cache: every prompt and every picture of a run is encoded once, then the encoders go.

Prompts and pictures are encoded one at a time. What is cached must be a function of its key alone:
kernels are chosen by batch size, so that the same picture in other company differs in its last bits
(SD3's VAE on the CPU, four pictures or one: by 1e-6 in float32, 8e-3 in bfloat16), and a run that
was killed here and started again would then train on other numbers. It also makes the peak memory
of these phases that of one item. Threads decode ahead of the encoder. Of several ranks each does a
share, on its own device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import compress, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compiler.data.index import HEADERS, Index
from compiler.data.manifest import Item, Manifest
from compiler.data.prompts import every_prompt
from compiler.data.scan import ALONE, shown
from compiler.home import default_cache
from compiler.plan import Plan
from runtime.data import masks
from runtime.data.cache import Cache
from runtime.data.decode import Ready, decoded
from runtime.data.encoders import TOGETHER, Encoders, PhaseOf, free, load
from runtime.data.focus import require_opencv
from runtime.data.hashes import item_hashes
from runtime.data.keys import latent_keys, mask_names, text_keys
from runtime.data.packed import Keys, Rows, reading_order, spans
from runtime.data.pixels import BrokenPicture
from runtime.data.sharing import ALONE as ALL
from runtime.data.sharing import Team
from runtime.errors import RunFailed
from runtime.events import Events
from runtime.families.base import Family, TextEmbedding
from runtime.families.common import DTYPES

OFFSET = "crop"
"""In an entry of latents: x and y of a cut that was found by looking at the pixels."""
WORTH_LOADING = 32
"""Prompts for which another rank loads the encoders too: it takes as long as to encode some."""
_NAMED = 20  # files named in one message
NOTHING_SHOWN = "its mask shows nothing of what is cut out"
_MEND = (
    "headers and endings looked right, so the plan counts them, and its steps can't change any "
    "more. They are noted now: run the recipe again and the plan will {leaves}; all others are "
    "cached"
)
_NAMES, _LEAVES = 'name them, or leave them out with broken = "skip"', "leave them out"
_MEND_MASKS = (
    "mend the masks or remove these pictures; a `floor` above 0 learns something of each; all "
    "others are cached"
)


class BrokenData(RunFailed):
    """Pictures whose pixels or masks can't be used. `files` are (path, why); all of them are
    `skipped` by the next plan where their sources' recipes say so."""

    def __init__(self, files: Sequence[tuple[str, BrokenPicture]], *, skipped: bool) -> None:
        lines = [f"  {shown(path)}: {why}" for path, why in files[:_NAMED]]
        if len(files) > _NAMED:
            lines.append(f"  and {len(files) - _NAMED} more")
        count = "1 picture" if len(files) == 1 else f"{len(files)} pictures"
        masked = all(isinstance(why, masks.BrokenMask) for _, why in files)
        super().__init__(
            f"{count} can't be {'used' if masked else 'decoded'}:\n" + "\n".join(lines),
            help=_MEND_MASKS if masked else _MEND.format(leaves=_LEAVES if skipped else _NAMES),
        )
        self.files = tuple(files)


def fill_text(
    plan: Plan,
    manifest: Manifest,
    family: Family,
    cache: Cache,
    events: Events,
    phase: PhaseOf = lambda name: nullcontext(),
    team: Team = ALL,
) -> None:
    """Encode this rank's share of all prompts that are not cached; loads nothing if there are none.
    Returns when all ranks have done theirs.

    The encoders are on the device one after the other, each inside `phase(its name)`. Raises
    CacheNotWritable.
    """
    keys = team.first(lambda: text_keys(plan, family, cache))
    every = Keys.of(keys.key(p.text, negative=p.negative) for p in every_prompt(plan, manifest))
    wanted = every.firsts(np.arange(len(every)))
    missing = wanted[cache.lacks(every)[wanted]]
    cached = len(wanted) - len(missing)
    events.phase("text", len(wanted), "prompts")
    events.advance(cached)
    mine = [team.takes(every[n], len(wanted), WORTH_LOADING) for n in missing.tolist()]
    if any(mine):
        todo = np.zeros(len(every), bool)
        todo[missing[mine]] = True
        _encode(plan, manifest, family, cache, every, todo, phase, events, cached, team)
    team.meet()


def _encode(
    plan: Plan,
    manifest: Manifest,
    family: Family,
    cache: Cache,
    keys: Keys,
    todo: NDArray[np.bool_],
    phase: PhaseOf,
    events: Events,
    cached: int,
    team: Team,
) -> None:
    """Cache the embeddings of those prompts that are `todo`; `cached` prompts were there before."""
    encoders = Encoders(plan, family, phase, waiting=int(todo.sum()) > TOGETHER)
    done, encoded, cut, longest = cached, 0, 0, 0
    chosen = compress(enumerate(every_prompt(plan, manifest)), todo)
    try:
        while batch := list(islice(chosen, TOGETHER)):
            advance = partial(_advance, events, done)
            made = encoders([prompt for _, prompt in batch], advance)
            for (number, _), embedding in zip(batch, made, strict=True):
                cache.put(keys[number], _stored(embedding, plan))
            longer, longest = encoders.cut([prompt for _, prompt in batch])
            cut += longer
            encoded += len(batch)
            done = cached + team.tally(encoded, len(batch))
    finally:
        encoders.free()
        cache.flush()
    if cut:
        events.message(
            f"{cut} of {encoded} prompts are longer than the {longest} tokens that are read of "
            "them: their ends are not seen",
            "warning",
        )


def _advance(events: Events, done: int, more: float) -> None:
    events.advance(done + int(more))


def fill_latents(
    plan: Plan,
    manifest: Manifest,
    family: Family,
    cache: Cache,
    events: Events,
    team: Team = ALL,
) -> None:
    """Encode this rank's share of all pictures that are not cached, bucket by bucket; loads nothing
    if there are none. Returns when all ranks have done theirs.

    Raises BrokenData, in all ranks, after all others were cached, CacheNotWritable, and
    MachineUnfit where nothing here can find the faces that the plan cuts around.
    """
    keys = team.first(lambda: sample_keys(plan, manifest, family, cache))
    every = keys.firsts(_by_bucket(manifest))
    missing = every[cache.lacks(keys)[every]]
    cached = len(every) - len(missing)
    todo = missing[[team.takes(keys[row], len(keys)) for row in missing.tolist()]]
    events.phase("latents", len(every), "pictures")
    events.advance(cached)
    broken: dict[bytes, BrokenPicture] = {}
    if len(todo):
        broken = _encode_pictures(plan, manifest, family, cache, events, keys, todo, cached, team)
    rows = [(r, broken[key]) for r, key in enumerate(keys) if key in broken] if broken else []
    _condemn([(manifest.item(r), str(w)) for r, w in rows if not isinstance(w, masks.BrokenMask)])
    mine = [[row, str(why), isinstance(why, masks.BrokenMask)] for row, why in rows]
    found = [each for word in team.meet(json.dumps(mine)) for each in json.loads(word)]
    if found:
        kinds = (BrokenPicture, masks.BrokenMask)
        raise BrokenData(
            [(_called(manifest, row), kinds[masked](why)) for row, why, masked in sorted(found)],
            skipped=all(plan.sources[manifest.source(r)].broken == "skip" for r, *_ in found),
        )


def _encode_pictures(
    plan: Plan,
    manifest: Manifest,
    family: Family,
    cache: Cache,
    events: Events,
    keys: Sequence[bytes],
    todo: Rows,
    cached: int,
    team: Team,
) -> dict[bytes, BrokenPicture]:
    """Cache the latents of the rows `todo`; those that can't be, by key. `cached` were there."""
    if any(manifest.placement(int(row)).focus for row in todo):
        require_opencv()
    parts = load(plan, family, ("vae",))
    latents = latent_keys(plan, family, cache)
    broken: dict[bytes, BrokenPicture] = {}
    done = 0
    try:
        for row, ready in decoded(map(int, todo), plan, manifest, keys, latents):
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
            events.advance(cached + team.tally(done, 1))
    finally:
        try:
            cache.flush()
        finally:
            parts.clear()
            free(plan)
    return broken


def _entry(moments: Mapping[str, Tensor], ready: Ready) -> dict[str, Tensor]:
    """What is cached of one picture."""
    entry = {name: t[0] for name, t in moments.items()}
    if ready.placement.focus:
        entry[OFFSET] = torch.tensor([ready.placement.crop_x, ready.placement.crop_y])
    if ready.mask is not None:
        entry[masks.NAME] = masks.pooled(ready.mask, *entry["mean"].shape[-2:])
    return entry


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


def _by_bucket(manifest: Manifest) -> Rows:
    """All rows, bucket by bucket; containers are read from front to back."""
    found = [np.empty(0, np.int64)]
    for members in manifest.buckets:
        rows = np.frombuffer(members.samples, np.uint32).astype(np.int64)
        alone = manifest.folders[members.source].kind == "folder"
        found.append(rows if alone else reading_order(manifest, rows))
    return np.concatenate(found)


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
