"""Connections to the gateway: bounded in number, in all and of one host, in the bytes of a head,
and in the time for it.

The HTTP server under the application waits for the head of a request for ever, and keeps as much of
it as comes. It writes the head of an answer by itself, and takes a request for another protocol
without its body; both are mended here.
"""

import asyncio
import resource
from collections import Counter
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tinsmithd.gateway.callers import caller_of

HEAD_BYTES_MAX = 256 * 1024
"""A head of more bytes closes its connection; they are read in pieces of so many."""
_HEAD_BEGINS = b"HTTP/1.1 "
OWN_FILES = 1024
"""Descriptors that stay free of connections, or a quarter of all, if that is less."""


def connections_max() -> int:
    """Connections that this process takes: what its descriptors allow."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return files - min(files // 4, OWN_FILES)


class JoinedWrites:
    """A transport by which the head of an answer goes out together with what follows it.

    Each write is a packet, and wakes the caller: of an answer in one piece there is one.

    Args:
        transport: The connection's own.
        loop: Its event loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send bytes; a head may wait for what else this turn of the loop writes."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(_HEAD_BEGINS):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        """Close it once all is sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head:
            data, self._head = self._head, b""
            self._transport.write(data)


class BoundedConnection(HttpToolsProtocol):
    """One connection; `bounded` makes its class.

    A request that asks for another protocol, such as HTTP/2 or a web socket, is answered as if it
    did not, which HTTP allows. The parser takes such a request for one without a body. So its body
    is read here, or what is in it would be taken for another request.
    """

    head_s_max = 0.0
    """A connection whose request's head is not complete by then is closed."""
    peer_share_max = 1.0
    """Share of all connections that one host may have."""
    hosts: ClassVar[Counter[str]] = Counter()
    """How many each host has."""
    _host = ""
    _head: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _body_left = 0
    """Bytes still to come of a body that the parser does not read."""

    def connection_made(self, transport: Any) -> None:
        """Take it, or close it where there are too many."""
        super().connection_made(JoinedWrites(transport, self.loop))  # type: ignore[arg-type]
        self._host = caller_of({"client": self.client})
        self.hosts[self._host] += 1
        most = connections_max()
        of_host = max(1, int(most * self.peer_share_max))
        if len(self.connections) > most or self.hosts[self._host] > of_host:
            transport.abort()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        """Bound what comes before a head is complete."""
        if self._head is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        if self._head is not None:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            while data:
                data = self._read_body(data) if self._body_left else self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._head is not None and self._head_bytes > HEAD_BYTES_MAX:
            self._give_up()

    def _parse(self, data: bytes) -> bytes:
        """Give bytes to the parser; what it left after a request for another protocol."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as asked:
            return data[asked.args[0] :]
        return b""

    def _read_body(self, data: bytes) -> bytes:
        """Take bytes of a body that the parser does not read; returns what follows it."""
        piece, rest = data[: self._body_left], data[self._body_left :]
        self._body_left -= len(piece)
        self.on_body(piece)
        if not self._body_left:
            super().on_message_complete()
        return rest

    def on_headers_complete(self) -> None:
        """The head is there.

        Raises:
            ValueError: Where its body ends cannot be known; the caller hears 400.
        """
        self._forget_head()
        if self.parser.should_upgrade():
            said = dict(self.headers)
            if b"transfer-encoding" in said:
                raise ValueError("a request for another protocol has a length, or no body")
            self._body_left = int(said.get(b"content-length", b"0"))
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is there, but for a body that the parser does not read."""
        if not self._body_left:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._forget_head()
        self.hosts[self._host] -= 1
        if not self.hosts[self._host]:
            del self.hosts[self._host]
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


def bounded(head_s_max: float, peer_share_max: float) -> type[BoundedConnection]:
    """The class of connections of one server.

    Args:
        head_s_max: How long one waits for a head, seconds.
        peer_share_max: Share of all of them that one host may have.
    """
    own = {"head_s_max": head_s_max, "peer_share_max": peer_share_max, "hosts": Counter()}
    return type("BoundedConnection", (BoundedConnection,), own)
