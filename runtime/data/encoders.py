"""Runs the text encoders one after the other, so that one at a time is on the device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from compiler.data.prompts import Prompt
from compiler.plan import Plan
from runtime.data.keys import text_parts
from runtime.families.base import Family, TextEmbedding
from runtime.families.common import DTYPES
from runtime.memory.gauge import NO_GAUGE, Gauge, lying
from runtime.memory.phases import PROMPT, all_tokens
from runtime.memory.pieces import given_to, prompt_words
from runtime.text_training import tokenizer_of

TOGETHER = 256  # prompts that one encoder takes before the next one's turn
PhaseOf = Callable[[str], AbstractContextManager[None]]


class Encoders:
    """A plan's text encoders, of which one at a time is on the device."""

    def __init__(
        self,
        plan: Plan,
        family: Family,
        phase: PhaseOf,
        gauge: Gauge = NO_GAUGE,
        *,
        waiting: bool,
    ) -> None:
        """Each encoder runs inside `phase(its name)`. `waiting`: each is needed again and again,
        and waits on the host in between."""
        self._plan, self._family, self._phase, self._waiting = plan, family, phase, waiting
        self._gauge = gauge
        self._names = family.card.text_encoders
        self._tokenizers = load(plan, family, [n for n in text_parts(plan) if n not in self._names])
        self._encoders: dict[str, Any] = {}
        self._classes = {each.name: each.class_name for each in plan.model.components}

    def __call__(
        self, prompts: Sequence[Prompt], advance: Callable[[float], None]
    ) -> list[TextEmbedding]:
        """Embeddings of `prompts`, on the host; `advance` is told how many are done, in parts."""
        shares: list[list[TextEmbedding]] = []
        for name in self._names:
            with self._phase(name):
                shares.append(self._encode(name, prompts, advance, len(shares)))
        return [
            self._family.join_text(dict(zip(self._names, each, strict=True)))
            for each in zip(*shares, strict=True)
        ]

    def _encode(
        self, name: str, prompts: Sequence[Prompt], advance: Callable[[float], None], number: int
    ) -> list[TextEmbedding]:
        kept = self._encoders.pop(name, None)
        encoder = load(self._plan, self._family, [name])[name] if kept is None else kept
        parts = {**self._tokenizers, name: encoder.to(self._plan.device)}
        found: list[TextEmbedding] = []
        for prompt in prompts:
            found.append(self._share(name, parts, prompt))
            advance((number * len(prompts) + len(found)) / len(self._names))
        if self._waiting:
            self._encoders[name] = encoder if len(self._names) == 1 else encoder.to("cpu")
        del encoder, parts, kept
        free(self._plan)
        return found

    def _share(self, name: str, parts: dict[str, Any], prompt: Prompt) -> TextEmbedding:
        """What one encoder makes of one prompt, on the host."""
        encoder, text = parts[name], self._plan.text
        there = lying(encoder) if self._gauge.wants(name, len(prompt.text)) else {}
        with self._gauge.reading(name, len(prompt.text), there) as piece:
            with given_to(encoder) as given:
                (share,) = self._family.encode_with(
                    name, parts, [prompt.text], text, negative=prompt.negative
                )
            piece.on = prompt_words(given)
        if self._gauge.readings.get(name) is piece:
            stand_in = {name: encoder, **all_tokens(self._family, encoder.device)}
            with given_to(encoder, runs=False) as given:
                self._family.encode_with(name, stand_in, [PROMPT], text)
            piece.planned = prompt_words(given)
        return {key: tensor.to("cpu") for key, tensor in share.items()}

    def cut(self, prompts: Sequence[Prompt]) -> tuple[int, int]:
        """How many of `prompts` are longer than what any encoder reads of them, and how many tokens
        that is. CLIP and T5 are looked at: others write prompts into a template of theirs, and
        read more than people write."""
        limits = {}
        for name in self._names:
            tokenizer, said = self._tokenizers.get(tokenizer_of(name)), self._classes.get(name, "")
            if tokenizer is None or not said.startswith(("CLIP", "T5")):
                return 0, 0
            of_clip = said.startswith("CLIP")
            limits[name] = tokenizer.model_max_length if of_clip else self._plan.text.max_length
        if not limits:
            return 0, 0
        name = max(limits, key=lambda each: limits[each])
        tokenizer, longest = self._tokenizers[tokenizer_of(name)], limits[name]
        numbers = tokenizer([p.text for p in prompts], truncation=False, verbose=False).input_ids
        return sum(len(each) > longest for each in numbers), longest

    def free(self) -> None:
        """Give their memory back."""
        self._encoders.clear()
        free(self._plan)


def load(plan: Plan, family: Family, names: Sequence[str]) -> dict[str, Any]:
    """The components `names` with their weights, on the plan's device."""
    dtypes = {component.name: DTYPES[component.dtype] for component in plan.model.components}
    device = torch.device(plan.device)
    return {name: family.load(plan.model, name, dtypes[name], device) for name in names}


def free(plan: Plan) -> None:
    """Give memory back to the device once no name holds a model any more."""
    gc.collect()
    if plan.device != "cpu":
        getattr(torch, plan.device).empty_cache()
