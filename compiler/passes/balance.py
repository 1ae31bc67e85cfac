"""How often each source is seen, and what is held out of it.

`repeats` are passes over a source in each epoch. `weight` is the other way to say it: sources are
seen in the ratio of their weights, and an epoch is as long as it takes to see every image at least
once. With n images and weight w of each source, and s the largest n / w of all, a source gives
s * w samples an epoch: exactly s * w / n passes, of which each bucket's share is rounded up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from attrs import evolve

from compiler.data.split import count_held_out, held_out
from compiler.draft import Draft
from compiler.passes.captions import listed
from compiler.passes.placing import Told
from compiler.plan import DataSource
from compiler.schema import SourceRecipe
from compiler.spans import KeyPath
from compiler.units import Interval


def trained(
    draft: Draft, where: KeyPath, recipe: SourceRecipe, told: Sequence[Told]
) -> list[Told] | None:
    """What of a source's pictures is not held out; None after an error."""
    path = (*where, "holdout")
    asked = Fraction(decimal(draft, path, recipe.holdout))
    if asked > 1 and asked.denominator > 1:
        draft.error(
            "out-of-range",
            path,
            f"{recipe.holdout:g} is neither a share nor a whole number of images",
            help=f"holdout = 0.1, or holdout = {round(recipe.holdout)}",
        )
        return None
    count = count_held_out(len(told), asked)
    if count and count >= len(told):
        draft.error(
            "holdout-too-large",
            path,
            f"{count} images are held out of {len(told)} in `{recipe.path}`: none is left to train",
            help="holdout = 0.1",
        )
        return None
    out = held_out([picture.key for picture, _ in told], asked, draft.recipe.seed)
    return [pair for pair in told if pair[0].key not in out]


_DECIMAL = re.compile(r"[0-9.]+([eE][-+]?[0-9]{1,3})?")


def decimal(draft: Draft, path: KeyPath, value: float) -> str:
    """A number exactly as it was written, as a decimal number that `Fraction` reads.

    What is written may not be what holds (a refused value is judged as if it were left out).
    """
    text = draft.located.snippet(path) if draft.given(path) else ""
    plain = text.replace("_", "").strip().lstrip("+")
    is_decimal = _DECIMAL.fullmatch(plain) is not None  # and no date
    return plain if is_decimal and float(plain) == value else repr(value)


def judge_targets(draft: Draft) -> None:
    """Refuse to learn the base's own predictions where there is no frozen base, or nothing else."""
    stated = [one.regularisation for one in draft.recipe.data.source]
    kept = [n for n, one in enumerate(stated) if one is not None and one.target == "base"]
    if stated and None not in stated and len(kept) < len(stated):
        draft.warn(
            "no-effect",
            ("data", "source", len(stated) - 1, "regularisation"),
            "all sources are images of the class: nothing is learned that they could hold back",
            help="add a source of the subject, or leave `regularisation` out",
        )
    if not kept:
        return
    path = ("data", "source", kept[0], "regularisation", "target")
    if draft.recipe.adapter is None:
        draft.error(
            "conflict",
            path,
            "a full fine-tune has no frozen base to ask: it would need a second copy of the model",
            help='an [adapter], or target = "image" to learn class images themselves',
        )
    elif len(kept) == len(stated):
        draft.error(
            "conflict",
            path,
            "nothing would be learned: all sources keep what the base predicts",
            help="add a source of what is to be learned",
        )


def judge_leaks(draft: Draft, sources: Sequence[tuple[set[str], set[str]]]) -> None:
    """Refuse what one source holds out and another trains; rows are (trained, held out) pictures,
    one for each source of the recipe."""
    for number, (_, out) in enumerate(sources):
        for other, (seen, _) in enumerate(sources):
            if leaked := sorted(out & seen):
                draft.error(
                    "holdout-leak",
                    ("data", "source", number, "holdout"),
                    f"source {other + 1} trains {len(leaked)} of the images that this one holds "
                    "out",
                    help="give both the same `holdout`: " + listed(leaked),
                )


def moment(draft: Draft, where: KeyPath, key: str, stated: Interval | None) -> str:
    """When a source joins or leaves, as the plan spells it; "" where nothing was said."""
    if stated is None:
        return ""
    path = (*where, key)
    if stated.is_off or stated.seconds is not None:
        what = "no moment" if stated.is_off else "a time"
        draft.error(
            "bad-unit",
            path,
            f"`{stated}` is {what}; a source joins and leaves after so many steps or epochs",
            help=f'{key} = "2 epochs", or leave it out',
        )
        return ""
    draft.decide(path, stated)
    return str(stated)


def with_repeats(
    draft: Draft, groups: Sequence[Sequence[DataSource]]
) -> list[list[DataSource]] | None:
    """The sources of each entry of the recipe with their exact passes per epoch."""
    recipes = draft.recipe.data.source
    if not _agree(draft):
        return None
    if not _weighted(draft, 0):
        return [
            [evolve(source, repeats=_stated(draft, number)) for source in group]
            for number, group in enumerate(groups)
        ]
    weights = [
        Fraction(decimal(draft, ("data", "source", n, "weight"), one.weight or 1.0))
        for n, one in enumerate(recipes)
    ]
    images = [sum(source.images for source in group) for group in groups]
    scale = max(count / weight for count, weight in zip(images, weights, strict=True))
    found = []
    for number, group in enumerate(groups):
        passes = scale * weights[number] / images[number]
        draft.decide(
            ("data", "source", number, "repeats"),
            spelt(passes),
            by="decided",
            why=f"weight {spelt(weights[number])}: {spelt(scale * weights[number])} samples of "
            f"{images[number]} images",
        )
        found.append([evolve(source, repeats=spelt(passes)) for source in group])
    return found


def _weighted(draft: Draft, number: int) -> bool:
    """Whether the source states a weight, be it one that was refused."""
    return draft.given(("data", "source", number, "weight"))


def _stated(draft: Draft, number: int) -> str:
    path, repeats = ("data", "source", number, "repeats"), draft.recipe.data.source[number].repeats
    draft.decide(path, repeats)
    return decimal(draft, path, repeats) if draft.given(path) else "1"


def _agree(draft: Draft) -> bool:
    """Whether all sources are balanced in one way."""
    recipes = draft.recipe.data.source
    weighted = [n for n in range(len(recipes)) if _weighted(draft, n)]
    if not weighted:
        return True
    for number in weighted:
        if draft.given(("data", "source", number, "repeats")):
            draft.error(
                "conflict",
                ("data", "source", number, "weight"),
                "both `repeats` and `weight` are given",
                help="leave one of them out",
                of="key",
            )
            return False
    if len(weighted) < len(recipes):
        without = next(n for n in range(len(recipes)) if n not in weighted)
        draft.error(
            "conflict",
            ("data", "source", weighted[0], "weight"),
            f"source {without + 1} has no `weight`: a ratio needs one for each source",
            help=f"weight = 1.0 in [[data.source]] entry {without + 1}",
            of="key",
        )
        return False
    if len(recipes) == 1:
        draft.error(
            "no-effect",
            ("data", "source", 0, "weight"),
            "`weight` has no effect: there is one source",
            help="repeats = 2",
            of="key",
        )
        return False
    return True


def spelt(number: Fraction) -> str:
    """Exactly, as a decimal number where there is one, else as a fraction: "2.5", "7/3"."""
    rest = number.denominator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    if rest > 1:
        return str(number)
    digits = 0
    while (number * 10**digits).denominator > 1:
        digits += 1
    whole, part = divmod(int(number * 10**digits), 10**digits)
    return f"{whole}.{part:0{digits}}" if digits else str(whole)
