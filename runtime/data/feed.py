"""Feeds the training step: batches from the cache, ready before they are asked for.

They wait on the host, and come to the device when their step's turn has come: only one window is
there. Their memory is pinned, so that nothing waits for the copies but what is computed with them.

All that is random about a sample follows from (seed, purpose, step, slot), where `slot` is the
sample's place in the whole window of its step. How a window is cut into batches or dealt out to
ranks changes nothing.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from compiler.data.geometry import shown_to_model
from compiler.data.manifest import Manifest
from compiler.plan import DataSource, Plan
from runtime import rng
from runtime.batch import Batch, Tokens
from runtime.data import masks
from runtime.data.cache import Cache, Entry, Located
from runtime.data.fill import OFFSET
from runtime.data.keys import text_keys
from runtime.data.located import captions_located, latents_located
from runtime.data.order import BatchRows, Order, Rows
from runtime.data.pages import trimmed
from runtime.families.base import Family, Framed
from runtime.methods.sprint_draws import NEGATIVE, draws
from runtime.noise_levels import noise_levels, timestep_uniforms
from runtime.noise_table import kept_at
from runtime.objective import place_weights
from runtime.offload.host import pinning
from runtime.ranks import Place
from runtime.text_training import tokenizers

MOMENTS = ("mean", "std")
"""What of a picture's entry its latents are made of."""
EMBEDDINGS = 256  # of which it is remembered where they lie: many samples may share a caption
_AHEAD = 2  # windows made before they are asked for


@frozen(kw_only=True)
class Window:
    """What one optimizer update is made of."""

    step: int  # updates done before it
    epoch: int  # counted from 1
    batches: tuple[Batch, ...]  # this rank's
    samples: int  # of the whole window, over all ranks
    names: tuple[str, ...]  # of the samples in `batches`, in order: source/key
    all_names: tuple[str, ...] = ()  # of the whole window's
    places: tuple[Place, ...] = ()  # of `batches` in the whole window

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Window:
        """The same with `change` made to each tensor."""
        return evolve(self, batches=tuple(batch.mapped(change) for batch in self.batches))


class Feed:
    """The windows of a plan's run, from a cache that was filled."""

    def __init__(
        self,
        plan: Plan,
        manifest: Manifest,
        family: Family,
        cache: Cache,
        device: torch.device,
        *,
        rank: int = 0,
    ) -> None:
        """Raises CacheIncomplete, and FileGone where a picture's content can't be told any more."""
        self._plan, self._manifest, self._family, self._cache = plan, manifest, family, cache
        self._device, self._rank = device, rank
        self._order = Order.of_plan(plan, manifest)
        self._pool = ThreadPoolExecutor(plan.workers, "noise")
        self._vae: Mapping[str, Any] = json.loads(plan.model.configs["vae"])
        self._dropout = [source.captions.dropout for source in plan.sources]
        self._latents = latents_located(plan, manifest, family, cache)
        keys = text_keys(plan, family, cache)
        self._captions = captions_located(manifest, keys, cache)
        self._embedding = lru_cache(EMBEDDINGS)(partial(cache.read, self._captions))
        if rank == 0:
            cache.used_by(plan.run_folder, self._latents, self._captions)
        wanted = any(self._dropout) or plan.sprint is not None
        unconditional = [keys.key("", negative=True)] if wanted else []
        self._unconditional = [cache.get(key) for key in unconditional]
        self._tokenizers = tokenizers(plan, family)
        trimmed()

    def windows(self, start: int) -> Iterator[Window]:
        """Windows from step `start` (updates done) to the last; closing it ends its thread."""
        ahead: queue.Queue[Window | BaseException | None] = queue.Queue(_AHEAD)
        closed = threading.Event()
        thread = threading.Thread(
            target=self._produce, args=(start, ahead, closed), name="feed", daemon=True
        )
        thread.start()
        try:
            while (item := ahead.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield self._brought(item)
        finally:
            closed.set()
            thread.join()

    def window(self, step: int) -> Window:
        """The window of one step, made here and now."""
        return self._brought(self._made(step))

    def _brought(self, window: Window) -> Window:
        """On the device."""
        pinned = self._device.type == "cuda"
        return window.mapped(lambda tensor: tensor.to(self._device, non_blocking=pinned))

    def _made(self, step: int) -> Window:
        """On the host."""
        rows = self._order.window(step)
        count = sum(len(batch.rows) for batch in rows)
        mine = slice(self._rank, None, self._plan.steps.ranks)
        names = [[self._manifest.name(int(row)) for row in batch.rows] for batch in rows]
        return Window(
            step=step,
            epoch=self._order.epoch_of(step) + 1,
            batches=tuple(self._batch(step, batch, count) for batch in rows[mine]),
            samples=count,
            names=tuple(name for batch in names[mine] for name in batch),
            all_names=tuple(name for batch in names for name in batch),
            places=_places(rows, self._plan.steps.micro_batch)[mine],
        )

    def _produce(
        self,
        start: int,
        ahead: queue.Queue[Window | BaseException | None],
        closed: threading.Event,
    ) -> None:
        try:
            for step in range(start, self._plan.steps.total):
                window = self._made(step)
                if self._device.type == "cuda":
                    # Each thread has a current device.
                    with torch.cuda.device(self._device), pinning():
                        window = window.mapped(Tensor.pin_memory)
                if not _hand_over(window, ahead, closed):
                    return
            _hand_over(None, ahead, closed)
        except BaseException as error:
            _hand_over(error, ahead, closed)

    def _batch(self, step: int, batch: BatchRows, count: int) -> Batch:
        """One batch of a step of `count` samples."""
        slots = range(batch.first_slot, batch.first_slot + len(batch.rows))
        cached = self._cache.stack(self._latents, batch.rows, MOMENTS)
        cached = {name: tensor.float() for name, tensor in cached.items()}
        latents = self._family.latents(cached, self._vae, self._posterior(cached, step, slots))
        which = [
            self._caption(step, slot, int(row)) for slot, row in zip(slots, batch.rows, strict=True)
        ]
        text = [self._unconditional[0] if n is None else self._embedding(n) for n in which]
        collated = self._family.collate_text(text)
        if self._family.card.size_conditions:
            shown = frames(self._manifest, batch.rows, self._cache, self._latents)
            collated |= self._family.size_conditions(shown)
        if self._plan.sprint is not None:
            empty = self._family.collate_text(self._unconditional * len(text))
            collated |= {f"{NEGATIVE}{name}": each for name, each in empty.items()}
        self._cache.let_go()
        noise = self._noise(latents, step, slots)
        sigmas = self._sigmas(latents, step, slots, count)
        table = self._plan.objective.table
        return Batch(
            latents=latents.float(),
            noise=noise,
            sigmas=sigmas,
            kept=None if table is None else kept_at(table, sigmas),
            text=collated,
            weights=self._weights(batch.rows),
            mask=self._mask(batch.rows),
            keeps_base=self._source(batch.rows).target == "base",
            draws=self._draws(latents, step, slots),
            tokens=self._tokens(which),
        )

    def _draws(self, latents: Tensor, step: int, slots: range) -> Mapping[str, Tensor]:
        """What a distillation draws besides."""
        if self._plan.sprint is None:
            return {}

        def normal(purpose: str) -> Tensor:
            return self._normal(purpose, latents.shape, step, slots)

        return draws(self._plan.sprint, self._plan.seed, step, slots, normal)

    def _source(self, rows: Rows) -> DataSource:
        """The one source of a batch: a bucket holds no other."""
        return self._plan.sources[self._manifest.source(int(rows[0]))]

    def _weights(self, rows: Rows) -> Tensor | None:
        """What each sample's loss is multiplied by; None where all sources have weight 1."""
        if all(source.loss_weight == 1.0 for source in self._plan.sources):
            return None
        weights = [self._plan.sources[self._manifest.source(int(r))].loss_weight for r in rows]
        return torch.tensor(weights, dtype=torch.float32)

    def _mask(self, rows: Rows) -> Tensor | None:
        """Weights of places; None where the bucket's source has no masks."""
        rules = self._source(rows).mask
        if rules is None:
            return None
        shown = self._cache.stack(self._latents, rows, (masks.NAME,))[masks.NAME].float()
        return place_weights(shown, rules.floor)

    def _posterior(self, cached: Entry, step: int, slots: range) -> Tensor | None:
        """Noise to draw the VAE's posterior with, where it has one."""
        if "std" not in cached:
            return None
        return self._normal("posterior", cached["mean"].shape, step, slots)

    def _normal(self, purpose: str, shape: torch.Size, step: int, slots: range) -> Tensor:
        seed, threads = self._plan.seed, self._plan.workers
        return rng.normals(tuple(shape[1:]), seed, purpose, step, slots, self._pool, threads)

    def _noise(self, latents: Tensor, step: int, slots: range) -> Tensor:
        noise = self._normal("noise", latents.shape, step, slots)
        if offset := self._plan.objective.offset_noise:
            places = torch.Size((*latents.shape[:2], 1, 1))
            noise += offset * self._normal("offset-noise", places, step, slots)
        return noise

    def _sigmas(self, latents: Tensor, step: int, slots: range, count: int) -> Tensor:
        objective = self._plan.objective
        drawn = timestep_uniforms(objective, self._plan.seed, step, slots, count)
        height, width = latents.shape[-2:]
        return noise_levels(objective, drawn, height, width)

    def _tokens(self, which: Sequence[int | None]) -> Tokens | None:
        """Of the captions of these numbers; None where no text encoder is trained."""
        if self._tokenizers is None:
            return None
        prompts = ["" if number is None else self._manifest.texts[number] for number in which]
        dropped = [number is None for number in which]
        return self._tokenizers.batch(prompts, dropped)

    def _caption(self, step: int, slot: int, row: int) -> int | None:
        """The number of one of the row's captions, or None where it is dropped."""
        share = self._dropout[self._manifest.source(row)]
        if share > 0 and rng.uniform(self._plan.seed, "caption-dropout", step, slot) < share:
            return None
        numbers = self._manifest.caption_numbers(row)
        which = 0
        if len(numbers) > 1:
            which = int(rng.uniform(self._plan.seed, "caption", step, slot) * len(numbers))
        return numbers[which]


def frames(manifest: Manifest, rows: Rows, cache: Cache, latents: Located) -> list[Framed]:
    """What a model may be told of these samples' sizes and cuts: the true ones, which for a cut
    that was made by looking at the pixels stand in the cache, beside the `latents`."""
    found = []
    for row in rows.tolist():
        sample = manifest[row]
        cut = sample.placement
        offset = None
        if cut.focus:
            x, y = cache.read(latents, row)[OFFSET].tolist()
            offset = (x, y)
        told = shown_to_model(sample.width, sample.height, cut, offset)
        found.append(
            Framed(
                original=(told.original_height, told.original_width),
                crop=(told.crop_y, told.crop_x),
                target=(told.height, told.width),
            )
        )
    return found


def _places(window: Sequence[BatchRows], size: int) -> tuple[Place, ...]:
    """Of each batch of a whole window, where micro-batches have at most `size` samples (0: all)."""
    counts = (-(-len(batch.rows) // (size or len(batch.rows))) for batch in window)
    befores = accumulate(counts, initial=0)
    return tuple(
        Place(part=before, slot=batch.first_slot)
        for before, batch in zip(befores, window, strict=False)
    )


def _hand_over(
    item: Window | BaseException | None,
    ahead: queue.Queue[Window | BaseException | None],
    closed: threading.Event,
) -> bool:
    """Put `item` in the queue; False if nobody waits for it any more."""
    while not closed.is_set():
        try:
            ahead.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
