"""TLS in front of the gateway's connections."""

import asyncio
import asyncio.sslproto
from collections import Counter
from collections.abc import Callable
from typing import Any

from tinsmithd.gateway.callers import caller_of
from tinsmithd.gateway.connections import connections_max
from tinsmithd.tls import ServerContext

HANDSHAKE_S_MAX = 10
"""A connection whose handshake is not complete by then is closed."""
GOODBYE_S_MAX = 1
"""How long a peer has to answer that it knows of the end."""

Connections = Callable[..., asyncio.BaseProtocol]


class _Handshakes(asyncio.sslproto.SSLProtocol):
    """One connection that speaks TLS; what is in it goes to a connection of the HTTP server.

    The event loop would put the same class in between, but with a minute for each handshake, with
    any number of them, and with a quarter of a megabyte for each.
    """

    max_size = 32 * 1024
    """Bytes of each one's buffer, which is there from its first moment; asyncio's own is eight
    times as large."""

    def __init__(self, hosts: Counter[str], peer_share_max: float, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._hosts = hosts
        self._peer_share_max = peer_share_max
        self._host: str | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin the handshake, or close it where there are too many, in all or of its host."""
        super().connection_made(transport)
        self._host = caller_of({"client": transport.get_extra_info("peername")})
        self._hosts[self._host] += 1
        most = connections_max()
        of_host = max(1, int(most * self._peer_share_max))
        if self._hosts.total() > most or self._hosts[self._host] > of_host:
            transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is gone."""
        if self._host is not None:
            self._hosts[self._host] -= 1
            if not self._hosts[self._host]:
                del self._hosts[self._host]
            self._host = None
        super().connection_lost(exc)


def with_tls(connections: Connections, shown: ServerContext, peer_share_max: float) -> Connections:
    """What makes connections that speak TLS, of what makes them without.

    Args:
        connections: Makes a connection of the HTTP server.
        shown: What callers see.
        peer_share_max: Share of all of them that one host may have, handshakes included.
    """
    hosts: Counter[str] = Counter()

    def connect(**arguments: Any) -> asyncio.BaseProtocol:
        return _Handshakes(
            hosts,
            peer_share_max,
            asyncio.get_running_loop(),
            connections(**arguments),
            shown.context,
            None,  # nobody waits for it
            server_side=True,
            ssl_handshake_timeout=HANDSHAKE_S_MAX,
            ssl_shutdown_timeout=GOODBYE_S_MAX,
        )

    return connect
