"""A proxy of HTTP in front of a real object store, which does to requests what networks and stores
do: loses a header, holds a request up, answers by itself."""

import contextlib
import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_HOP = ("connection", "transfer-encoding", "content-length", "expect")


class StoreProxy:
    """Forwards requests, each on a connection of its own; a context manager.

    Args:
        endpoint: The store's, `http://host:port`.

    Attributes:
        endpoint: Where it listens.
        lost: Headers, in lower case, that it does not pass on.
        holds: Says of a request, by its method and path, what it waits for before it is passed on;
            whoever made it may be gone by then.
        says: Says of a request likewise what is answered in place of the store: a status and a
            code of S3's; None passes it on.
        passed: Released for each request that was held and passed on.
    """

    def __init__(self, endpoint: str) -> None:
        self._target = endpoint.removeprefix("http://")
        self.lost: set[str] = set()
        self.holds: Callable[[str, str], threading.Event | None] = lambda method, path: None
        self.says: Callable[[str, str], tuple[int, str] | None] = lambda method, path: None
        self.passed = threading.Semaphore(0)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "StoreProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _forward(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        if (said := self.says(method, path)) is not None:
            status, code = said
            error = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
            return status, [("content-type", "application/xml")], error.encode()
        held = self.holds(method, path)
        if held is not None:
            held.wait()
        lost = {*self.lost, *_HOP}
        kept = {name: value for name, value in headers if name.lower() not in lost}
        with contextlib.closing(http.client.HTTPConnection(self._target, timeout=60)) as there:
            there.request(method, path, body, kept)
            answer = there.getresponse()
            found = answer.status, answer.getheaders(), answer.read()
        if held is not None:
            self.passed.release()
        return found

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _do(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                status, headers, answer = proxy._forward(
                    self.command, self.path, self.headers.items(), body
                )
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in _HOP:
                        self.send_header(name, value)
                length = next((v for n, v in headers if n.lower() == "content-length"), "0")
                self.send_header("Content-Length", str(len(answer)) if answer else length)
                self.end_headers()
                if self.command != "HEAD":  # else the next answer on this connection begins with it
                    self.wfile.write(answer)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _do

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def handle(self) -> None:
                with contextlib.suppress(OSError):  # whoever asked is gone
                    super().handle()

        return Handler
