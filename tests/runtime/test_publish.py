"""Publishing: what is uploaded, that it is tried again, and that it never ends a run.

The hub is played by its library's own entry points (`HfApi`, `get_token`), a webhook by a server
here.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from attrs import evolve

from compiler.adapters import ADAPTERS, LAYERED
from compiler.plan import Ema, Publish
from runtime.errors import MachineUnfit
from runtime.execute import execute
from runtime.publish.background import Hopeless, Jobs
from runtime.publish.card import card, licence_in
from runtime.publish.publisher import Publisher, published
from runtime.track.base import OFFLINE
from tests.runtime.plans import LORA, PICTURES, draw_data, tiny_plan
from tests.runtime.test_loop import Recorder
from tests.runtime.tiny import make_tiny
from tests.tuner.examples import quickstart, sd35_large_lora

HUB = Publish(hub="me/zorps", private=True, checkpoints=True, webhook="")


class Hub:
    """What a hub holds: a file's content by its path."""

    def __init__(self):
        self.files, self.made, self.messages = {}, [], []
        self.failures, self.status = 0, None

    def fail(self):
        if self.failures:
            self.failures -= 1
            error = ConnectionError("no route to host")
            error.response = SimpleNamespace(status_code=self.status)
            raise error

    def create_repo(self, hub, *, private, exist_ok):
        self.fail()
        self.made.append((hub, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, path_in_repo, commit_message):
        self.fail()
        for path in sorted(Path(folder_path).rglob("*")):
            if path.is_file():
                name = path.relative_to(folder_path).as_posix()
                self.files[f"{path_in_repo}/{name}" if path_in_repo else name] = path.read_bytes()
        self.messages.append((repo_id, commit_message))

    def model_info(self, base, revision):
        data = SimpleNamespace(to_dict=lambda: {"license": "other", "license_name": "stabilityai"})
        return SimpleNamespace(card_data=data)


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.delenv(OFFLINE, raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish")
    make_tiny("sana", folder / "sana")
    (folder / "sana" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Sana\n")
    draw_data(folder / "dog")
    return folder


def made_plan(place, run_folder, **changes):
    given = {"steps": 4, "every": 2, "keep": 1, "adapter": LORA, "publish": HUB, **changes}
    return tiny_plan("sana", place / "sana", place / "dog", run_folder, **given)


def test_a_run_publishes_its_result_and_its_checkpoints(hub, place, tmp_path):
    plan, manifest = made_plan(place, tmp_path / "run", validation=PICTURES)
    recipe = 'name = "run"\n# three ``` ticks\n'
    assert execute(plan, manifest, Recorder(), recipe=recipe).status == "finished"
    assert hub.made == [("me/zorps", True, True)]
    written = tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors"
    assert hub.files["pytorch_lora_weights.safetensors"] == written.read_bytes()
    # The first checkpoint had been pruned here, perhaps before it was sent.
    for step in ("000002", "000004"):
        state = json.loads(hub.files[f"checkpoints/step-{step}/state.json"])
        sizes = {n: len(hub.files[f"checkpoints/step-{step}/{n}"]) for n in state["files"]}
        assert sizes == state["files"]
    text = hub.files["README.md"].decode()
    for words in (
        'license: "apache-2.0"',
        plan.digest,
        f"````toml\n{recipe.rstrip()}\n````",
        "(samples/dog-64x64-42.png)",
        'load_lora_weights("me/zorps")',
        "A LoRA of rank 2 for sana, trained for 4 steps",
    ):
        assert words in text, words
    assert str(tmp_path) not in text and str(place) not in text
    assert "samples/dog-64x64-42.png" in hub.files
    assert published(tmp_path / "run", "me/zorps") == {"result": plan.digest, "checkpoints": [2, 4]}
    assert not (tmp_path / "run" / ".publishing").exists()
    count = len(hub.messages)
    execute(plan, manifest, Recorder())  # finished: all of it is there
    assert len(hub.messages) == count


def test_an_average_beside_an_adapter_is_published_too(hub, place, tmp_path):
    both = Ema(decay=0.5, device="cpu", every=1, save="both")
    plan, manifest = made_plan(place, tmp_path / "run", ema=both)
    assert execute(plan, manifest, Recorder()).status == "finished"
    file = "pytorch_lora_weights.safetensors"
    written = tmp_path / "run" / "lora_ema" / file
    assert hub.files[f"lora_ema/{file}"] == written.read_bytes() != hub.files[file]


@pytest.mark.parametrize("kind", LAYERED)
def test_a_card_says_how_each_kind_is_loaded(hub, tmp_path, kind):
    row = ADAPTERS[kind]
    sizes = {} if row.ranked else {"rank": 0, "block_size": 8 if row.blocked else 0}
    plan = sd35_large_lora()
    adapter = evolve(plan.adapter, kind=kind, **sizes)
    text = card(
        evolve(plan, publish=HUB, adapter=adapter), recipe="", licence={}, samples=[], step=7
    )
    words = f" of rank {plan.adapter.rank}" if row.ranked else " of blocks of 8" * row.blocked
    assert f"A {row.title}{words} for" in text and f"- {kind}" in text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    loader = {"lycoris.safetensors": "create_lycoris", "adapter_model.safetensors": "PeftModel."}
    assert loader.get(ADAPTERS[kind].file, "load_lora_weights") in code


def test_a_hub_that_is_away_ends_nothing_and_gets_it_later(hub, place, tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.publish.publisher.Jobs", lambda events, _: Jobs(events, (0.0,)))
    plan, manifest = made_plan(place, tmp_path / "run")
    hub.failures = 10**9
    events = Recorder()
    assert execute(plan, manifest, events).status == "finished"
    assert any(t.startswith("could not ") and "no route to host" in t for t in events.texts)
    (last,) = (text for text in events.texts if "run it again" in text)
    assert "publish to me/zorps" in last
    assert hub.files == {}
    hub.failures = 1  # two attempts each
    assert execute(plan, manifest, Recorder()).status == "already"
    assert "README.md" in hub.files and "checkpoints/step-000004/state.json" in hub.files


def test_without_a_token_nothing_begins(hub, place, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    plan, manifest = made_plan(place, tmp_path / "run")
    with pytest.raises(MachineUnfit, match="no token of the hub") as caught:
        execute(plan, manifest, Recorder())
    assert "HF_TOKEN" in caught.value.help
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_offline_publishes_nothing_and_says_so(hub, place, tmp_path, monkeypatch):
    monkeypatch.setenv(OFFLINE, "1")
    plan, manifest = made_plan(place, tmp_path / "run")
    events = Recorder()
    assert execute(plan, manifest, events).status == "finished"
    assert sum("--offline: nothing is published" in text for text in events.texts) == 1
    assert hub.files == {} and hub.made == []
    monkeypatch.delenv(OFFLINE)
    execute(plan, manifest, Recorder())
    assert "README.md" in hub.files


@pytest.mark.parametrize(("status", "attempts"), [(403, 1), (401, 1), (500, 3), (None, 3)])
def test_only_what_may_work_is_tried_again(hub, tmp_path, status, attempts):
    plan = evolve(quickstart(), publish=HUB)
    hub.failures, hub.status = attempts, status
    events = Recorder()
    publisher = Publisher(plan, tmp_path, events, pauses=(0.0, 0.0, 0.0))
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002" / "x").write_text("x")
    publisher.checkpoint(tmp_path / "step-000002", 2)
    publisher.close(finished=True)
    refused = status in (401, 403)
    assert bool(hub.made) is not refused
    assert hub.files == ({} if refused else {"checkpoints/step-000002/x": b"x"})
    if refused:
        assert any(f"refuses it ({status})" in text for text in events.texts)


def test_jobs_go_on_after_one_that_fails():
    events, done = Recorder(), []
    jobs = Jobs(events, (0.0, 0.0))

    def fails():
        done.append("tried")
        raise OSError("no\nluck")

    def hopeless():
        done.append("hopeless")
        raise Hopeless("never")

    jobs.add("a", fails)
    jobs.add("b", hopeless)
    jobs.add("c", lambda: done.append("c"))
    jobs.close()
    assert done == ["tried"] * 3 + ["hopeless", "c"]
    assert jobs.failed == ["a", "b"]
    assert events.texts == [
        "could not a yet (no); it is tried again",
        "could not a: no",
        "could not b: never",
    ]


@pytest.fixture
def listener():
    """A webhook's server; its `heard` are the JSON bodies."""
    heard = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            heard.append((self.headers["Content-Type"], json.loads(body)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield SimpleNamespace(heard=heard, url=f"http://127.0.0.1:{server.server_port}/secret-path")
    server.shutdown()
    server.server_close()


def test_a_webhook_is_told_of_beginning_and_end(listener, place, tmp_path, monkeypatch):
    monkeypatch.delenv(OFFLINE, raising=False)
    rules = Publish(hub="", private=True, checkpoints=False, webhook=listener.url)
    plan, manifest = made_plan(place, tmp_path / "run", publish=rules)
    execute(plan, manifest, Recorder())
    assert [body["event"] for _, body in listener.heard] == ["began", "finished"]
    kind, last = listener.heard[-1]
    assert kind == "application/json" and last["plan"] == plan.digest
    assert last["text"] == last["content"] == "run: finished at step 4 of 4"

    broken, manifest = made_plan(place, tmp_path / "broken", publish=rules, lr=1e30)
    with pytest.raises(Exception, match="step"):
        execute(broken, manifest, Recorder())
    assert listener.heard[-1][1]["event"] == "failed"
    assert "the weights were not updated" in listener.heard[-1][1]["text"]


def test_a_webhook_that_is_gone_ends_nothing_and_stays_secret(tmp_path):
    url = "http://127.0.0.1:1/secret-path"
    rules = Publish(hub="", private=True, checkpoints=False, webhook=url)
    events = Recorder()
    publisher = Publisher(evolve(quickstart(), publish=rules), tmp_path, events, pauses=(0.0,))
    publisher.tell("began", 0)
    publisher.close(finished=True)
    assert any("could not tell the webhook" in text for text in events.texts)
    assert not any("secret" in text for text in events.texts)


def test_a_card_for_a_base_on_the_hub(hub, tmp_path):
    rules = evolve(HUB, webhook="https://hooks.example/secret")
    plan = evolve(sd35_large_lora(), publish=rules)
    licence = Publisher(plan, tmp_path, Recorder())._licence()
    recipe = '[publish]\nwebhook = "https://hooks.example/secret"\n'
    text = card(plan, recipe=recipe, licence=licence, samples=[("a b.png", 'x" [y]')], step=7)
    front = text.split("---\n")[1]
    for line in (
        'base_model: "stabilityai/stable-diffusion-3.5-large"',
        "base_model_relation: adapter",
        'license: "other"',
        'license_name: "stabilityai"',
        "- lora",
        '- text: "x\\" [y]"',
    ):
        assert line in front, line
    assert "secret" not in text
    assert r"![x" + '" ' + r"\[y\]](a%20b.png)" in text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "StableDiffusion3Pipeline.from_pretrained" in code


def test_the_front_of_a_card_is_yaml(tmp_path):
    yaml = pytest.importorskip("yaml")
    plan = evolve(sd35_large_lora(), publish=HUB)
    text = card(plan, recipe="", licence={"license": "mit"}, samples=[("a.png", "x: 'y'")], step=7)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "mit" and front["widget"][0]["output"]["url"] == "a.png"
    assert front["widget"][0]["text"] == "x: 'y'"


def test_licence_fields_are_found():
    head = "---\nlicense: other\nlicense_name: 'x y'\ntags:\n- license: no\n---\nlicense: z\n"
    assert licence_in(head.replace("\n", "\r\n")) == licence_in(head)
    assert licence_in(head) == {"license": "other", "license_name": "x y"}
    assert licence_in("license: mit\n") == {} and licence_in("") == {}
