"""A base that is one file: which model it holds, by the shapes in its header alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from attrs import evolve

from compiler.diagnostics import choices
from compiler.draft import Draft, ModelFacts
from compiler.families import FAMILIES
from compiler.families.card import FamilyCard, KnownModel
from compiler.families.whole_file import MARKS, Shapes, located
from compiler.noise import noise_table, predicted
from compiler.passes.weights_file import plain_weights
from compiler.spans import KeyPath

BASE: KeyPath = ("model", "base")
REST: KeyPath = ("model", "rest")


def facts_of_known(draft: Draft, family: FamilyCard, known: KnownModel) -> ModelFacts:
    """Of a published model, from the family's card."""
    revision = draft.recipe.model.revision or "main"
    draft.decide(("model", "revision"), revision)
    return ModelFacts(
        family=family,
        base=known.base,
        local=False,
        revision=revision,
        configs={name: dict(config) for name, config in known.configs.items()},
        parameters=dict(known.parameters),
        known=known,
        index=dict(known.index),
    )


def facts_of_file(
    draft: Draft, family: FamilyCard, path: Path, named: Callable[[], ModelFacts | None]
) -> ModelFacts | None:
    """What the file at `path` holds, and what of the rest `named` gives or the card knows."""
    if family.whole_file is None:
        others = [name for name, card in FAMILIES.items() if card.whole_file]
        draft.error(
            "not-a-pipeline",
            BASE,
            f"`{path.name}` is a file; {family.name} needs a folder in the Diffusers layout",
            help=f"whole models in one file there are of {choices(others)}",
        )
        return None
    header = plain_weights(draft, BASE, path)
    if header is None:
        return None
    if draft.recipe.model.rest == "auto":
        rest = _recognised(draft, family, path, header.shapes)
    else:
        rest = named()
        if rest is not None and not _fits(draft, family, path, header.shapes, rest):
            return None
    if rest is None or not _predicts(draft, path, header.shapes, rest):
        return None
    return _joined(draft, path, header.shapes, rest)


def _recognised(draft: Draft, family: FamilyCard, path: Path, shapes: Shapes) -> ModelFacts | None:
    """The first model of the card that the file's shapes are of."""
    fitting = [known for known in family.known if not _misfit(family, known.configs, shapes)]
    if not fitting:
        _refuse(draft, family, path, shapes, [known.configs for known in family.known])
        return None
    first = fitting[0]
    draft.decide(REST, first.base, by="decided", why="its tensors have the shapes of the file's")
    different = [known.base for known in fitting if _differs(family, known, first)]
    if different:
        draft.warn(
            "single-file",
            BASE,
            f"`{path.name}` may as well be made of {choices(different)}, which its tensors' shapes "
            f"don't tell from {first.base}: what they predict, their noise levels, resolution or "
            "steps differ",
            help=f'say `rest = "{first.base}"`, or which other it is, in [model]',
        )
    return facts_of_known(draft, family, first)


def _differs(family: FamilyCard, known: KnownModel, first: KnownModel) -> bool:
    """Whether to train it is another thing than to train `first`. Of few-step models, whose files
    say nothing of it, only those count whose noise levels or index are others."""

    def noise(model: KnownModel) -> tuple[object, ...]:
        config = model.configs["scheduler"]
        return family.shift(config), predicted(family, config), noise_table(family, config)

    if known.undistilled:
        return (noise(known), known.index) != (noise(first), first.index)
    return (known.configs, known.index) != (first.configs, first.index)


def _fits(draft: Draft, family: FamilyCard, path: Path, shapes: Shapes, rest: ModelFacts) -> bool:
    draft.decide(REST, rest.base)
    if not _misfit(family, rest.configs, shapes):
        return True
    _refuse(draft, family, path, shapes, [rest.configs])
    return False


def _misfit(family: FamilyCard, configs: Mapping[str, Mapping[str, Any]], shapes: Shapes) -> str:
    """Why the file does not hold the trained component of these configurations; "" if it does."""
    assert family.whole_file is not None
    return located(family.whole_file, family.trained_component, configs, shapes)[1]


def _refuse(
    draft: Draft,
    family: FamilyCard,
    path: Path,
    shapes: Shapes,
    expected: Sequence[Mapping[str, Mapping[str, Any]]],
) -> None:
    """The file holds another family's model, or none that is known."""
    others = [card for card in FAMILIES.values() if card is not family and card.whole_file]
    for card in others:
        if any(not _misfit(card, known.configs, shapes) for known in card.known):
            draft.error(
                "wrong-family",
                BASE,
                f"`{path.name}` holds a model of {card.title}, not of {family.title}",
                help=f'say `family = "{card.name}"`',
            )
            return
    reasons = dict.fromkeys(_misfit(family, configs, shapes) for configs in expected)
    draft.error(
        "not-a-pipeline",
        BASE,
        f"`{path.name}` holds no {family.trained_component} of {family.title} that is known: "
        + "; ".join(reasons),
        help="name a folder with its configurations in `rest`; a LoRA is no base, and a "
        f"{family.trained_component} in Diffusers' names goes to "
        f"`[model.{family.trained_component}] file`",
    )


def _predicts(draft: Draft, path: Path, shapes: Shapes, rest: ModelFacts) -> bool:
    """Whether what the file says of its prediction is what the rest's scheduler says."""
    if "edm_mean" in shapes:
        draft.error(
            "not-a-pipeline",
            BASE,
            f"`{path.name}` is of Playground 2.5, whose latents and noise levels are others "
            f"(`edm_mean`) than those of {rest.family.title}",
            help=f"take a model of {rest.family.title}",
        )
        return False
    scheduler = rest.configs["scheduler"]
    for mark, (words, key, wanted) in MARKS.items():
        if mark in shapes and scheduler.get(key) != wanted:
            draft.error(
                "not-a-pipeline",
                BASE,
                f"`{path.name}` says that {words} (`{mark}`), and the scheduler of {rest.base} "
                "says otherwise",
                help=f"name a folder in `rest` whose scheduler says `{key} = {json.dumps(wanted)}`",
            )
            return False
    return True


def _joined(draft: Draft, path: Path, shapes: Shapes, rest: ModelFacts) -> ModelFacts:
    """The rest's facts with the components that the file holds."""
    layout, counts, held = rest.family.whole_file, dict(rest.parameters), []
    assert layout is not None
    for name in layout.parts:
        prefix, why = located(layout, name, rest.configs, shapes)
        if not why:
            held.append(name)
            if name not in counts or not counts[name]:
                counts[name] = sum(prod(s) for k, s in shapes.items() if k.startswith(prefix))
        elif name in layout.usual and draft.recipe.model.rest == "auto":
            draft.warn(
                "single-file",
                BASE,
                f"`{path.name}` holds no {name.replace('_', ' ')} as {rest.family.title} has it "
                f"({why}): that of {rest.base} is taken",
                help=f'say `rest = "{rest.base}"` in [model] if that is right',
            )
    return evolve(rest, parameters=counts, file=str(path), held=tuple(held))
