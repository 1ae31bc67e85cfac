"""Signals: the first one asks, where someone listens patiently; otherwise it interrupts."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from runtime.events import Silent
from runtime.stop import Stop

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


class Listener(Silent):
    def __init__(self):
        self.texts = []

    def message(self, text, level="info"):
        self.texts.append(text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_and_the_second_interrupts(number):
    before = signal.getsignal(number)
    events = Listener()
    with Stop(events).listening() as stop:
        with stop.patient():
            os.kill(os.getpid(), number)
            assert stop.requested
            assert signal.Signals(number).name in events.texts[0]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert len(events.texts) == 1
    assert signal.getsignal(number) == before


def test_outside_of_patience_it_interrupts_at_once():
    with Stop(Silent()).listening() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.requested


def test_in_another_thread_it_does_not_listen():
    def work():
        with Stop(Silent()).listening() as stop, stop.patient():
            seen.append(stop.requested)

    seen: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
