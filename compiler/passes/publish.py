"""Where the result goes besides the run folder, and who is told of the run's end."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from compiler import plan
from compiler.draft import Draft
from compiler.machine import HUB_TOKEN
from compiler.secrets import shown_address

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
HERE = frozenset({"localhost", "127.0.0.1", "::1"})  # the only ones that may be told in the clear


def resolve_publish(draft: Draft) -> None:
    """Fill in `publish`; None where nothing is told to anyone."""
    recipe = draft.recipe.publish
    _judge_hub(draft)
    _judge_webhook(draft, recipe.webhook)
    if recipe.hub or recipe.webhook:
        draft.publish = plan.Publish(
            hub=recipe.hub,
            private=recipe.private,
            checkpoints=recipe.checkpoints,
            webhook=recipe.webhook,
        )


def _judge_hub(draft: Draft) -> None:
    hub = draft.recipe.publish.hub
    for key in ("private", "checkpoints"):
        if not hub and draft.given(("publish", key)):
            draft.error(
                "no-effect",
                ("publish", key),
                f"`{key}` has no effect: `hub` names no repository to publish to",
                help='hub = "me/my-model"',
                of="key",
            )
    if not hub:
        return
    if not REPOSITORY.fullmatch(hub) or "--" in hub or ".." in hub:
        draft.error(
            "bad-address",
            ("publish", "hub"),
            f"`{hub}` is no repository of the hub",
            label="an owner, a slash and a name",
            help='hub = "me/my-model"',
        )
    elif HUB_TOKEN in draft.machine.missing:
        draft.warn(
            "missing-token",
            ("publish", "hub"),
            "there is no token of the hub on this machine, so nothing can be published from it",
            help="run `hf auth login`, or set HF_TOKEN",
        )


def _judge_webhook(draft: Draft, address: str) -> None:
    """What is decided shows the host alone: who knows the address can write to it."""
    if not address:
        return
    draft.decide(("publish", "webhook"), shown_address(address))
    if fault := _fault(address):
        draft.error(
            "bad-address",
            ("publish", "webhook"),
            f"this is no address that a run can be told to: {fault}",
            label="https://...",
        )


def _fault(address: str) -> str:
    """What is wrong with a webhook's address, in words that don't show it; "" if nothing is."""
    if not (address.isascii() and address.isprintable()) or " " in address:
        return "spaces, line ends and letters beyond ASCII are written as %20 and the like"
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "its host or port can't be read"
    if port == 0:
        return "there is no port 0"
    if "@" in parts.netloc:
        return "a user's name and password have no place in it"
    if not host:
        return "it names no host"
    if parts.scheme == "https" or (parts.scheme == "http" and host in HERE):
        return ""
    return "it must begin with https, or with http where it is of this machine"
