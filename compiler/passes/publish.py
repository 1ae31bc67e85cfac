"""Where the result goes besides the run folder, and who is told of the run's end."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from compiler import plan
from compiler.draft import Draft
from compiler.machine import HUB_TOKEN

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
    if not address:
        return
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
    except ValueError:
        host = ""
    if host and (parts.scheme == "https" or (parts.scheme == "http" and host in HERE)):
        return
    draft.error(
        "bad-address",
        ("publish", "webhook"),
        f"`{address}` is no address that a run can be told to",
        label="https://...",
    )
