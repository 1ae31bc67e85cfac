"""What a piece of a phase is, in words: of the run's own, and of the one that the plan counted.

The plan's piece is not run: what it would give the model is looked at, and then it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

Calls = list[list[tuple[int, ...]]]
"""The shapes of the tensors that a module was given, call by call."""


class _SeenError(Exception):
    """Ends what runs only to be looked at."""


@contextmanager
def given_to(module: nn.Module, *, runs: bool = True) -> Iterator[Calls]:
    """What `module` is given inside. If it does not run, its first call ends the block."""
    found: Calls = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append([tuple(each.shape) for each in tensors_in((args, kwargs))])
        if not runs:
            raise _SeenError

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with suppress(_SeenError):
            yield found
    finally:
        handle.remove()


def prompt_words(given: Calls) -> str:
    """Of token numbers (prompts, tokens) given to an encoder; "" where they were not seen."""
    lengths = [shape[-1] for call in given for shape in call if len(shape) == 2]
    return f"a prompt of {max(lengths):,} tokens" if lengths else ""


def picture_words(width: int, height: int, count: int = 1) -> str:
    """Of one picture, or of several that are encoded together."""
    return f"{width}x{height}" if count == 1 else f"{count} pictures of {width}x{height}"


def drawing_words(
    width: int, height: int, embedding: Mapping[str, Tensor], model: Calls, block: Calls
) -> str:
    """Of a picture that is drawn, by what the model and its first block are given.

    Text is known by the channels of the prompt's `embedding`. How much of it the blocks see may
    depend on its mask, so their tokens are counted too.
    """
    channels = max(embedding.values(), key=lambda each: each.numel()).shape[-1]
    text = _most(model, lambda shape: shape[-2] if len(shape) > 1 and shape[-1] == channels else 0)
    inside = _most(block, lambda shape: shape[-2] if len(shape) == 3 else 0)
    return f"{picture_words(width, height)}, {text:,} tokens of text, {inside:,} in a block"


def tensors_in(tree: object) -> Iterator[Tensor]:
    """All tensors of nested mappings, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)


def _most(given: Calls, tokens: Callable[[tuple[int, ...]], int]) -> int:
    return max((sum(map(tokens, call)) for call in given), default=0)
