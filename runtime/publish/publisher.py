"""Tells a webhook and fills a repository of the hub while a run goes on."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from compiler.plan import Plan, Publish
from runtime import checkpoints, files
from runtime.errors import MachineUnfit
from runtime.events import Events
from runtime.publish.background import PAUSES, Hopeless, Jobs
from runtime.publish.card import card, licence_in
from runtime.track.base import OFFLINE

PUBLISHED = "published.json"
STAGE = ".publishing"  # in the run folder: links to what is being uploaded
MOST_SAMPLES = 12
WEBHOOK_SECONDS = 10.0
CLOSING_SECONDS = 20.0  # how long a run that did not finish waits for what is left
REFUSED = (401, 403, 404)  # answers of the hub that do not change by asking again


class Publisher:
    """What a plan wants published. All calls return at once, but for `close`."""

    def __init__(
        self,
        plan: Plan,
        run_folder: Path,
        events: Events,
        *,
        leads: bool = True,
        pauses: tuple[float, ...] = PAUSES,
    ) -> None:
        """Of several ranks only the one that `leads` publishes."""
        self._plan, self._folder, self._events = plan, run_folder, events
        asked = plan.publish if leads else None
        self._rules = asked or Publish(hub="", private=True, checkpoints=False, webhook="")
        self._offline = os.environ.get(OFFLINE, "") not in ("", "0")
        self._jobs = Jobs(events, pauses)
        self._made = False

    def check(self) -> None:
        """Say what will not be published; raise MachineUnfit where a token is missing."""
        if not (self._rules.hub or self._rules.webhook):
            return
        if self._offline:
            self._events.message(
                "--offline: nothing is published. Run it again without, and what is finished is",
                "warning",
            )
        elif self._rules.hub and not _token():
            raise MachineUnfit(
                f"there is no token of the hub, so {self._rules.hub} can't be published to",
                help='run `hf auth login`, set HF_TOKEN, or --set publish.hub=""',
            )

    def tell(self, event: str, step: int, text: str = "") -> None:
        """Tell the webhook of "began", "stopped", "failed" or "finished"."""
        if not self._rules.webhook or self._offline:
            return
        plan = self._plan
        words = f"{plan.name}: {event} at step {step:,} of {plan.steps.total:,}"
        words += f". {text}" if text else ""
        content = {
            "event": event,
            "run": plan.name,
            "plan": plan.digest,
            "step": step,
            "steps": plan.steps.total,
            "hub": self._rules.hub,
            "text": words,  # what Slack and its like show
            "content": words,  # what Discord shows
        }
        self._jobs.add("tell the webhook", lambda: _post(self._rules.webhook, content))

    def checkpoint(self, folder: Path, step: int) -> None:
        """Upload a checkpoint. It may be deleted here meanwhile: what is uploaded is linked to."""
        if not (self._rules.hub and self._rules.checkpoints) or self._offline:
            return
        if step in published(self._folder)["checkpoints"]:
            return
        place = self._folder / STAGE / folder.name
        try:
            _link(folder, place)
        except OSError as error:
            self._events.message(f"checkpoint {folder.name} is not uploaded: {error}", "warning")
            return
        name = f"upload checkpoint {folder.name}"
        self._add(name, lambda: self._upload_checkpoint(place, folder.name, step))

    def result(self, result: Path, recipe: str, step: int) -> None:
        """Upload the result with its model card, unless the hub has it."""
        if not self._rules.hub or self._offline:
            return
        if published(self._folder)["result"] == self._plan.digest:
            return
        name = f"publish to {self._rules.hub}"
        self._add(name, lambda: self._upload_result(result, recipe, step))

    def close(self, *, finished: bool) -> None:
        """Wait for what is left: for a finished run until it is done or given up."""
        self._jobs.close(None if finished else CLOSING_SECONDS)
        with suppress(OSError):
            files.remove_folder(self._folder / STAGE)
        if finished and self._jobs.failed:
            self._events.message(
                f"not done: {', '.join(self._jobs.failed)}; run it again to try again", "warning"
            )

    def _add(self, name: str, job: Any) -> None:
        if not self._made:
            self._made = True
            self._jobs.add(f"make {self._rules.hub}", self._make)
        self._jobs.add(name, lambda: _judged(job))

    def _make(self) -> None:
        hub, private = self._rules.hub, self._rules.private
        _judged(lambda: _api().create_repo(hub, private=private, exist_ok=True))

    def _upload_checkpoint(self, place: Path, name: str, step: int) -> None:
        self._upload(place, f"checkpoints/{name}", f"Checkpoint after {step} steps")
        state = published(self._folder)
        state["checkpoints"] = sorted({*state["checkpoints"], step})
        _write(self._folder, state)
        shutil.rmtree(place, ignore_errors=True)

    def _upload_result(self, result: Path, recipe: str, step: int) -> None:
        place = self._folder / STAGE / "result"
        _link(result, place)
        average = result.with_name(f"{result.name}_ema")
        if average.is_dir():  # beside an adapter's trained weights
            _link(average, place / average.name)
        samples = self._samples(place)
        licence = self._licence()
        text = card(self._plan, recipe=recipe, licence=licence, samples=samples, step=step)
        (place / "README.md").unlink(missing_ok=True)  # a link to the base's own
        (place / "README.md").write_text(text, encoding="utf-8")
        self._upload(place, None, f"{self._plan.name} after {step} steps")
        _write(self._folder, published(self._folder) | {"result": self._plan.digest})
        self._events.message(f"published: https://huggingface.co/{self._rules.hub}")

    def _upload(self, folder: Path, where: str | None, message: str) -> None:
        _api().upload_folder(
            repo_id=self._rules.hub,
            folder_path=str(folder),
            path_in_repo=where,
            commit_message=message,
        )

    def _samples(self, place: Path) -> list[tuple[str, str]]:
        """The last pictures, linked below `place`: (path in the repository, prompt)."""
        from runtime.validate import folder_of, pictures

        found: list[tuple[str, str]] = []
        last = folder_of(self._folder, self._plan.steps.total)
        for picture in pictures(self._plan.validation)[:MOST_SAMPLES]:
            if (last / picture.file).exists():
                (place / "samples").mkdir(exist_ok=True)
                _link_file(last / picture.file, place / "samples" / picture.file)
                found.append((f"samples/{picture.file}", picture.prompt.text))
        return found

    def _licence(self) -> dict[str, str]:
        """The base's licence fields; {} where it states none or can't be asked."""
        model = self._plan.model
        if model.local:
            with suppress(OSError):
                return licence_in((Path(model.base) / "README.md").read_text("utf-8", "replace"))
            return {}
        with suppress(Exception):  # a gated base, a network that fails: the rest is published
            data = _api().model_info(model.base, revision=model.revision or None).card_data
            found = data.to_dict() if data else {}
            keys = ("license", "license_name", "license_link")
            return {key: str(found[key]) for key in keys if found.get(key)}
        return {}


def published(run_folder: Path) -> dict[str, Any]:
    """What the hub has of a run: "result" (a plan's digest) and "checkpoints" (steps)."""
    try:
        found = json.loads((run_folder / PUBLISHED).read_text(encoding="utf-8"))
        return {
            "result": str(found["result"]),
            "checkpoints": [int(n) for n in found["checkpoints"]],
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {"result": "", "checkpoints": []}


def catch_up(publisher: Publisher, run_folder: Path) -> None:
    """Upload the checkpoints that are here and not there."""
    for folder in checkpoints.complete(run_folder / "checkpoints"):
        publisher.checkpoint(folder, int(checkpoints.read_state(folder)["step"]))


def _write(run_folder: Path, state: Mapping[str, Any]) -> None:
    files.write_whole(run_folder / PUBLISHED, json.dumps(state, indent=2) + "\n")


def _api() -> Any:
    import huggingface_hub

    return huggingface_hub.HfApi()


def _token() -> bool:
    import huggingface_hub

    return bool(huggingface_hub.get_token())


def _judged(job: Any) -> None:
    """Run a job that asks the hub. Raises Hopeless where it will always be refused."""
    try:
        job()
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in REFUSED:
            raise Hopeless(
                f"the hub refuses it ({status}): is the token allowed to write?"
            ) from error
        raise


def _post(address: str, content: Mapping[str, Any]) -> None:
    """Raises OSError. The address, which is a secret, stands in no message."""
    request = urllib.request.Request(
        address,
        data=json.dumps(content).encode(),
        headers={"Content-Type": "application/json", "User-Agent": "tuner"},
    )
    with urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS):
        pass


def _link(folder: Path, place: Path) -> None:
    """A copy of `folder` at `place` that takes no room where the disk can link."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place, copy_function=_link_file)


def _link_file(source: Any, target: Any) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
