"""New tokens of text encoders (textual inversion): which, how, and what does not go with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from compiler import plan
from compiler.adapters import INVERSION
from compiler.draft import Draft
from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from compiler.passes.storage import LONGEST_NAME, how_to_name, safe_name
from compiler.passes.text_training import (
    judge_companions,
    judge_component,
    own_lr,
    steps_until,
    trains,
)
from compiler.passes.word_starts import with_start
from compiler.schema import EmbeddingsRecipe
from compiler.spans import KeyPath

WHERE: KeyPath = ("embeddings",)
NAME = re.compile(r"<[^\s<>|]+>")


def resolve_embeddings(draft: Draft) -> None:
    """Fill in `draft.embeddings`."""
    recipe, model = draft.recipe.embeddings, draft.model
    alone = draft.adapter is not None and draft.adapter.kind == INVERSION
    if recipe is None or model is None:
        if alone:
            draft.error(
                "conflict",
                ("adapter", "kind"),
                "textual inversion learns new tokens, and there are none",
                help='add [[embeddings.token]] with name = "<k4s4>"',
            )
        return
    encoders = tuple(model.family.embedding_keys)
    if not encoders:
        able = sorted(card.title for card in FAMILIES.values() if card.embedding_keys)
        draft.error(
            "not-in-family",
            WHERE,
            f"{model.family.title}'s pipeline loads no new tokens",
            help=f"there is textual inversion for {', '.join(able)}",
            of="key",
        )
        return
    _judge_adapter(draft)
    tokens = _tokens(draft, model.family, recipe)
    if draft.optimizer is None or draft.steps is None or draft.precision is None:
        return
    total = draft.steps.total
    draft.embeddings = made = plan.Embeddings(
        encoders=encoders,
        tokens=tuple(tokens.values()),
        lr=own_lr(draft, WHERE, recipe.lr, draft.optimizer),
        until=steps_until(draft, WHERE, recipe.until, total),
    )
    if alone and 0 < made.until < total:
        draft.error(
            "conflict",
            (*WHERE, "until"),
            f"the words are all that is learned: after {made.until} of {total} steps nothing would "
            "be trained",
            help="leave `until` out, or let the run end there",
        )
    judge_companions(draft, WHERE)
    for name in encoders:
        if not trains(draft, name):  # else it was judged
            judge_component(draft, draft.precision, name)
    _judge_captions(draft, tokens)


def _judge_adapter(draft: Draft) -> None:
    if draft.adapter is None and draft.recipe.adapter is None:
        draft.error(
            "conflict",
            WHERE,
            "without [adapter] all of the model is trained, which new tokens are not learned with",
            help='[adapter] kind = "textual-inversion" learns them alone, kind = "lora" together '
            "with a LoRA",
            of="key",
        )


def _tokens(draft: Draft, family: FamilyCard, recipe: EmbeddingsRecipe) -> dict[int, plan.NewToken]:
    """By their numbers in the recipe; a word that is given twice once."""
    found: dict[int, plan.NewToken] = {}
    for number, token in enumerate(recipe.token):
        where = (*WHERE, "token", number)
        if not NAME.fullmatch(token.name):
            draft.error(
                "unknown-value",
                (*where, "name"),
                f"`{token.name}` can't be told from other words: a new one stands in brackets",
                help=f'name = "<{re.sub(r"[^A-Za-z0-9_-]+", "-", token.name).strip("-") or "x"}>"',
            )
        elif not safe_name(inner := token.name.strip("<>"), LONGEST_NAME):
            draft.error(
                "bad-name",
                (*where, "name"),
                f"`{inner}` can't name a file everywhere, as the word's vectors are called",
                help=how_to_name(inner, LONGEST_NAME),
            )
        if _is_there(draft, (*where, "name"), token.name, found.values()):
            continue
        if len(token.initial.split()) > token.vectors:
            draft.warn(
                "no-effect",
                (*where, "initial"),
                f"`{token.initial}` has more tokens than the {token.vectors} of `vectors`: those "
                "behind are not used",
                help=f"vectors = {len(token.initial.split())}, or a shorter text",
            )
        made = plan.NewToken(token=token.name, vectors=token.vectors, initial=token.initial)
        alone = len(recipe.token) == 1
        found[number] = with_start(draft, family, where, made, token.from_, alone)
    return found


def _is_there(draft: Draft, where: KeyPath, name: str, others: Iterable[plan.NewToken]) -> bool:
    """Whether `name` is one of `others`, which is said."""
    for other in others:
        if name == other.token:
            draft.error("duplicate-id", where, f"`{name}` is given twice")
            return True
        if name.casefold() == other.token.casefold():
            draft.error(
                "duplicate-id",
                where,
                f"`{name}` and `{other.token}` are one word to a CLIP's tokenizer, which puts all "
                "in small letters",
                help="let the names differ by more than case",
            )
            return True
    return False


def _judge_captions(draft: Draft, tokens: Mapping[int, plan.NewToken]) -> None:
    """A word that no caption says learns nothing."""
    if draft.manifest is None:
        return
    for number, token in tokens.items():
        if not any(token.token in caption for caption in draft.manifest.captions):
            draft.error(
                "no-effect",
                (*WHERE, "token", number, "name"),
                f"no caption says `{token.token}`, so it would learn nothing",
                help=f'captions = {{ trigger = "{token.token}" }} puts it where they say '
                f'`[trigger]`; prefix = "{token.token}" puts it before each',
            )
