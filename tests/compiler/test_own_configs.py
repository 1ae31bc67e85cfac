"""Families that share a class of models are told apart by configurations alone."""

from __future__ import annotations

from typing import Any

import pytest

from compiler.families import FAMILIES
from compiler.families.card import FamilyCard

PUBLISHED = [
    pytest.param(card, known.configs[card.trained_component], id=known.base)
    for card in FAMILIES.values()
    for known in card.known
]


def owners(card: FamilyCard, config: Any) -> list[str]:
    """Families of the same class that take `config` for theirs."""
    made = card.components[card.trained_component]
    every = [c for c in FAMILIES.values() if c.components[c.trained_component] == made]
    return [each.name for each in every if each.is_of(config)]


@pytest.mark.parametrize(("card", "config"), PUBLISHED)
def test_a_published_model_is_of_one_family(card: FamilyCard, config: Any) -> None:
    assert owners(card, config) == [card.name]


def test_a_family_that_shares_its_class_says_what_is_its_own() -> None:
    classes = [card.components[card.trained_component] for card in FAMILIES.values()]
    for card in FAMILIES.values():
        shared = classes.count(card.components[card.trained_component]) > 1
        assert shared == (card.own_config is not None), card.name


@pytest.mark.parametrize(
    "config",
    [
        {"addition_embed_type": "text", "encoder_hid_dim_type": "text_proj"},  # DeepFloyd IF
        {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"},  # Kandinsky 2.2
    ],
)
def test_other_unets_are_of_none(config: Any) -> None:
    assert owners(FAMILIES["sd"], config) == []
