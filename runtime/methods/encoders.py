"""Text encoders that are trained beside the model: adapters, all of their weights, new tokens."""

from __future__ import annotations

import torch
from attrs import evolve
from torch import nn

from compiler.plan import Embeddings, Model, Precision, TextTraining
from runtime import rng
from runtime.families.base import Family
from runtime.families.common import DTYPES, component_of
from runtime.methods import full, lora
from runtime.methods.base import Built
from runtime.methods.embeddings import extend
from runtime.new_tokens import encoders_of
from runtime.text_training import TrainedText, tokenizer_of


def with_encoders(
    built: Built,
    model: Model,
    text: TextTraining | None,
    embeddings: Embeddings | None,
    precision: Precision,
    family: Family,
    device: torch.device,
    *,
    empty: bool,
    seed: int,
) -> Built:
    """`built` with the encoders that are trained beside it, or learn new tokens. See `build` for
    the rest.

    Raises ValueError as `lora.prepare` does, and RunFailed for tokens that are there already.
    """
    encoders: dict[str, nn.Module] = {}
    trainable, taken = dict(built.trainable), dict(built.taken)
    modules, nested = built.adapted_modules, built.nested
    for name in encoders_of(text, embeddings):
        dtype = DTYPES[component_of(model, name).dtype]
        if empty:
            module = family.empty(model, name, dtype, device)
        else:
            module = family.load(model, name, dtype, device)
        module.requires_grad_(False)
        if text is not None and name in text.encoders:
            if text.adapter is None:
                one = full.prepare(module, precision)
            else:
                own = seed_of(seed, name)
                one = lora.prepare(
                    module, text.adapter, precision, own, encoder=name, family=model.family
                )
            trainable |= {f"{name}.{part}": parameter for part, parameter in one.trainable.items()}
            taken |= {f"{name}.{part}": pair for part, pair in one.taken.items()}
            modules += one.adapted_modules
            nested += one.nested
        if embeddings is not None and name in embeddings.encoders:
            words = tokenizer_of(name)
            host = torch.device("cpu")
            tokenizer = None if empty else family.load(model, words, torch.float32, host)
            key = family.card.embedding_keys[name]
            rows = extend(module, embeddings, tokenizer, precision, seed_of(seed, name), key)
            trainable |= {f"{name}.{part}": parameter for part, parameter in rows.items()}
        encoders[name] = module.train()
    found = TrainedText(
        family=family, text=text, embeddings=embeddings, model=model, encoders=encoders
    )
    return evolve(
        built,
        trainable=trainable,
        taken=taken,
        adapted_modules=modules,
        text=found,
        nested=nested,
    )


def seed_of(seed: int, encoder: str) -> int:
    """Of the fresh weights of one encoder's adapter: two encoders have layers of one name."""
    return rng.key(seed, encoder) % (1 << 62)
