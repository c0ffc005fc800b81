"""Serves a bundle to browsers on this machine, with the headers that let its threads share a memory.

Only the files that the bundle's manifest lists are served, by their exact names, and the manifest itself."""

from __future__ import annotations

import contextlib
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from tinygpt.ir.errors import UserError
from tinygpt.runtime.bundle import Bundle
from tinygpt.runtime.engine import available, host_files
from tinygpt.runtime.manifest import MANIFEST

ADDRESS = "127.0.0.1"
PAGE = "host/index.html"

# A page gets shared memory only if it is isolated from other origins; its workers must say so as well.
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
# Written out because a system's own table may lack or change them, and browsers insist on the first three.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".wasm": "application/wasm",
    ".json": "application/json",
}


class BundleServer(ThreadingHTTPServer):
    """An HTTP server of one bundle on 127.0.0.1. Port 0 takes any that is free.

    Raises UserError if the bundle does not run in browsers or the port is taken."""

    daemon_threads = True

    def __init__(self, bundle: Bundle, port: int = 0) -> None:
        if PAGE not in bundle.manifest.files:
            targets = [name for name in available() if PAGE in host_files(name)]
            raise UserError(
                f"bundle {bundle.folder}: has no {PAGE}, by which browsers run it "
                f"(its target is {bundle.manifest.target_name})",
                hint=f"compile it again, for a target that runs in browsers: {', '.join(targets)}",
            )
        self.bundle = bundle
        try:
            super().__init__((ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port}: {error}", hint="name another with --port; 0: any that is free") from error

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/{PAGE}"

    def content(self, name: str) -> bytes | None:
        """The bytes of a file of the bundle; None for any other name."""
        if name != MANIFEST and name not in self.bundle.manifest.files:
            return None
        return (self.bundle.folder / name).read_bytes()


class Handler(BaseHTTPRequestHandler):
    """Answers one request for a file of the server's bundle."""

    server: BundleServer
    server_version = "tinygpt"

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).removeprefix("/")
        if not name:
            self.answer(HTTPStatus.FOUND, b"", "text/plain", {"Location": f"/{PAGE}"})
            return
        try:
            content = self.server.content(name)
        except OSError:  # removed since it was loaded
            content = None
        if content is None:
            self.answer(HTTPStatus.NOT_FOUND, b"not a file of this bundle\n", "text/plain")
            return
        self.answer(HTTPStatus.OK, content, TYPES.get(PurePosixPath(name).suffix, "application/octet-stream"))

    do_HEAD = do_GET

    def answer(self, status: HTTPStatus, content: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        """Send a whole response; a HEAD request gets its headers only."""
        self.send_response(status)
        about = {"Content-Type": kind, "Content-Length": str(len(content))}
        for key, value in {**HEADERS, **about, **(more or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # the page may be closed by now
                self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Requests are not worth a line each."""
