"""What a person asks of a run while it goes on.

Ctrl-C and SIGTERM finish the step and save; a second one stops at once. So does a file called
`stop` in the run folder, from the next step on, and one called `save` makes a checkpoint after it
(`touch runs/name/save`). Both are removed when they are seen.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from runtime.events import Events
from runtime.ranks import ALONE, Ranks

SAVE, STOP = "save", "stop"  # files in the run folder
SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM") if hasattr(signal, n))


class Stop:
    """Whether someone asked the run to stop.

    Inside `patient`, the first signal only sets `requested`; anywhere else, and at the second
    signal, KeyboardInterrupt is raised on the spot (nothing is lost: files appear whole). Several
    ranks agree in `look`, so that `requested` is the same in all of them.
    """

    def __init__(self, events: Events, folder: Path | None = None, ranks: Ranks = ALONE) -> None:
        """`folder` is where to look for files; None: nowhere."""
        self.requested = False
        self._asked = False  # this process was
        self._ranks = ranks
        self._folder = folder
        self._patient = False
        self._events = events

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Inside, signals come here. Only the main thread of a program can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        for name in (SAVE, STOP):  # left by one who came too late for the last time
            self._taken(name)
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop; the others may not know of it yet."""
        return self._asked or self.requested

    def look(self) -> bool:
        """Whether a checkpoint is asked for by a file. Notes what else is; costs two look-ups, and
        a word with the other ranks."""
        if self._taken(STOP) and not self.asked:
            self._asked = True
            self._events.message(f"`{STOP}` is there: stopping after this step, with a checkpoint")
        save = self._taken(SAVE)
        if save:
            self._events.message(f"`{SAVE}` is there: saving a checkpoint")
        asked = self.asked
        self.requested, save = self._ranks.any(asked, save)
        if self.requested and not asked:
            self._events.message("another rank was asked to stop: stopping, with a checkpoint")
        return save

    def _taken(self, name: str) -> bool:
        """Whether the file was there; it is no more."""
        path = None if self._folder is None else self._folder / name
        if path is None or not path.exists():
            return False
        with suppress(OSError):  # a folder of that name, or one who tidies at the same time
            path.unlink()
        return not path.exists()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, the code looks at `requested` often and stops in good order."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _on_signal(self, number: int, frame: FrameType | None) -> Any:
        if self.asked or not self._patient:
            raise KeyboardInterrupt
        self._asked = True
        self.requested = self._ranks.count == 1
        name = signal.Signals(number).name
        again = "; once more stops at once" if name == "SIGINT" else ""
        self._events.message(f"{name}: stopping after this step, with a checkpoint{again}")
