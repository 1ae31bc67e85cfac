"""Publishing when the hub or a webhook does not answer: nothing waits for long, nothing fills up.

The hub is its library, which asks a server here, or an object in the library's place.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import huggingface_hub
import pytest
from attrs import evolve

from compiler.keeping import WAITING
from compiler.plan import Publish
from runtime.execute import execute
from runtime.publish import background, publisher, webhook
from runtime.publish.background import Hopeless, Jobs
from runtime.publish.publisher import STAGE, Publisher, published
from runtime.publish.webhook import post
from runtime.track.base import OFFLINE
from tests.runtime.plans import LORA, draw_data, tiny_plan
from tests.runtime.test_loop import Recorder
from tests.runtime.test_publish import HUB, Hub
from tests.tuner.examples import quickstart

TOLD = Publish(hub="", private=True, checkpoints=False, webhook="https://hooks.example/secret")
QUICK = 20.0  # seconds: far below what waiting for all attempts takes, for a machine under load


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.delenv(OFFLINE, raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return made


@pytest.fixture
def stuck(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The hub answers nothing until the event is set; meanwhile nobody has much patience."""
    event = threading.Event()
    upload = hub.upload_folder
    monkeypatch.setattr(hub, "upload_folder", lambda **given: (event.wait(60), upload(**given)))
    monkeypatch.setattr(publisher, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(publisher, "PATIENCE_SECONDS", 0.05)
    yield event
    event.set()


def checkpoint_in(folder: Path, step: int) -> Path:
    made = folder / "checkpoints" / f"step-{step:06d}"
    made.mkdir(parents=True)
    (made / "weights").write_text(f"{step}")
    return made


def test_a_webhook_that_refuses_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the usual pauses its two messages would take five minutes."""
    tried: list[str] = []

    def refuse(request: Any, timeout: float) -> None:
        tried.append(request.full_url)
        raise URLError(ConnectionRefusedError(111, "Connection refused"))

    monkeypatch.delenv(OFFLINE, raising=False)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(background, "LONGEST_PAUSE_AT_THE_END", 0.01)
    events = Recorder()
    told = Publisher(evolve(quickstart(), publish=TOLD), tmp_path, events)
    began = time.monotonic()
    told.tell("began", 0)
    told.tell("finished", 2)
    told.close(finished=True)
    assert time.monotonic() - began < QUICK
    assert len(tried) == 1 + len(background.PAUSES)  # and not the second one too
    assert events.texts[-1] == (
        "could not tell the webhook: it can't be reached (Connection refused)"
    )


def test_requests_to_the_hub_have_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own have none: a server that takes connections and says nothing."""
    server = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.delenv(OFFLINE, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(publisher, "ANSWER_SECONDS", 0.2)
    real = partial(huggingface_hub.HfApi, endpoint=address, token="hf_x")
    monkeypatch.setattr(huggingface_hub, "HfApi", real)
    events = Recorder()
    plan = evolve(quickstart(), publish=HUB)
    asked = Publisher(plan, tmp_path, events, pauses=(0.0,))
    for step in (1, 2):
        asked.checkpoint(checkpoint_in(tmp_path, step), step)
    began = time.monotonic()
    asked.close(finished=True)
    server.close()
    huggingface_hub.close_session()  # with its limit of this test
    assert time.monotonic() - began < QUICK
    assert not any(thread.name == "publish" for thread in threading.enumerate())
    assert any("could not upload checkpoint step-000001" in text for text in events.texts)
    assert events.texts[-1].startswith("not done: upload checkpoint step-000001, upload checkpoint")


def test_what_hangs_is_given_up(stuck: threading.Event, hub: Hub, tmp_path: Path) -> None:
    events = Recorder()
    plan = evolve(quickstart(), publish=evolve(HUB, checkpoints=False))
    waiting = Publisher(plan, tmp_path, events)
    (tmp_path / "lora").mkdir()
    began = time.monotonic()
    waiting.result(tmp_path / "lora", "", 250)
    waiting.close(finished=True)
    assert time.monotonic() - began < QUICK
    assert events.texts == [
        "finished; waiting to publish to me/zorps (Ctrl-C ends the waiting)",
        "not done: publish to me/zorps; run it again to try again",
    ]


def test_a_large_upload_is_given_time(
    stuck: threading.Event, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as it would take on a slow line."""
    monkeypatch.setattr(publisher, "SLOWEST", 100)
    plan = evolve(quickstart(), publish=evolve(HUB, checkpoints=False))
    events = Recorder()
    waiting = Publisher(plan, tmp_path, events)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "weights").write_bytes(bytes(6000))  # a minute
    waiting.result(tmp_path / "lora", "", 250)
    threading.Timer(0.5, stuck.set).start()
    waiting.close(finished=True)
    assert events.texts[-1] == "published: https://huggingface.co/me/zorps"


class Impatient(Recorder):
    """Presses Ctrl-C when it reads what is waited for."""

    def message(self, text: str, level: str = "info") -> None:
        super().message(text, level)
        if "Ctrl-C" in text:
            raise KeyboardInterrupt


def test_ctrl_c_ends_the_waiting_and_not_the_run(
    stuck: threading.Event, hub: Hub, tiny_sana: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And what a finished run can publish later is quiet, and goes to where the plan says now."""
    monkeypatch.setattr(publisher, "PATIENCE_SECONDS", 60.0)
    draw_data(tmp_path / "dog", ((64, 64),) * 2)
    given = {"steps": 2, "every": 1, "keep": 1, "adapter": LORA, "publish": HUB}
    plan, manifest = tiny_plan("sana", tiny_sana, tmp_path / "dog", tmp_path / "run", **given)
    events = Impatient()
    began = time.monotonic()
    outcome = execute(plan, manifest, events)
    assert time.monotonic() - began < 3 * QUICK
    assert (outcome.status, outcome.step) == ("finished", 2)
    assert "publish to me/zorps; run it again to try again" in events.texts[-1]
    assert published(tmp_path / "run", "me/zorps")["result"] == ""

    stuck.set()
    chatter = logging.getLogger("huggingface_hub.tests")
    upload = hub.upload_folder
    monkeypatch.setattr(
        hub, "upload_folder", lambda **given: (chatter.warning("thrown"), upload(**given))
    )
    heard: list[logging.LogRecord] = []
    screen = logging.Handler()
    screen.emit = heard.append
    logging.getLogger().addHandler(screen)
    try:
        for name in ("me/zorps", "me/zorps", "me/other"):
            count = len(hub.messages)
            changed = evolve(plan, publish=evolve(HUB, hub=name))
            assert execute(changed, manifest, Recorder()).status == "already"
            told = hub.messages[count:]
            assert {repository for repository, _ in told} == ({name} if told else set())
            assert bool(told) is (count == 0 or name == "me/other")
            done = published(tmp_path / "run", name)
            assert done["result"] == changed.digest
            # The first run's thread was let go as well, and may have sent what it was stuck with.
            assert {2} <= set(done["checkpoints"]) <= {1, 2}
    finally:
        logging.getLogger().removeHandler(screen)
    assert "thrown" in (tmp_path / "run" / "run.log").read_text()
    assert heard == []
    known = json.loads((tmp_path / "run" / "published.json").read_text())
    assert sorted(known) == ["me/other", "me/zorps"]


def test_a_hub_that_is_slow_fills_no_disk(
    stuck: threading.Event, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `keep = 1` leaves them: each checkpoint goes when the next one is there."""
    monkeypatch.setattr(publisher, "PATIENCE_SECONDS", 60.0)
    events = Recorder()
    busy = Publisher(evolve(quickstart(), publish=HUB), tmp_path, events)
    before = None
    for step in range(1, 16):
        folder = checkpoint_in(tmp_path, step)
        busy.checkpoint(folder, step)
        if before is not None:
            (before / "weights").unlink()
            before.rmdir()
        before = folder
        assert len(list((tmp_path / STAGE).iterdir())) <= 1 + WAITING
    stuck.set()
    busy.close(finished=True)
    sent = sorted(path.split("/")[1] for path in hub.files)
    assert sent[-1] == "step-000015" and len(sent) <= 1 + WAITING
    assert sum("the hub does not keep up" in text for text in events.texts) == 15 - len(sent)
    assert not (tmp_path / STAGE).exists()


def test_a_hub_that_is_away_keeps_no_links(hub: Hub, tmp_path: Path) -> None:
    hub.failures = 10**9
    away = Publisher(evolve(quickstart(), publish=HUB), tmp_path, Recorder(), pauses=(0.0,))
    away.checkpoint(checkpoint_in(tmp_path, 1), 1)
    while away._jobs.left:
        time.sleep(0.01)
    assert list((tmp_path / STAGE).iterdir()) == []
    hub.failures = 0
    away.checkpoint(tmp_path / "checkpoints" / "step-000001", 1)  # it is tried anew
    away.close(finished=False)
    assert list(hub.files) == ["checkpoints/step-000001/weights"]


def test_a_target_that_is_away_is_asked_once_by_each_job() -> None:
    """Until it answers; others are asked as ever."""
    tried: list[str] = []
    away = threading.Event()
    jobs = Jobs(Recorder(), (0.0, 0.0))

    def job(name: str) -> None:
        tried.append(name)
        if not away.is_set():
            raise OSError("away")

    for name in ("a", "b"):
        jobs.add(name, partial(job, name), target="hub")
    jobs.add("c", partial(job, "c"), target="other")
    while jobs.left:
        time.sleep(0.01)
    assert tried == ["a"] * 3 + ["b"] + ["c"] * 3
    away.set()
    jobs.add("d", partial(job, "d"), target="hub")
    jobs.close()
    assert tried[-1] == "d" and jobs.failed == ["a", "b", "c"]


def test_nothing_is_tried_once_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "LONGEST_PAUSE_AT_THE_END", 60.0)
    tried: list[str] = []
    events = Recorder()
    jobs = Jobs(events, (60.0, 60.0))

    def fail() -> None:
        tried.append("x")
        raise OSError("away")

    jobs.add("a", fail)
    jobs.add("b", fail)
    while len(events.texts) < 1:
        time.sleep(0.01)
    jobs.wait(0.3)  # it is tried once more at once, and pauses then
    jobs.give_up()
    jobs.wait(QUICK)
    assert not any(thread.name == "publish" for thread in threading.enumerate())
    assert len(tried) == 2 and jobs.failed == ["a", "b"]
    assert events.texts == ["could not a yet (away); it is tried again"]


@pytest.mark.parametrize(
    "address",
    [
        "https://hooks.example/secret a",
        "https://hooks.example/s\u00e9cret",
        "https://hooks.example:99999/secret",
        "https://u:secret@hooks.example/x",
        "secret://hooks.example/",
    ],
)
def test_no_message_shows_the_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong with it, as a saved plan may say."""
    monkeypatch.setattr(webhook, "SECONDS", 0.1)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: _away())
    with pytest.raises((Hopeless, OSError)) as caught:
        post(address, {})
    assert "cret" not in str(caught.value) and str(caught.value)


def _away() -> None:
    raise ConnectionRefusedError(111, "Connection refused")
