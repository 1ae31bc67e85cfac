"""Tells a webhook and fills a repository of the hub while a run goes on."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from compiler.keeping import WAITING
from compiler.plan import Plan, Publish
from runtime import checkpoints, files
from runtime.errors import MachineUnfit
from runtime.events import Events
from runtime.publish.background import PAUSES, Hopeless, Jobs
from runtime.publish.card import card, licence_in
from runtime.publish.webhook import post
from runtime.track.base import OFFLINE

PUBLISHED = "published.json"
TELL = "tell the webhook"
STAGE = ".publishing"  # in the run folder: links to what is being uploaded
MOST_SAMPLES = 12
SPARE = WAITING - 2  # deleted checkpoints that may wait when another one comes to wait
CLOSING_SECONDS = 20.0  # how long a run that did not finish waits for what is left
PATIENCE_SECONDS = 60.0  # the same of a finished one, and besides
SLOWEST = 250_000  # bytes a second: the time that what is left would take at this speed
SILENT_SECONDS = 1.0  # before it is said what is waited for
ANSWER_SECONDS = 60.0  # without a byte from the hub, or to it, until a request has failed
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
        self._staged: dict[int, Path] = {}  # by step: where a checkpoint lay that is to be uploaded
        self._lock = threading.Lock()

    @property
    def wanted(self) -> bool:
        """Whether anything is to be published or told to anyone."""
        return bool(self._rules.hub or self._rules.webhook)

    def check(self) -> None:
        """Say what will not be published; raise MachineUnfit where a token is missing."""
        if not self.wanted:
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
        webhook = self._rules.webhook
        self._jobs.add(TELL, lambda: post(webhook, content), target=TELL)

    def checkpoint(self, folder: Path, step: int) -> None:
        """Upload a checkpoint. It may be deleted here meanwhile: what is uploaded is linked to. Of
        those that are deleted a few wait at most, so that a hub that is away fills no disk."""
        if not (self._rules.hub and self._rules.checkpoints) or self._offline:
            return
        with self._lock:
            if step in self._staged or step in self._known["checkpoints"]:
                return
            self._staged[step] = folder
        self._drop_spare()
        place = self._folder / STAGE / folder.name
        try:
            _link(folder, place)
        except OSError as error:
            self._events.message(f"checkpoint {folder.name} is not uploaded: {error}", "warning")
            self._unstage(place, step)
            return
        self._jobs.add(
            f"upload checkpoint {folder.name}",
            lambda: self._upload_checkpoint(place, folder.name, step),
            target=self._rules.hub,
            over=lambda: self._unstage(place, step),
            bytes=_size(place),
        )

    def result(self, result: Path, recipe: str, step: int) -> None:
        """Upload the result, which is that of `step`, with its model card, unless the hub has
        it."""
        if not self._rules.hub or self._offline:
            return
        if self._known["result"] == self._plan.digest:
            return
        self._jobs.add(
            f"publish to {self._rules.hub}",
            lambda: self._upload_result(result, recipe, step),
            target=self._rules.hub,
            over=lambda: shutil.rmtree(self._folder / STAGE / "result", ignore_errors=True),
            bytes=_size(result),
        )

    def close(self, *, finished: bool) -> None:
        """Wait for what is left, of a finished run for as long as a slow line needs. Ctrl-C ends
        the waiting, not the run."""
        with suppress(KeyboardInterrupt):
            if finished and not self._jobs.wait(SILENT_SECONDS):
                self._say_what_is_left()
            left = sum(entry.bytes for entry in self._jobs.left)
            self._jobs.wait(PATIENCE_SECONDS + left / SLOWEST if finished else CLOSING_SECONDS)
        self._jobs.give_up()
        with suppress(OSError):
            files.remove_folder(self._folder / STAGE)
        undone = [name for name in dict.fromkeys(self._jobs.failed) if name != TELL]
        if finished and undone:
            self._events.message(
                f"not done: {', '.join(undone)}; run it again to try again", "warning"
            )

    def _say_what_is_left(self) -> None:
        self._events.phase("publish", 0, "")
        names = ", ".join(dict.fromkeys(entry.name for entry in self._jobs.left))
        if names:
            self._events.message(f"finished; waiting to {names} (Ctrl-C ends the waiting)")

    @property
    def _known(self) -> dict[str, Any]:
        return published(self._folder, self._rules.hub)

    def _drop_spare(self) -> None:
        """Take out the oldest of what waits and is deleted here, beyond `SPARE`."""
        with self._lock:
            gone = [(step, f) for step, f in sorted(self._staged.items()) if not f.exists()]
        for _, folder in gone[: len(gone) - SPARE]:
            if self._jobs.withdraw(f"upload checkpoint {folder.name}"):
                words = f"the hub does not keep up: checkpoint {folder.name} is not uploaded"
                self._events.message(words, "warning")

    def _unstage(self, place: Path, step: int) -> None:
        shutil.rmtree(place, ignore_errors=True)
        with self._lock:
            self._staged.pop(step, None)

    def _make(self) -> None:
        """Make the repository, unless that was done: nothing is uploaded without."""
        if not self._made:
            hub, private = self._rules.hub, self._rules.private
            _api().create_repo(hub, private=private, exist_ok=True)
            self._made = True

    def _upload_checkpoint(self, place: Path, name: str, step: int) -> None:
        self._upload(place, f"checkpoints/{name}", f"Checkpoint after {step} steps")
        self._note(checkpoints=sorted({*self._known["checkpoints"], step}))

    def _upload_result(self, result: Path, recipe: str, step: int) -> None:
        place = self._folder / STAGE / "result"
        _link(result, place)
        average = result.with_name(f"{result.name}_ema")
        if average.is_dir():  # beside an adapter's trained weights
            _link(average, place / average.name)
        samples = self._samples(place, step)
        licence = self._licence()
        text = card(self._plan, recipe=recipe, licence=licence, samples=samples, step=step)
        (place / "README.md").unlink(missing_ok=True)  # a link to the base's own
        (place / "README.md").write_text(text, encoding="utf-8")
        self._upload(place, None, f"{self._plan.name} after {step} steps")
        self._note(result=self._plan.digest)
        self._events.message(f"published: https://huggingface.co/{self._rules.hub}")

    def _note(self, **changes: Any) -> None:
        """Note what the hub has got; of other repositories that is noted too."""
        state = {**_published(self._folder), self._rules.hub: {**self._known, **changes}}
        files.write_whole(self._folder / PUBLISHED, json.dumps(state, indent=2) + "\n")

    def _upload(self, folder: Path, where: str | None, message: str) -> None:
        with _judged():
            self._make()
            _api().upload_folder(
                repo_id=self._rules.hub,
                folder_path=str(folder),
                path_in_repo=where,
                commit_message=message,
            )

    def _samples(self, place: Path, step: int) -> list[tuple[str, str]]:
        """The pictures of `step`, linked below `place`: (path in the repository, prompt)."""
        from runtime.validate import folder_of, pictures

        found: list[tuple[str, str]] = []
        last = folder_of(self._folder, step)
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


def published(run_folder: Path, hub: str) -> dict[str, Any]:
    """What the repository `hub` has of a run: "result" (a plan's digest) and "checkpoints"
    (steps)."""
    try:
        found = _published(run_folder)[hub]
        return {
            "result": str(found["result"]),
            "checkpoints": [int(n) for n in found["checkpoints"]],
        }
    except (ValueError, KeyError, TypeError):
        return {"result": "", "checkpoints": []}


def _published(run_folder: Path) -> dict[str, Any]:
    """What each repository has, by its name."""
    try:
        found = json.loads((run_folder / PUBLISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def catch_up(publisher: Publisher, run_folder: Path) -> None:
    """Upload the checkpoints that are here and not there."""
    for folder in checkpoints.complete(run_folder / "checkpoints"):
        publisher.checkpoint(folder, int(checkpoints.read_state(folder)["step"]))


def _api() -> Any:
    """The library's own, with requests that don't wait for ever: it sets no limit itself."""
    import huggingface_hub

    with suppress(AttributeError):  # which its releases before 1.0 do not know
        huggingface_hub.get_session().timeout = ANSWER_SECONDS
    return huggingface_hub.HfApi()


def _token() -> bool:
    import huggingface_hub

    return bool(huggingface_hub.get_token())


@contextmanager
def _judged() -> Iterator[None]:
    """Inside, the hub is asked. Raises Hopeless where it will always refuse."""
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in REFUSED:
            raise Hopeless(
                f"the hub refuses it ({status}): is the token allowed to write?"
            ) from error
        raise


def _size(folder: Path) -> int:
    """Bytes of all files in `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _link(folder: Path, place: Path) -> None:
    """A copy of `folder` at `place` that takes no room where the disk can link."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place, copy_function=_link_file)


def _link_file(source: Any, target: Any) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
