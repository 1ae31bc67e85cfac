"""Fills the cache: every prompt and every picture of a run is encoded once, then the encoders go.

Prompts are encoded one at a time, and so are pictures, unless the recipe says otherwise. What is
cached must be a function of its key alone: kernels are chosen by batch size, so that the same
picture in other company differs in its last bits (SD3's VAE on the CPU, four pictures or one: by
1e-6 in float32, 8e-3 in bfloat16). It also makes the peak memory of these phases that of one item.
Where `[cache] batch` asks for more pictures at a time, keys name how many, and
`runtime.data.vae_batches` says what of this is kept: a run that was killed here and started again
still trains on the same numbers. Threads decode ahead of the encoder. Of several ranks each does a
share, whole batches, on its own device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain, compress, islice
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compiler.data.index import HEADERS, Index
from compiler.data.manifest import Item, Manifest
from compiler.data.prompts import every_prompt
from compiler.data.scan import ALONE, shown
from compiler.home import default_cache
from compiler.memory import encoded_shapes
from compiler.plan import Plan
from runtime.data import masks
from runtime.data.cache import Cache
from runtime.data.decode import Ready, decoded
from runtime.data.encoders import TOGETHER, Encoders, PhaseOf, free, load
from runtime.data.focus import require_opencv
from runtime.data.keys import latent_keys, text_keys
from runtime.data.located import captions_found, latents_found, sample_keys
from runtime.data.packed import Keys
from runtime.data.pixels import BrokenPicture
from runtime.data.sharing import ALONE as ALL
from runtime.data.sharing import Team
from runtime.data.vae_batches import VaeBatches, vae_batches
from runtime.errors import RunFailed
from runtime.events import Events
from runtime.families.base import Family, TextEmbedding
from runtime.families.common import DTYPES
from runtime.memory.gauge import NO_GAUGE, Gauge, lying
from runtime.memory.phases import fullest
from runtime.memory.pieces import picture_words

OFFSET = "crop"
"""In an entry of latents: x and y of a cut that was found by looking at the pixels."""
WORTH_LOADING = 32
"""Prompts for which another rank loads the encoders too: it takes as long as to encode some."""
Shape = tuple[int, int, int]  # width, height, pictures
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


class NotFinite(RunFailed):
    """What an encoder made can't be cached: it holds infinities or NaN."""

    def __init__(self, of: str, plan: Plan, *, made: bool) -> None:
        """`made`: they are the encoder's own, and not the cache format's."""
        held = plan.precision.cache
        super().__init__(
            f"what the encoders made of {shown(of)} "
            + ("is no finite number" if made else f"exceeds what the cache's {held} holds"),
            help="its weights are damaged, or its number format is too narrow for it"
            if made
            else 'say [cache] precision = "bf16", or "fp32"; all before it is cached',
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
    gauge: Gauge = NO_GAUGE,
) -> None:
    """Encode this rank's share of all prompts that are not cached; loads nothing if there are none.
    Returns when all ranks have done theirs.

    The encoders are on the device one after the other, each inside `phase(its name)`. Raises
    CacheNotWritable.
    """
    keys = team.first(lambda: text_keys(plan, family, cache))
    every = Keys.of(keys.key(p.text, negative=p.negative) for p in every_prompt(plan, manifest))
    wanted = every.firsts(np.arange(len(every)))
    found = cache.find(every, noted=team.ranks.leads)
    missing = wanted[found.lacking()[wanted]]
    cached = len(wanted) - len(missing)
    events.phase("text", len(wanted), "prompts")
    events.advance(cached)
    mine = [team.takes(every[n], len(wanted), WORTH_LOADING) for n in missing.tolist()]
    if any(mine):
        todo = np.zeros(len(every), bool)
        todo[missing[mine]] = True
        encoders = Encoders(plan, family, phase, gauge, waiting=int(todo.sum()) > TOGETHER)
        _encode(plan, manifest, encoders, cache, every, todo, events, cached, team)
    team.meet()
    if len(missing):
        found = cache.find(every)
    start = 0
    for part in (manifest, manifest.held_out):  # as `every_prompt` begins
        if part is not None:
            captions = found.part(slice(start, start := start + len(part.texts)))
            if not captions.lacking().any():
                captions_found(part, keys, cache, captions)


def _encode(
    plan: Plan,
    manifest: Manifest,
    encoders: Encoders,
    cache: Cache,
    keys: Keys,
    todo: NDArray[np.bool_],
    events: Events,
    cached: int,
    team: Team,
) -> None:
    """Cache the embeddings of those prompts that are `todo`; `cached` prompts were there before."""
    done, encoded, cut, longest = cached, 0, 0, 0
    chosen = compress(enumerate(every_prompt(plan, manifest)), todo)
    try:
        while batch := list(islice(chosen, TOGETHER)):
            advance = partial(_advance, events, done)
            made = encoders([prompt for _, prompt in batch], advance)
            for (number, prompt), embedding in zip(batch, made, strict=True):
                of = partial("the prompt `{:.100}`".format, prompt.text)
                cache.put(keys[number], _stored(embedding, plan, of))
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
    gauge: Gauge = NO_GAUGE,
) -> None:
    """Encode this rank's share of all pictures that are not cached, bucket by bucket; loads nothing
    if there are none. Returns when all ranks have done theirs.

    Raises BrokenData, in all ranks, after all others were cached, CacheNotWritable, and
    MachineUnfit where nothing here can find the faces that the plan cuts around.
    """
    keys = team.first(lambda: sample_keys(plan, manifest, family, cache))
    batches = vae_batches(manifest, keys, plan.vae_batch)
    located = cache.find(keys, noted=team.ranks.leads)
    lacking = located.lacking()
    missing = int(lacking[batches.rows].sum())
    cached = len(batches.rows) - missing
    todo = [
        number
        for number in batches.unfinished(lacking).tolist()
        if team.takes(keys[batches[number][0]], len(keys), plan.vae_batch)
    ]
    events.phase("latents", len(batches.rows), "pictures")
    events.advance(cached)
    broken: dict[bytes, BrokenPicture] = {}
    if todo:
        given = (events, keys, batches, todo, lacking, cached, team, gauge)
        broken = _encode_pictures(plan, manifest, family, cache, *given)
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
    if missing:
        located = cache.find(keys)
    if not located.lacking().any():
        latents_found(plan, manifest, family, cache, located)


def _encode_pictures(
    plan: Plan,
    manifest: Manifest,
    family: Family,
    cache: Cache,
    events: Events,
    keys: Sequence[bytes],
    batches: VaeBatches,
    todo: Sequence[int],
    lacking: NDArray[np.bool_],
    cached: int,
    team: Team,
    gauge: Gauge,
) -> dict[bytes, BrokenPicture]:
    """Cache the latents of those rows of the batches `todo` that are `lacking`; those that can't
    be, by key. `cached` were there."""
    if any(manifest.placement(row).focus for row in _rows(batches, todo)):
        require_opencv()
    parts = load(plan, family, ("vae",))
    latents = latent_keys(plan, family, cache)
    groups = plan.evaluation.groups if plan.evaluation is not None else ()
    counted = fullest(encoded_shapes(plan.buckets, groups, plan.vae_batch))
    broken: dict[bytes, BrokenPicture] = {}
    done = 0
    try:
        pictures = decoded(_rows(batches, todo), plan, manifest, keys, latents)
        for number in todo:
            batch: dict[int, Ready] = {}
            for row, found in islice(pictures, len(batches[number])):
                if isinstance(found, BrokenPicture):
                    broken[keys[row]] = found
                else:
                    batch[row] = found
            for row, entry in _entries(plan, family, parts["vae"], batch, gauge, counted):
                if not lacking[row]:
                    continue
                rules = plan.sources[manifest.source(row)].mask
                if rules is not None and rules.floor == 0 and not entry[masks.NAME].any():
                    broken[keys[row]] = masks.BrokenMask(NOTHING_SHOWN)
                    continue
                cache.put(keys[row], _stored(entry, plan, partial(_called, manifest, row)))
                done += 1
                events.advance(cached + team.tally(done, 1))
    finally:
        try:
            cache.flush()
        finally:
            parts.clear()
            free(plan)
    return broken


def _rows(batches: VaeBatches, numbers: Iterable[int]) -> Iterator[int]:
    return chain.from_iterable(batches[number].tolist() for number in numbers)


def _entries(
    plan: Plan,
    family: Family,
    vae: Any,
    batch: Mapping[int, Ready],
    gauge: Gauge,
    counted: Sequence[Shape],
) -> list[tuple[int, dict[str, Tensor]]]:
    """What is cached of each picture of a batch, encoded together; all are of one size."""
    if not batch:
        return []
    pixels = torch.cat([ready.pixels for ready in batch.values()]).to(plan.device)
    shape = (pixels.shape[3], pixels.shape[2], len(batch))
    there = lying(vae) if gauge.wants("latents", prod(shape)) else {}
    there.setdefault("activations", []).append(pixels)
    with gauge.reading("latents", prod(shape), there) as piece:
        moments = family.encode_pixels(vae, pixels)
    piece.on, piece.planned = picture_words(*shape), _planned(shape, counted)
    held = {name: tensor.to("cpu") for name, tensor in moments.items()}
    return [
        (row, _entry({name: tensor[number] for name, tensor in held.items()}, ready))
        for number, (row, ready) in enumerate(batch.items())
    ]


def _planned(shape: Shape, counted: Sequence[Shape]) -> str:
    """What the plan `counted` of encoding batches, of which `shape` may be one. Where it can't be
    told which of several needs most, all of them, which none is like."""
    if len({(width * height, count) for width, height, count in counted}) > 1:
        return " or ".join(picture_words(*each) for each in counted)
    return picture_words(*(shape if shape in counted else counted[0]))


def _entry(moments: Mapping[str, Tensor], ready: Ready) -> dict[str, Tensor]:
    """What is cached of one picture, `moments` being its own."""
    entry = dict(moments)
    if ready.placement.focus:
        entry[OFFSET] = torch.tensor([ready.placement.crop_x, ready.placement.crop_y])
    if ready.mask is not None:
        entry[masks.NAME] = masks.pooled(ready.mask, *entry["mean"].shape[-2:])
    return entry


def prompt_embeddings(
    plan: Plan, family: Family, cache: Cache, prompts: Iterable[str], *, negative: bool = False
) -> dict[str, TextEmbedding]:
    """The cached embeddings of prompts, by text. Raises CacheIncomplete."""
    keys = text_keys(plan, family, cache)
    return {text: cache.get(keys.key(text, negative=negative)) for text in prompts}


def _stored(entry: Mapping[str, Tensor], plan: Plan, of: Callable[[], str]) -> dict[str, Tensor]:
    """Numbers in the plan's cache format; masks and indices as they are. Raises NotFinite, which
    says what they are `of`."""
    dtype, stored = DTYPES[plan.precision.cache], {}
    for name, tensor in entry.items():
        stored[name] = kept = tensor.to("cpu", dtype if tensor.is_floating_point() else None)
        if not kept.isfinite().all():
            raise NotFinite(of(), plan, made=not tensor.isfinite().all())
    return stored


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
