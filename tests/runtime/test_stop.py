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


def test_files_ask_once_each(tmp_path):
    """`save` for a checkpoint, `stop` for a stop that stays; left ones are of no effect."""
    (tmp_path / "stop").touch()
    (tmp_path / "save").touch()
    events = Listener()
    with Stop(events, tmp_path).listening() as stop:
        assert list(tmp_path.iterdir()) == []
        assert not stop.look() and not stop.requested
        (tmp_path / "save").touch()
        assert stop.look() and not stop.requested
        assert not stop.look()
        (tmp_path / "stop").touch()
        assert not stop.look() and stop.requested
        assert not stop.look() and stop.requested
    assert len(events.texts) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_called_save_is_nobody_s_wish(tmp_path):
    (tmp_path / "save").mkdir()
    assert not Stop(Silent(), tmp_path).look()
    assert (tmp_path / "save").is_dir()
