"""A web server of a few pages that gives parts of them, and a hub with one data set."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

COMMIT = "c0ffee" * 6 + "beef"


class Site:
    """`pages` by path. `asked` are (method, path, bytes given) of all requests."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes | int] = {}
        self.asked: list[tuple[str, str, int]] = []
        self.parts = True  # whether it gives parts of pages
        self.states = True  # whether it says in which state a page is
        self.fail: dict[str, int] = {}  # so many requests of a path are answered by 503
        self.hub: dict[str, bytes] = {}  # the data set's files
        self.commit = COMMIT  # what its main branch stands for
        self.url = ""

    def given(self, path: str) -> int:
        """Bytes that were sent of a page."""
        return sum(count for _, asked, count in self.asked if asked.endswith(path))

    def page(self, path: str) -> bytes | int:
        """What stands there, be it of the hub."""
        if found := re.fullmatch(r"/datasets/[\w-]+/[\w-]+/resolve/([^/]+)/(.*)", path):
            return self.hub.get(found[2], 404) if found[1] in (COMMIT, self.commit) else 404
        if re.match(r"/api/datasets/[\w-]+/[\w-]+/tree/", path):
            below = unquote(path.partition("/tree/")[2]).partition("/")[2]
            return json.dumps(self._tree(below)).encode()
        if re.match(r"/api/datasets/", path):
            files = [
                {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
                for name, data in self.hub.items()
            ]
            return json.dumps({"id": "a/b", "sha": self.commit, "siblings": files}).encode()
        return self.pages.get(path, 404)

    def _tree(self, below: str) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name, data in self.hub.items():
            if below and not name.startswith(below + "/"):
                continue
            first = name[len(below) :].strip("/").partition("/")
            path = f"{below}/{first[0]}".strip("/")
            oid = hashlib.sha1(path.encode()).hexdigest()
            kind = "directory" if first[1] else "file"
            size = 0 if first[1] else len(data)
            found[path] = {"type": kind, "oid": oid, "size": size, "path": path}
        return list(found.values())


@contextmanager
def served() -> Iterator[Site]:
    """A site that answers while the block runs."""
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            page: bytes | int = site.page(path)
            if site.fail.get(path, 0) > 0:
                site.fail[path] -= 1
                page = 503
            if isinstance(page, int):
                site.asked.append((self.command, path, 0))
                self.send_error(page)
                return
            status, part = 200, page
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted and site.parts:
                status, part = 206, page[int(wanted[1]) : int(wanted[2]) + 1]
            site.asked.append((self.command, path, len(part) if body else 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(part)))
            if path.startswith("/api"):
                self.send_header("Content-Type", "application/json")
            if site.states:
                self.send_header("ETag", f'"{hashlib.sha256(page).hexdigest()}"')
            self.end_headers()
            if body:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
