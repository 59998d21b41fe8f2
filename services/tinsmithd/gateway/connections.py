"""Connections to the gateway: bounded in number, in the bytes of a head, and in the time for it.

The HTTP server under the application waits for the head of a request for ever, and keeps as much of
it as comes.
"""

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES_MAX = 256 * 1024
"""A head of more bytes closes its connection; they are read in pieces of so many."""
OWN_FILES = 1024
"""Descriptors that stay free of connections, or a quarter of all, if that is less."""


def connections_max() -> int:
    """Connections that this process takes: what its descriptors allow."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return files - min(files // 4, OWN_FILES)


class BoundedConnection(HttpToolsProtocol):
    """One connection; `bounded` makes its class."""

    head_s_max = 0.0
    """A connection whose request's head is not complete by then is closed."""
    _head: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Take it, or close it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > connections_max():
            transport.abort()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        """Bound what comes before a head is complete."""
        if self._head is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        if self._head is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head is not None and self._head_bytes > HEAD_BYTES_MAX:
            self._give_up()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._forget_head()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._forget_head()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head = self.loop.call_later(self.head_s_max, self._give_up)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _give_up(self) -> None:
        self._forget_head()
        self.transport.abort()


def bounded(head_s_max: float) -> type[BoundedConnection]:
    """The class of connections that wait so long for a head, seconds."""
    return type("BoundedConnection", (BoundedConnection,), {"head_s_max": head_s_max})
