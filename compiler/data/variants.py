"""A caption as the model is given it: dressed with a prefix and a suffix, its tags in an order.

Text embeddings are cached, so what is random about a caption can't be drawn at each use. Instead
each caption has `variants` fixed forms, all of which are cached, and each use draws one of them. A
form is a pure function of (seed, key of the picture, which of its captions, number of the form):

1. The caption is cut at the separator into tags; empty ones are left out, equal ones stay.
2. The first `keep_tokens` tags are left alone, and so is every tag that holds the trigger word
   when tags are dropped. Of the others each is dropped with the probability `tag_dropout`; if
   none at all would be left, the one that came nearest to staying stays. So no form is empty: to
   train without a caption is what `dropout` is for.
3. What is left behind the first `keep_tokens` tags is shuffled, if `shuffle` says so.
4. The tags are joined by the separator and a space.

Before this `[trigger]` becomes the trigger word, after it prefix and suffix are put on. A prefix is
followed by one space. A suffix has one before it unless it begins with punctuation. A picture
without a caption gets neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from compiler.data.captions import tidy
from compiler.plan import Captions

PLACEHOLDER = "[trigger]"


def is_random(captions: Captions) -> bool:
    """Whether a caption has more forms than one."""
    return captions.shuffle or captions.tag_dropout > 0


def forms(texts: Sequence[str], captions: Captions, *, seed: int, key: str) -> tuple[str, ...]:
    """All texts that the picture `key` is trained with, one of which is drawn at each use.

    `texts` are its captions as found. Each counts alike, so texts may stand in it several times.
    """
    count = captions.variants if is_random(captions) else 1
    return tuple(
        _dressed(
            _form(named(text, captions), captions, f"{seed}/tags/{number}/{form}/{key}"), captions
        )
        for number, text in enumerate(texts)
        for form in range(count)
    )


def named(text: str, captions: Captions) -> str:
    """`text` with the trigger word where it says `[trigger]`."""
    return text.replace(PLACEHOLDER, captions.trigger) if captions.trigger else text


def tags_of(text: str, separator: str) -> list[str]:
    """The tags of a caption, without empty ones. A blank separator cuts at each space."""
    return [tag for part in text.split(separator.strip() or None) if (tag := tidy(part))]


def joined(tags: Sequence[str], separator: str) -> str:
    """Tags as a caption: "a, b"; " | " as it stands; a blank separator is one space."""
    mark = separator.strip()
    front = " " if mark and separator[0].isspace() else ""
    return f"{front}{mark} ".join(tags)


def _form(text: str, captions: Captions, name: str) -> str:
    if not is_random(captions):
        return text
    tags = tags_of(text, captions.separator)
    first, rest = tags[: captions.keep_tokens], tags[captions.keep_tokens :]
    if not rest:
        return joined(tags, captions.separator) if tags else text
    draws = _draws(name, len(rest))
    if captions.tag_dropout > 0:
        limit = captions.tag_dropout * 2.0**64
        stays = [d >= limit or _holds(t, captions) for t, (d, _) in zip(rest, draws, strict=True)]
        if not any(stays) and not first:
            stays[max(range(len(rest)), key=lambda at: draws[at][0])] = True
    else:
        stays = [True] * len(rest)
    order = [at for at in range(len(rest)) if stays[at]]
    if captions.shuffle:
        order.sort(key=lambda at: draws[at][1])
    return joined([*first, *(rest[at] for at in order)], captions.separator)


def _holds(tag: str, captions: Captions) -> bool:
    return says(tag, captions.trigger)


def says(text: str, trigger: str) -> bool:
    """Whether `text` holds the trigger word, in whatever case; false for an empty one."""
    return bool(trigger) and trigger.casefold() in text.casefold()


def _dressed(text: str, captions: Captions) -> str:
    if not text:
        return text
    gap = " " if captions.suffix[:1].isalnum() else ""
    return tidy(f"{captions.prefix} {text}{gap}{captions.suffix}")


def _draws(name: str, count: int) -> list[tuple[int, int]]:
    """`count` pairs of uniform numbers of 64 bits that follow from `name`."""
    bits = hashlib.shake_128(name.encode("utf-8", "surrogateescape")).digest(16 * count)
    numbers = [int.from_bytes(bits[at : at + 8], "little") for at in range(0, len(bits), 8)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))
