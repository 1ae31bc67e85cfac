"""The evaluation loss: what the plan's objective says of held-out images.

Noise levels are quantiles of the density that is trained, and noise is a function of (seed,
picture, noise level) alone. So the loss moves only because the weights do, and two runs of one
seed and data can be compared. Nothing here touches what training depends on: no generator is
drawn from, dropout is off, and with an average (EMA) the weights are put back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compiler.data.manifest import Manifest
from compiler.keeping import LOSS
from compiler.plan import Plan
from runtime import rng
from runtime.batch import Batch
from runtime.data import masks
from runtime.data.cache import Cache
from runtime.data.feed import MOMENTS, frames
from runtime.data.keys import text_keys
from runtime.data.leaks import copies
from runtime.data.located import captions_located, latents_located
from runtime.data.order import Rows
from runtime.ema import Ema
from runtime.events import Events
from runtime.families.base import Family
from runtime.families.common import inference
from runtime.guard import named
from runtime.noise_levels import levels_at
from runtime.noise_table import kept_at
from runtime.objective import place_weights
from runtime.step import forward_losses
from runtime.stop import Stop
from runtime.text_training import TrainedText, tokenizers
from runtime.track import METRICS, Tracker, rows


class Judge:
    """Measures the evaluation loss of a run, each step's once."""

    def __init__(
        self,
        plan: Plan,
        manifest: Manifest,
        family: Family,
        cache: Cache,
        device: torch.device,
        *,
        done: int,
        met: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        """For a run that has done `done` updates; `met` is told of each batch. Raises
        CacheIncomplete, and FileGone where a picture's content can't be told any more."""
        assert plan.evaluation is not None and manifest.held_out is not None
        self._plan, self._facts, self._manifest = plan, plan.evaluation, manifest.held_out
        self._family, self._cache, self._device = family, cache, device
        self._met = met
        self._vae: Mapping[str, Any] = json.loads(plan.model.configs["vae"])
        keys = text_keys(plan, family, cache)
        self._latents = latents_located(plan, self._manifest, family, cache)
        self._captions = captions_located(self._manifest, keys, cache)
        cache.used_by(plan.run_folder, self._latents, self._captions)
        self._tokenizers = tokenizers(plan, family)
        trained_too = copies(plan, manifest, cache)
        self._rows = [
            np.array([row for row in members.samples if row not in trained_too], np.int64)
            for members in self._manifest.buckets
        ]
        """Of each bucket those that are judged."""
        told = rows(Path(plan.run_folder) / METRICS, done)
        self.measured = {int(row["step"]) for row in told if LOSS in row}
        """Steps whose loss is among the metrics already."""

    def judge(
        self,
        model: nn.Module,
        ema: Ema | None,
        step: int,
        events: Events,
        trackers: Sequence[Tracker],
        stop: Stop,
        words: TrainedText | None = None,
    ) -> None:
        """Measure after `step` updates and tell the trackers. Returns early, with nothing told, if
        a stop is requested. A mean that is no finite number is told to no tracker, but said, with
        the samples. `words` are the text encoders that are trained too."""
        if step in self.measured:
            return
        events.phase("evaluate", sum(map(len, self._rows)), "pictures")
        averaged = ema if self._facts.weights == "average" else None
        unchanged = words.inference() if words else nullcontext()
        with averaged.swapped() if averaged else nullcontext(), inference(model), unchanged:
            found = self._losses(model, events, stop, words)
        if found is None:
            return
        means, bad = found
        if bad:
            events.message(
                f"the evaluation loss after step {step} is no finite number for {named(bad, ())}; "
                "it is left out",
                "warning",
            )
        finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        for tracker in trackers if finite else ():
            tracker.metrics(step, finite)
        self.measured.add(step)

    def _losses(
        self, model: nn.Module, events: Events, stop: Stop, words: TrainedText | None
    ) -> tuple[dict[str, float], list[str]] | None:
        """The means by name, and the samples whose loss is not finite; None if stopped."""
        by_source: dict[str, list[Tensor]] = {}
        names: dict[str, list[str]] = {}
        done = 0
        for group, judged in zip(self._facts.groups, self._rows, strict=True):
            if not len(judged):
                continue
            found = by_source.setdefault(group.source, [])
            whose = names.setdefault(group.source, [])
            for start in range(0, len(judged), group.batch_size):
                if stop.asked:
                    return None
                chosen = judged[start : start + group.batch_size]
                for batch in self._batches(chosen):
                    self._met(batch)
                    found.append(
                        forward_losses(
                            self._family,
                            model,
                            batch,
                            self._plan.objective,
                            self._plan.precision,
                            words,
                        )
                    )
                    whose += [self._manifest.name(int(row)) for row in chosen]
                done += len(chosen)
                events.advance(done)
        whole = {name: torch.cat(each).cpu().double() for name, each in by_source.items()}
        means = {LOSS: torch.cat(list(whole.values())).mean().item()}
        if len(whole) > 1:
            means |= {f"{LOSS}/{name}": each.mean().item() for name, each in whole.items()}
        bad = {
            name: None
            for source, each in whole.items()
            for name, finite in zip(names[source], each.isfinite().tolist(), strict=True)
            if not finite
        }
        return means, list(bad)

    def _batches(self, chosen: Rows) -> Iterator[Batch]:
        """The batch of some rows of one bucket, at each noise level."""
        cached = self._cache.stack(self._latents, chosen, MOMENTS)
        cached = {name: tensor.float() for name, tensor in cached.items()}
        numbers = [_number(self._manifest.name(int(row))) for row in chosen]
        posterior = None
        if "std" in cached:
            posterior = self._normal("evaluation-posterior", cached["mean"], numbers)
        latents = self._family.latents(cached, self._vae, posterior).float()
        first = [self._first_caption(int(row)) for row in chosen]
        texts = [self._cache.read(self._captions, number) for number in first]
        collated = self._family.collate_text(texts)
        if self._family.card.size_conditions:
            shown = frames(self._manifest, chosen, self._cache, self._latents)
            collated |= self._family.size_conditions(shown)
        text = {name: tensor.to(self._device) for name, tensor in collated.items()}
        tokens = None
        if self._tokenizers is not None:
            captions = [self._manifest.texts[number] for number in first]
            tokens = self._tokenizers.batch(captions).to(self._device)
        mask = self._mask(chosen)
        self._cache.let_go()
        height, width = latents.shape[-2:]
        table = self._plan.objective.table
        levels = levels_at(self._plan.objective, self._facts.timesteps, height, width)
        for quantile, level in zip(self._facts.timesteps, levels, strict=True):
            kept = None if table is None else kept_at(table, level)
            noise = self._normal("evaluation-noise", latents, numbers, _number(repr(quantile)))
            yield Batch(
                latents=latents.to(self._device),
                noise=noise.to(self._device),
                sigmas=level.repeat(len(chosen)).to(self._device),
                kept=None if kept is None else kept.repeat(len(chosen)).to(self._device),
                text=text,
                mask=mask,
                tokens=tokens,
            )

    def _first_caption(self, row: int) -> int:
        return self._manifest.caption_numbers(row)[0]

    def _mask(self, chosen: Rows) -> Tensor | None:
        rules = self._plan.sources[self._manifest.source(int(chosen[0]))].mask
        if rules is None:
            return None
        shown = self._cache.stack(self._latents, chosen, (masks.NAME,))[masks.NAME].float()
        return place_weights(shown, rules.floor).to(self._device)

    def _normal(self, purpose: str, like: Tensor, numbers: Sequence[int], level: int = 0) -> Tensor:
        """Noise of the shape of `like`, a function of each picture and the level."""
        seed, shape = self._plan.seed, tuple(like.shape[1:])
        return torch.stack([rng.normal(shape, seed, purpose, each, level) for each in numbers])


def _number(name: str) -> int:
    """A number that stands for `name`, in every run."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
