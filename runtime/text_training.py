"""Text encoders that are trained beside the model.

Their part of a prompt's embedding is made anew in each step, from token numbers; that of the
others comes from the cache, where the whole embedding by the untrained encoders stands. The names
of their weights in training begin with the encoder's (`text_encoder.`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from compiler.plan import Embeddings, Model, NewToken, Plan, Text, TextTraining
from runtime.batch import Batch, Tokens
from runtime.families.base import Family, TextEmbedding
from runtime.families.clip import TrainsText
from runtime.families.common import inference, stock_pipeline
from runtime.new_tokens import add_tokens, encoders_of, is_rows

REMEMBERED = 4096  # prompts whose token numbers are kept
LENGTH = 77  # tokens of a CLIP's prompt, where its configuration does not say


@define(kw_only=True, eq=False)
class TrainedText:
    """The encoders in training, and how a batch's text is made with them."""

    family: Family
    text: TextTraining | None  # encoders that are trained
    embeddings: Embeddings | None  # new tokens that they learn
    model: Model
    encoders: Mapping[str, nn.Module]
    step: int = 0  # updates done
    _configs: Mapping[str, Mapping[str, Any]] = field(init=False)
    _copies: Mapping[str, nn.Parameter] = field(init=False)  # what requires gradients, by name

    def __attrs_post_init__(self) -> None:
        self._configs = {name: json.loads(text) for name, text in self.model.configs.items()}
        self._copies = {
            f"{encoder}.{name}": parameter
            for encoder, module in self.encoders.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def begin(self, step: int) -> None:
        """Called before the passes of the update after `step` others."""
        self.step = step
        for name, parameter in self._copies.items():
            parameter.requires_grad_(self.trains(name))

    def trains(self, name: str) -> bool:
        """Whether what is called `name` in training changes now."""
        if owner(name) not in self.encoders:
            return True
        facts = self.embeddings if is_rows(name) else self.text
        return facts is not None and self.step < facts.until

    def of(self, batch: Batch) -> Mapping[str, Tensor]:
        """The text of `batch`, with gradients of what is trained now."""
        assert batch.tokens is not None, "the feed gives token numbers where encoders are trained"
        return self._with(batch.text, batch.tokens)

    def embedded(
        self,
        tokens: Tokenizers,
        positive: Mapping[str, TextEmbedding],
        negative: tuple[str, TextEmbedding],
    ) -> tuple[dict[str, TextEmbedding], TextEmbedding]:
        """The embeddings of prompts, by text, and of a negative one, by the encoders as they are
        now. Given are those by the untrained ones."""
        text, unconditional = negative
        found = {
            prompt: self.renewed(tokens.batch([prompt]), cached)
            for prompt, cached in positive.items()
        }
        return found, self.renewed(tokens.batch([text], [text == ""]), unconditional)

    def renewed(self, tokens: Tokens, cached: TextEmbedding) -> TextEmbedding:
        """The embedding of one prompt of these tokens, of which `cached` is that by the untrained
        encoders; where that is."""
        device = next(next(iter(self.encoders.values())).parameters()).device
        one = {name: tensor[None].to(device) for name, tensor in cached.items()}
        with self.inference():
            found = self._with(one, tokens.to(device))
        return {name: found[name][0].to(each.device) for name, each in cached.items()}

    def _with(self, text: Mapping[str, Tensor], tokens: Tokens) -> dict[str, Tensor]:
        trains = self.family
        assert isinstance(trains, TrainsText)
        shares = {}
        for name, module in self.encoders.items():
            share = trains.encode_tokens(name, module, tokens.numbers[name])
            shares[name] = {key: _blanked(each, tokens.blank) for key, each in share.items()}
        return trains.with_shares(text, shares, self._configs)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Inside, the encoders neither drop out nor record gradients."""
        with ExitStack() as stack:
            for module in self.encoders.values():
                stack.enter_context(inference(module))
            yield


def owner(name: str) -> str:
    """What of the base the weight called `name` in training may belong to: the encoder that its
    name begins with."""
    return name.partition(".")[0]


def _blanked(share: Tensor, blank: Tensor | None) -> Tensor:
    """(B, ...) with zeros for the samples that `blank` (B,) names."""
    if blank is None:
        return share
    return share.masked_fill(blank.view(-1, *([1] * (share.ndim - 1))), 0.0)


class Tokenizers:
    """The token numbers of prompts, as the stock pipeline makes them for its CLIPs."""

    def __init__(
        self,
        model: Model,
        family: Family,
        encoders: Sequence[str],
        text: Text,
        tokens: Sequence[NewToken] = (),
    ) -> None:
        """Loads the tokenizers of `encoders`, and teaches them new `tokens`."""
        host = torch.device("cpu")
        self._parts = {
            tokenizer_of(name): family.load(model, tokenizer_of(name), torch.float32, host)
            for name in encoders
        }
        for tokenizer in self._parts.values():
            add_tokens(tokenizer, tokens)
        self._pipeline = stock_pipeline(family.card, self._parts)
        self._zeros = bool(text.zeros_for_empty)
        self._encoders = tuple(encoders)
        self.of = lru_cache(REMEMBERED)(self._of)

    def _of(self, prompt: str) -> Mapping[str, Tensor]:
        """Of each encoder (tokens,), int64."""
        return {
            name: self._numbers(self._parts[tokenizer_of(name)], prompt) for name in self._encoders
        }

    def _numbers(self, tokenizer: Any, prompt: str) -> Tensor:
        convert = getattr(self._pipeline, "maybe_convert_prompt", None)
        told = convert(prompt, tokenizer) if convert else prompt
        found: Tensor = tokenizer(
            told,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids[0]
        return found

    def batch(self, prompts: Sequence[str], dropped: Sequence[bool] = ()) -> Tokens:
        """Of several prompts, on the host. Those that are `dropped` take the negative prompt's
        place: nothing is encoded for them where the plan says that this is zeros."""
        each = [self.of(prompt) for prompt in prompts]
        blank = None
        if self._zeros and any(dropped):
            blank = torch.tensor(list(dropped))
        return Tokens(
            numbers={name: torch.stack([of[name] for of in each]) for name in self._encoders},
            blank=blank,
        )


def tokenizers(plan: Plan, family: Family) -> Tokenizers | None:
    """Those of the encoders that `plan` trains; None where it trains none."""
    encoders = encoders_of(plan.text_training, plan.embeddings)
    if not encoders:
        return None
    new = plan.embeddings.tokens if plan.embeddings else ()
    return Tokenizers(plan.model, family, encoders, plan.text, new)


def tokenizer_of(encoder: str) -> str:
    """The component that makes token numbers for `encoder`."""
    return encoder.replace("text_encoder", "tokenizer")


def example_tokens(
    model: Model, encoders: Sequence[str], batch_size: int, device: torch.device
) -> Tokens:
    """Token numbers of the right shape, for simulation."""
    numbers = {}
    for name in encoders:
        length = json.loads(model.configs[name]).get("max_position_embeddings", LENGTH)
        numbers[name] = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
    return Tokens(numbers=numbers)
