"""Passes like one before: a sampling step makes, keeps and frees what the step before did."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from runtime.memory.curve import Curve, NotAlike
from runtime.memory.rounding import rounded
from runtime.memory.tracker import Tracker


@frozen
class Known:
    """A pass that was run. Its result is one tensor, and all that it left."""

    number: int  # of its curve
    elements: int  # of the result's storage
    dtype: torch.dtype
    view: tuple[tuple[int, ...], tuple[int, ...], int]  # of the storage: shape, strides, offset

    def result(self) -> Tensor:
        """Another one like it."""
        storage = torch.empty(self.elements, dtype=self.dtype, device="meta")
        return storage.as_strided(*self.view)


class Again:
    """Which curves are those of passes that were left out, and of which pass they have the like."""

    def __init__(self) -> None:
        self._like: dict[int, int] = {}
        self._known: dict[Hashable, Known] = {}

    def complete(self, curves: Sequence[Curve]) -> list[Curve]:
        """`curves` with those of the passes that were left out."""
        found = list(curves)
        for number, like in self._like.items():
            first, instead = curves[like], curves[number]
            found[number] = evolve(
                first,
                live=first.live + (instead.live[0] - first.live[0]),
                levels=first.levels + (instead.live[0] - first.live[0]),
                hosts=first.hosts + (instead.hosts[0, 0] - first.hosts[0, 0]),
            )
        return found

    @contextmanager
    def left_out(self, model: nn.Module, tracker: Tracker) -> Iterator[None]:
        """Inside, a pass of `model` over meta tensors of the same forms as an earlier one's gives
        what has the form of that one's result, and nothing is run. Each pass has to lie between
        two marks of `tracker`."""
        stock, own = model.forward, "forward" in vars(model)

        def forward(*args: Any, **options: Any) -> Any:
            try:
                key = _described((args, options))
            except NotAlike:
                return stock(*args, **options)
            known = self._known.get(key)
            if known is not None:
                self._like[tracker.curve] = known.number
                return (known.result(),)
            before = tracker.current
            found = stock(*args, **options)
            self._learn(key, found, tracker.curve, tracker.current - before)
            return found

        model.forward = forward
        try:
            yield
        finally:
            if own:
                model.forward = stock
            else:
                del model.forward

    def _learn(self, key: Hashable, found: Any, number: int, left: int) -> None:
        if not (isinstance(found, tuple) and len(found) == 1 and isinstance(found[0], Tensor)):
            return
        made = found[0]
        storage = made.untyped_storage().nbytes()
        if left == rounded(storage):
            view = tuple(made.shape), made.stride(), int(made.storage_offset())
            elements = storage // made.element_size()
            self._known[key] = Known(number, elements, made.dtype, view)


def _described(value: Any) -> Hashable:
    """What a pass may depend on: tensors by their form. Raises NotAlike for those with values, of
    which a single one is taken for the number of a step."""
    if isinstance(value, Tensor):
        if not value.is_meta and value.numel() > 1:
            raise NotAlike("numbers, on which a pass may depend")
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, Mapping):
        return tuple((name, _described(each)) for name, each in value.items())
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    if not isinstance(value, Hashable):
        raise NotAlike("what may be another one in the end")
    return value
