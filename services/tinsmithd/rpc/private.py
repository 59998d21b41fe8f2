"""A listener for the parts of a cluster alone: a stream without the secret is not even read.

It has its own port and its own cap of calls, so that neither a stranger's calls nor the cluster's
own take room from each other. There is no health, reflection or channelz: it answers nobody who
does not show the secret.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from tinsmithd.config import ServerConfig
from tinsmithd.rpc import link_secret
from tinsmithd.rpc.flow import Gate
from tinsmithd.rpc.server import bind, make_grpc_server, write_whole

REFUSALS_INTERVAL_S = 10.0
"""A caller that tries again and again fills no log."""

_log = logging.getLogger(__name__)


class SecretInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # untyped base
    """Ends every call that does not show the secret, whatever it asks for: UNAUTHENTICATED.

    Args:
        secret: See `tinsmithd.rpc.link_secret`.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._refused_count = 0
        self._said_s: float | None = None

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Pass the call on, or have it refused before anything of it is read."""
        if link_secret.is_shown(details.invocation_metadata or (), self._secret):
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(self._refuse)

    async def _refuse(self, _: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        self._say_refused(context.peer())
        key = link_secret.RANKS_KEY
        message = f"this port is for the ranks of the cluster: show the secret of {key}"
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)
        yield b""

    def _say_refused(self, peer: str) -> None:
        self._refused_count += 1
        now_s = asyncio.get_running_loop().time()
        if self._said_s is not None and now_s - self._said_s < REFUSALS_INTERVAL_S:
            return
        _log.error(
            "refused %d stream(s), the last from %s: wrong secret, or none (%s)",
            *(self._refused_count, peer, link_secret.RANKS_KEY),
        )
        self._said_s, self._refused_count = now_s, 0


class PrivateServer:
    """One gRPC server behind a secret: register servicers on `grpc_server`, then `start`.

    Args:
        config: Its limits.
        secret: What calls must show.

    Attributes:
        grpc_server: The server to register servicers on.
        port: The port it listens on, after `start`.
    """

    def __init__(self, config: ServerConfig, secret: str) -> None:
        self.grpc_server = make_grpc_server(config, Gate(config), [SecretInterceptor(secret)])
        self.port = 0

    async def start(self, address: str, port_file: str = "") -> None:
        """Bind and serve.

        Args:
            address: host:port.
            port_file: File to write the port into; empty writes none.

        Raises:
            OSError: The address cannot be bound.
        """
        self.port = bind(self.grpc_server, address)
        await self.grpc_server.start()
        if port_file:
            write_whole(Path(port_file), f"{self.port}\n")
        _log.info("ranks attach at %s:%d", address.rpartition(":")[0], self.port)

    async def stop(self) -> None:
        """End all streams and stop."""
        await self.grpc_server.stop(0)
