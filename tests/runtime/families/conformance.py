"""What every family must do, as its own test file calls it: like Diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from attrs import frozen

from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from compiler.plan import Text
from runtime.families import family_of
from runtime.families.base import Family
from runtime.families.common import DTYPES, class_called, encode_prompts, sample
from tests.runtime.tiny import make_tiny, tiny_model

CPU = torch.device("cpu")
PROMPTS = ["A Photo of a sks dog, caf\u00e9", "", "red circle " * 60]  # the last one is cut off


@frozen(kw_only=True)
class Opened:
    """A tiny pipeline as we load it, and as Diffusers does."""

    folder: Path
    family: Family
    parts: dict[str, Any]
    stock: Any
    text: Text


def opened(name: str, folder: Path, dtype: str = "float32", **config: Any) -> Opened:
    """A tiny pipeline of the family `name`, made in `folder`."""
    make_tiny(name, folder, **config)
    family = family_of(name)
    model = tiny_model(name, folder)
    parts = {c: family.load(model, c, DTYPES[dtype], CPU) for c in family.card.components}
    stock = getattr(diffusers, family.card.pipeline).from_pretrained(folder, dtype=DTYPES[dtype])
    stock.set_progress_bar_config(disable=True)
    text = Text(max_length=family.card.prompt_length, instruction=family.card.instruction)
    return Opened(folder=folder, family=family, parts=parts, stock=stock, text=text)


def check_pictures(given: Opened, guidance: float, **options: Any) -> None:
    """Bit for bit those of the stock pipeline, from embeddings without its encoders; `options` are
    the pipeline's."""
    expected = given.stock(
        PROMPTS[0],
        negative_prompt="blurry",
        **{given.family.card.guidance_argument: guidance},
        generator=torch.Generator("cpu").manual_seed(7),
        width=128,
        height=64,
        num_inference_steps=3,
        **options,
    ).images[0]
    encode = lambda prompt, negative: encode_prompts(  # noqa: E731
        given.family, given.parts, [prompt], given.text, negative=negative
    )[0]
    trained = given.family.card.trained_component
    drawn = sample(
        given.family,
        {k: v for k, v in given.parts.items() if k in (trained, "vae", "scheduler")},
        encode(PROMPTS[0], False),
        encode("blurry", True),
        width=128,
        height=64,
        guidance=guidance,
        steps=3,
        seed=7,
    )
    found, wanted = np.asarray(drawn), np.asarray(expected)
    assert wanted.std() > 1, "a picture without contrast proves nothing"
    assert np.array_equal(found, wanted)


def check_parameters(name: str) -> None:
    """The counts of the card are those of the classes that the configurations make."""
    card = FAMILIES[name]
    seen = set()
    for known in card.known:
        for component, config in known.configs.items():
            key = (component, repr(config))
            if component == "scheduler" or key in seen:
                continue
            seen.add(key)
            made = _made(card, component, dict(config))
            count = sum(p.numel() for p in made.parameters())
            assert count == known.parameters[component], (known.base, component)
            if component == card.trained_component:
                from runtime.modules import blocks_of

                assert card.depth(config) == len(blocks_of(made, card.blocks)), known.base


def _made(card: FamilyCard, component: str, config: dict[str, Any]) -> Any:
    cls, library = class_called(card.components[component], card)
    with torch.device("meta"):
        if library == "diffusers":
            return cls.from_config(config)
        return cls(cls.config_class(**config))
