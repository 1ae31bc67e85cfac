"""Tells a webhook. Its address is a secret: it stands in no message."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError

from runtime.publish.background import Hopeless

SECONDS = 10.0
GONE = (401, 403, 404, 410)  # answers that do not change by asking again


def post(address: str, content: Mapping[str, Any]) -> None:
    """Send `content` as JSON. Raises OSError, and Hopeless where another attempt would not help,
    in words of its own: the library's may show the address."""
    try:
        request = urllib.request.Request(
            address,
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json", "User-Agent": "tuner"},
        )
        with urllib.request.urlopen(request, timeout=SECONDS):
            pass
    except HTTPError as error:
        if error.code in GONE:
            raise Hopeless(f"it answers {error.code}") from None
        raise OSError(f"it answers {error.code}") from None
    except URLError as error:
        raise OSError(_reason(error.reason)) from None
    except OSError as error:
        raise OSError(_reason(error)) from None
    except (ValueError, HTTPException):
        raise Hopeless("its address can't be used, or it speaks no HTTP") from None


def _reason(error: object) -> str:
    """Why it can't be reached."""
    words = error.strerror if isinstance(error, OSError) else ""
    return f"it can't be reached ({words or type(error).__name__})"
