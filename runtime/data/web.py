"""Files on the web through Python's own client: whole, or in part."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from compiler.data.scan import shown
from runtime.errors import RunFailed, first_line
from runtime.files import PARTIAL, sync

PATIENCE = 30.0
"""Seconds without an answer."""
FAILURES = (OSError, ValueError, HTTPException)
"""What a request that fails raises."""
BLOCK = 1 << 20
_OURS = ("builtins", "compiler", "runtime", "tuner")


def opened(url: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> Any:
    """The server's answer, as a file with `headers`. Raises what is among FAILURES."""
    told = {"User-Agent": "tuner", **(headers or {})}
    request = urllib.request.Request(url, headers=told, method=method)
    return urllib.request.urlopen(request, timeout=PATIENCE)


def state(answer: Any) -> str:
    """What the server says of the file's state; "" where it says nothing."""
    head = answer.headers
    said = head.get("ETag") or head.get("Last-Modified") or ""
    return f"{said} {head.get('Content-Length', '')}" if said else ""


def length(answer: Any) -> int | None:
    """How many bytes are announced."""
    told = str(answer.headers.get("Content-Length", ""))
    return int(told) if told.isdigit() else None


def part(url: str, start: int, count: int, mark: str) -> bytes:
    """`count` bytes from `start` on, of a file that is in the state `mark`. Raises what is among
    FAILURES, ValueError where the server has something else."""
    with opened(url, headers={"Range": f"bytes={start}-{start + count - 1}"}) as answer:
        if answer.status != 206:
            raise ValueError("the server gives whole files only")
        said = str(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
        if mark and said and said != mark.rpartition(" ")[0]:
            raise ValueError("it has changed since it was listed")
        return bytes(answer.read(count))


def copy(source: IO[bytes], target: IO[bytes], most: int | None = None) -> None:
    """Raises ValueError where there are more than `most` bytes, ConnectionError where less come
    than were announced."""
    done = 0
    while block := source.read(BLOCK):
        done += len(block)
        if most is not None and done > most:
            raise ValueError(f"longer than {most >> 20:,} MiB: this is no picture")
        target.write(block)
    told = length(source) if hasattr(source, "headers") else None
    if told is not None and told != done:
        raise ConnectionError(f"{done:,} of {told:,} bytes came")


@contextmanager
def partial(path: Path) -> Iterator[IO[bytes]]:
    """A file that becomes `path` if all goes well; runs at the same time have one each."""
    beside = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        with open(beside, "wb") as file:
            yield file
        sync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def told(url: str) -> Iterator[None]:
    """The libraries' many exceptions as one that says what could not be copied."""
    try:
        yield
    except RunFailed:
        raise
    except Exception as error:
        if not (isinstance(error, (*FAILURES, RuntimeError)) or _of_library(error)):
            raise
        raise RunFailed(
            f"`{shown(url)}` can't be copied: {why(error)}",
            help="what was copied before is kept: run it again when it can be reached",
        ) from error


def _of_library(error: Exception) -> bool:
    """Whether a library made the class, as those of stores do for what they meet outside: no keys,
    nobody there. One that the language has is a bug."""
    return type(error).__module__.partition(".")[0] not in _OURS


def why(error: BaseException) -> str:
    """One line on what failed."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server says {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return first_line(error)
