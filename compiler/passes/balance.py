"""How often each source is seen, and what is held out of it.

`repeats` are passes over a source in each epoch. `weight` is the other way to say it: sources are
seen in the ratio of their weights, and an epoch is as long as it takes to see every image at least
once. With n images and weight w of each source, and s the largest n / w of all, a source gives
s * w samples an epoch: s * w / n passes. Each bucket's share is rounded up, which adds up where
buckets are many and small; then passes are as many as come nearest to s * w samples.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil, floor

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
    draft: Draft,
    where: KeyPath,
    recipe: SourceRecipe,
    told: Sequence[Told],
    identities: Sequence[str],
) -> list[Told] | None:
    """What of a source's pictures is not held out; None after an error. Rows of one of the
    `identities` are one picture; without any all are different."""
    path = (*where, "holdout")
    if recipe.holdout == "all":
        return [] if _judge_untrained(draft, where) else None
    asked = Fraction(decimal(draft, path, recipe.holdout))
    if asked > 1 and asked.denominator > 1:
        draft.error(
            "out-of-range",
            path,
            f"{recipe.holdout:g} is neither a share nor a whole number of images",
            help=f"holdout = 0.1, or holdout = {round(recipe.holdout)}",
        )
        return None
    if not asked:
        return list(told)
    names: dict[str, str] = {}
    for (picture, _), identity in zip(told, identities, strict=True):
        names[identity] = min(picture.key, names.get(identity, picture.key))
    count = count_held_out(len(names), asked)
    if count >= len(names):
        draft.error(
            "holdout-too-large",
            path,
            f"{count} images are held out of {len(names)} in `{recipe.path}`: none is left to "
            "train",
            help='holdout = 0.1, or "all" for a source that only judges',
        )
        return None
    out = held_out(list(names.values()), asked, draft.recipe.seed)
    return [
        pair for pair, identity in zip(told, identities, strict=True) if names[identity] not in out
    ]


def _judge_untrained(draft: Draft, where: KeyPath) -> bool:
    """Refuse what says how a source is trained that is not."""
    for key in ("repeats", "weight", "from", "until", "regularisation", "flip"):
        if draft.given((*where, key)):
            draft.error(
                "no-effect",
                (*where, key),
                f"`{key}` has no effect: all of this source is held out, and nothing trained on it",
                of="key",
            )
            return False
    if draft.recipe.evaluation.every.is_off:
        draft.error(
            "no-effect",
            (*where, "holdout"),
            "this source has no effect: it is not trained on, and no evaluation loss is measured",
            help='every = "1 epoch" in [evaluation], or leave the source out',
        )
        return False
    if all(one.holdout == "all" for one in draft.recipe.data.source):
        draft.error(
            "holdout-too-large",
            (*where, "holdout"),
            "all images of all sources are held out: none is left to train",
            help="add a source without `holdout`",
        )
        return False
    return True


ROUNDED = Fraction(1, 10)
"""The share by which a source's samples may be off without a word."""
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
    recipes = draft.recipe.data.source
    stated = {number: recipes[number].regularisation for number in _training(draft)}
    kept = [n for n, one in stated.items() if one is not None and one.target == "base"]
    if stated and None not in stated.values() and len(kept) < len(stated):
        draft.warn(
            "no-effect",
            ("data", "source", max(stated), "regularisation"),
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


def judge_leaks(draft: Draft, sources: Sequence[tuple[set[str], Mapping[str, str]]]) -> None:
    """Refuse what one source holds out and another trains; rows are the identities of trained
    pictures, and those held out with what they are called, one for each source of the recipe."""
    for number, (_, out) in enumerate(sources):
        for other, (seen, _) in enumerate(sources):
            if leaked := sorted(out[identity] for identity in out.keys() & seen):
                draft.error(
                    "holdout-leak",
                    ("data", "source", number, "holdout"),
                    f"source {other + 1} trains {len(leaked)} of the images that this one holds "
                    "out",
                    help=(
                        "take them out of one of the two: "
                        if draft.recipe.data.source[number].holdout == "all"
                        else "give both the same `holdout`: "
                    )
                    + listed(leaked),
                )


def _training(draft: Draft) -> list[int]:
    """Numbers of the sources of which something is trained."""
    recipes = draft.recipe.data.source
    return [number for number, recipe in enumerate(recipes) if recipe.holdout != "all"]


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
    draft: Draft, groups: Sequence[Sequence[DataSource]], buckets: Sequence[Sequence[int]]
) -> list[list[DataSource]] | None:
    """The sources of each entry of the recipe with their exact passes per epoch; `buckets` are the
    images of each of an entry's buckets."""
    if not _agree(draft):
        return None
    passes = (_by_weight if _weighted(draft, _training(draft)[0]) else _by_repeats)(draft, buckets)
    return [
        [evolve(source, repeats=passes.get(number, "1")) for source in group]
        for number, group in enumerate(groups)
    ]


def _by_repeats(draft: Draft, buckets: Sequence[Sequence[int]]) -> dict[int, str]:
    """Passes as the recipe states them, by the number of the source."""
    found = {}
    for number in _training(draft):
        found[number] = _stated(draft, number)
        passes = Fraction(found[number])
        path = ("data", "source", number, "repeats")
        _judge_rounding(draft, path, sum(buckets[number]) * passes, passes, buckets[number])
    return found


def _by_weight(draft: Draft, buckets: Sequence[Sequence[int]]) -> dict[int, str]:
    """Passes that give samples in the ratio of the weights, by the number of the source."""
    recipes = draft.recipe.data.source
    weights = {
        n: Fraction(decimal(draft, ("data", "source", n, "weight"), recipes[n].weight or 1.0))
        for n in _training(draft)
    }
    scale = max(sum(buckets[number]) / weight for number, weight in weights.items())
    found = {}
    for number, weight in weights.items():
        samples = scale * weight
        passes = nearest_passes(samples, buckets[number])
        draft.decide(
            ("data", "source", number, "repeats"),
            spelt(passes),
            by="decided",
            why=f"weight {spelt(weight)}: {spelt(samples)} samples of {sum(buckets[number])} "
            f"images{_came_near(samples, passes, buckets[number])}",
        )
        path = ("data", "source", number, "weight")
        _judge_rounding(draft, path, samples, passes, buckets[number])
        found[number] = spelt(passes)
    return found


def samples_of(passes: Fraction, buckets: Sequence[int]) -> int:
    """Samples of an epoch, of buckets of so many images."""
    return sum(ceil(images * passes) for images in buckets)


def nearest_passes(samples: Fraction, buckets: Sequence[int]) -> Fraction:
    """The passes that come nearest to so many samples (at least one of each image): exactly
    `samples / images` where rounding does no more than to make them whole, else the most that
    give the nearest number."""
    exact = samples / sum(buckets)
    if samples_of(exact, buckets) == ceil(samples):
        return exact
    low, high = Fraction(1), exact  # of samples: too few or enough, and too many
    while high - low > Fraction(1, 2 * max(buckets) ** 2):  # no other step lies between
        middle = (low + high) / 2
        low, high = (middle, high) if samples_of(middle, buckets) <= samples else (low, middle)
    fewer = min(Fraction(ceil(images * low), images) for images in buckets)
    more = min(Fraction(floor(images * fewer) + 1, images) for images in buckets)
    return min((min(more, exact), fewer), key=lambda x: abs(samples_of(x, buckets) - samples))


def _came_near(samples: Fraction, passes: Fraction, buckets: Sequence[int]) -> str:
    found = samples_of(passes, buckets)
    if found == ceil(samples):
        return ""
    return f"; {found} come nearest, because each of {len(buckets)} buckets rounds its share up"


def _judge_rounding(
    draft: Draft, path: KeyPath, samples: Fraction, passes: Fraction, buckets: Sequence[int]
) -> None:
    """Warn where a source gives other samples than it should, because its buckets are small."""
    found, exact = samples_of(passes, buckets), ceil(samples)
    if abs(found - exact) <= ROUNDED * exact:
        return
    number = path[2]
    source = draft.recipe.data.source[number] if isinstance(number, int) else None
    assert source is not None
    draft.warn(
        "uneven-rounding",
        path,
        f"`{source.path}` gives {found} samples an epoch, not {exact}: each of its "
        f"{len(buckets)} buckets rounds its share up",
        help='fewer buckets, as by crop = { aspect = "square" } or a larger `multiple`, or whole '
        "repeats",
        of="key",
    )


def _weighted(draft: Draft, number: int) -> bool:
    """Whether the source states a weight, be it one that was refused."""
    return draft.given(("data", "source", number, "weight"))


def _stated(draft: Draft, number: int) -> str:
    path, repeats = ("data", "source", number, "repeats"), draft.recipe.data.source[number].repeats
    draft.decide(path, repeats)
    return decimal(draft, path, repeats) if draft.given(path) else "1"


def _agree(draft: Draft) -> bool:
    """Whether all sources are balanced in one way."""
    numbers = _training(draft)
    weighted = [n for n in numbers if _weighted(draft, n)]
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
    if len(weighted) < len(numbers):
        without = next(n for n in numbers if n not in weighted)
        draft.error(
            "conflict",
            ("data", "source", weighted[0], "weight"),
            f"source {without + 1} has no `weight`: a ratio needs one for each source",
            help=f"weight = 1.0 in [[data.source]] entry {without + 1}",
            of="key",
        )
        return False
    if len(numbers) == 1:
        draft.error(
            "no-effect",
            ("data", "source", numbers[0], "weight"),
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
