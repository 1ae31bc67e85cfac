"""A memory model in a process of its own, so that the one that asks it needs no torch.

Importing the libraries takes most of a first simulation. The process begins with it as soon as it
is there, while the other one reads the recipe.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from runtime.memory.beside import ended, forked, possible

if TYPE_CHECKING:
    from compiler.memory import Candidate, MemoryModel, Simulation


class Apart:
    """Implements `compiler.memory.MemoryModel` by asking the process. A context: inside, the
    process is there; at its end it is gone, whatever it was doing.

    `make` makes the model there, at once. Where there can be no such process, or it is lost, the
    model is made and asked here.
    """

    def __init__(self, make: Callable[[], MemoryModel]):
        self._make = make
        self._here: MemoryModel | None = None
        self._process: int | None = None
        self._asking: BinaryIO | None = None
        self._told: BinaryIO | None = None

    def __enter__(self) -> Self:
        if possible():
            asked, self._asking = _pipe()
            self._told, telling = _pipe()
            self._process = forked(lambda: self._serve(asked, telling))
            asked.close()
            telling.close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hang_up()

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`."""
        found = self._answer(candidate)
        if found is None:
            self._hang_up()
            self._here = self._here or self._make()
            return self._here.simulate(candidate)
        if isinstance(found, ValueError):
            raise found
        return found

    def _answer(self, candidate: Candidate) -> Simulation | ValueError | None:
        """What the process says; None if there is none, or it can't say."""
        if self._asking is None or self._told is None:
            return None
        try:
            pickle.dump(candidate, self._asking)
            self._asking.flush()
            answer: Simulation | ValueError | None = pickle.load(self._told)
        except (OSError, EOFError, pickle.PickleError):
            return None
        return answer

    def _serve(self, asked: BinaryIO, telling: BinaryIO) -> None:
        """Answer until nobody asks any more."""
        assert self._asking is not None
        self._asking.close()  # the other end: while it is open here, `asked` never ends
        model = self._make()
        while True:
            try:
                candidate = pickle.load(asked)
            except EOFError:
                return
            pickle.dump(_asked(model, candidate), telling)
            telling.flush()

    def _hang_up(self) -> None:
        if self._process is None:
            return
        ended(self._process)
        for end in (self._asking, self._told):
            if end is not None:
                with suppress(BrokenPipeError):  # half a question was still on its way
                    end.close()
        self._process = self._asking = self._told = None


def _pipe() -> tuple[BinaryIO, BinaryIO]:
    reader, writer = os.pipe()
    return os.fdopen(reader, "rb"), os.fdopen(writer, "wb")


def _asked(model: MemoryModel, candidate: Candidate) -> Simulation | ValueError | None:
    """None for an error that is better raised once more where a person can be told."""
    try:
        return model.simulate(candidate)
    except ValueError as error:
        return error
    except Exception:
        return None
