"""What of a recipe may not be shown to others: the address of a webhook, by which anyone can write
there."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

HIDDEN = "..."
_STATED = re.compile(
    r"""(["']?\bwebhook["']?[ \t]*=[ \t]*)("{3}[^"]*"{3}|'{3}[^']*'{3}|"[^"\n]*"|'[^'\n]*'|\S+)"""
)


def shown_address(address: str) -> str:
    """Scheme and host of an address alone: `https://hooks.example/...`; "" of ""."""
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
    except ValueError:
        return HIDDEN
    return f"{parts.scheme}://{host}/{HIDDEN}" if host else HIDDEN if address else ""


def without_webhook(text: str, address: str = "") -> str:
    """`text`, such as a recipe's, without `address` and whatever it states as a webhook, also in
    comments."""
    if address:
        text = text.replace(address, shown_address(address))
    return _STATED.sub(lambda found: f"{found[1]}{_masked(found[2])}", text)


def _masked(value: str) -> str:
    mark = value[0] if value[0] in "\"'" else ""
    return f"{mark}{shown_address(value.strip(mark or None).strip())}{mark}"
