"""New tokens of text encoders: textual inversion (Gal et al., 2022, arXiv 2208.01618).

The table of vectors stays as it is, to the bit; behind it stand the new ones, which alone are
trained.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compiler.plan import Embeddings, NewToken, Precision
from compiler.words import vector_keys
from runtime import rng
from runtime.errors import RunFailed
from runtime.families.common import DTYPES
from runtime.methods.base import masters
from runtime.new_tokens import ROWS, add_tokens


class Extended(nn.Module):
    """A frozen table of vectors with trained ones behind it."""

    def __init__(self, base: nn.Embedding, rows: Tensor, first: int) -> None:
        """`rows` (count, channels) are the vectors of token numbers from `first` on."""
        super().__init__()
        self.base, self.first = base, first
        self.rows = nn.Parameter(rows)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token numbers (B, tokens) to vectors (B, tokens, channels)."""
        old = self.base(tokens.clamp(max=self.first - 1))
        new = nn.functional.embedding((tokens - self.first).clamp(min=0), self.rows)
        return torch.where((tokens >= self.first)[..., None], new, old)


def extend(
    module: nn.Module,
    facts: Embeddings,
    tokenizer: Any | None,
    precision: Precision,
    seed: int,
    key: str = "",
) -> dict[str, nn.Parameter]:
    """Put room for the new tokens into a text encoder; returns what to train, by its name there.

    `key` is what files call the vectors of this encoder, as in the family's card. `tokenizer` is
    that of the encoder as it is published; without one (`empty`) the vectors are unset. Raises
    RunFailed, see `add_tokens`.
    """
    encoder: Any = module
    table: nn.Embedding = encoder.get_input_embeddings()
    table.requires_grad_(False)
    weight = table.weight
    shape = (sum(token.vectors for token in facts.tokens), weight.shape[1])
    first = weight.shape[0]
    start = torch.empty(shape, dtype=DTYPES[precision.trained], device=weight.device)
    if tokenizer is not None:
        vectors = [_start(weight, tokenizer, token, seed, key) for token in facts.tokens]
        start = torch.cat(vectors).to(start)
        first = add_tokens(tokenizer, facts.tokens)
    extended = Extended(table, start.to(DTYPES[precision.compute]), first)
    encoder.set_input_embeddings(extended)
    (owned,) = masters(extended, {ROWS: start}).values()
    (place,) = (name for name, each in module.named_modules() if each is extended)
    return {f"{place}.{ROWS}": owned}


def _start(weight: Tensor, tokenizer: Any, token: NewToken, seed: int, key: str) -> Tensor:
    """The vectors of a new word (vectors, channels), float32: those of a file, of the tokens of a
    text in turn, or normal numbers of the table's own deviation."""
    if token.start:
        return _of_file(token, key, weight)
    if token.initial:
        found = tokenizer(token.initial, add_special_tokens=False).input_ids
        if not found:
            raise RunFailed(
                f"`{token.initial}`, which `{token.token}` is to start from, has no token",
                help="give another `initial`, or leave it out",
            )
        numbers = [found[index % len(found)] for index in range(token.vectors)]
        return weight[torch.tensor(numbers, device=weight.device)].detach().float()
    shape = (token.vectors, weight.shape[1])
    drawn = rng.normal(shape, seed, f"embedding {token.token}")
    return drawn.to(weight.device) * weight.detach().float().std()


def _of_file(token: NewToken, key: str, weight: Tensor) -> Tensor:
    """What the plan found in the file to start from. Raises RunFailed if it is no longer so."""
    held = load_file(token.start)
    found = next((held[k] for k in vector_keys(key, token.token) if k in held), None)
    shape = (token.vectors, weight.shape[1])
    if found is None or found.numel() != shape[0] * shape[1]:
        what = "nothing" if found is None else f"vectors of shape {tuple(found.shape)}"
        raise RunFailed(
            f"{token.start} holds {what} of `{token.token}` for an encoder of {shape[1]} channels",
            help="name the file of vectors that were learned on such a base",
        )
    return found.to(weight.device).float().view(shape)
