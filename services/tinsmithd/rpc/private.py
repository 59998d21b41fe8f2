"""A listener for the parts of a cluster alone: who shows nothing is refused, and not even read.

It has its own port and its own cap of calls, so that neither a stranger's calls nor the cluster's
own take room from each other. There is no health, reflection or channelz: it answers nobody who
does not show a secret, or a certificate.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from tinsmithd.config import ServerConfig
from tinsmithd.rpc import link_secret
from tinsmithd.rpc.credentials import server_credentials
from tinsmithd.rpc.flow import Gate
from tinsmithd.rpc.interceptors import WrappingInterceptor, rebuilt
from tinsmithd.rpc.ring import Ring
from tinsmithd.rpc.server import bind, make_grpc_server, write_whole
from tinsmithd.tls import Certificates

REFUSALS_INTERVAL_S = 10.0
"""A caller that tries again and again fills no log."""
_NAMES = "x509_subject_alternative_name"
"""What gRPC calls the names of a certificate that it has verified."""

_log = logging.getLogger(__name__)


class _Refusals:
    """Says in the log, now and then, that calls were refused.

    Args:
        why: What is said of them.
    """

    def __init__(self, why: str) -> None:
        self._why = why
        self._count = 0
        self._said_s: float | None = None

    def add(self, peer: str) -> None:
        """One more; the peer is who it was."""
        self._count += 1
        now_s = asyncio.get_running_loop().time()
        if self._said_s is not None and now_s - self._said_s < REFUSALS_INTERVAL_S:
            return
        _log.error("refused %d call(s), the last from %s: %s", self._count, peer, self._why)
        self._said_s, self._count = now_s, 0


class SecretInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # untyped base
    """Ends every call that does not show the secret, whatever it asks for: UNAUTHENTICATED.

    Args:
        secret: See `tinsmithd.rpc.link_secret`.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._refusals = _Refusals(f"wrong secret, or none ({link_secret.RANKS_KEY})")

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Pass the call on, or have it refused before anything of it is read."""
        if link_secret.is_shown(details.invocation_metadata or (), self._secret):
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(self._refuse)

    async def _refuse(self, _: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        self._refusals.add(context.peer())
        key = link_secret.RANKS_KEY
        message = f"this port is for the ranks of the cluster: show the secret of {key}"
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)
        yield b""


class NamesInterceptor(WrappingInterceptor):
    """Ends every call of somebody whose certificate has none of some names: PERMISSION_DENIED.

    Args:
        names: Those names; none at all lets everybody through whose certificate is vouched for.
        setting: Which setting has them.
    """

    def __init__(self, names: Sequence[str], setting: str) -> None:
        super().__init__()
        self._names = {name.encode() for name in names}
        self._message = f"the certificate that was shown has none of the names of {setting}"
        self._refusals = _Refusals(self._message)

    def wrap(self, handler: Any, method: str) -> Any:
        """See `WrappingInterceptor`."""
        if not self._names:
            return handler
        behavior = handler.stream_stream or handler.stream_unary

        async def known(requests: Any, context: grpc.aio.ServicerContext) -> Any:
            if self._names.isdisjoint(context.auth_context().get(_NAMES, ())):
                self._refusals.add(context.peer())
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, self._message)
            return await behavior(requests, context)

        return rebuilt(handler, known)


class PrivateServer:
    """One gRPC server for a cluster's own: register servicers on `grpc_server`, then `start`.

    Args:
        config: Its limits.
        first: What calls pass first: who lets in whom.
        certificates: What it shows; callers must show one that its authorities vouch for. None is
            plain text.
        ring: The keys of callers, where they need some.
        ends_stalls: Whether calls end that stand still, as `stream_stall_s` has it.

    Attributes:
        grpc_server: The server to register servicers on.
        port: The port it listens on, after `start`.
    """

    def __init__(
        self,
        config: ServerConfig,
        first: Sequence[grpc.aio.ServerInterceptor],
        certificates: Certificates | None = None,
        *,
        ring: Ring | None = None,
        ends_stalls: bool = False,
    ) -> None:
        self._gate = Gate(config, ring)
        self._ends_stalls = ends_stalls
        self._watching: list[asyncio.Task[None]] = []
        self._certificates = certificates
        self.grpc_server = make_grpc_server(config, self._gate, first)
        self.port = 0

    async def start(self, address: str, whose: str, port_file: str = "") -> None:
        """Bind and serve.

        Args:
            address: host:port.
            whose: Who calls there, for the log.
            port_file: File to write the port into; empty writes none.

        Raises:
            OSError: The address cannot be bound.
        """
        credentials = None
        if self._certificates is not None:
            credentials = server_credentials(self._certificates, asks=True)
            self._certificates.warn_of_names(address)
        self.port = bind(self.grpc_server, address, credentials)
        await self.grpc_server.start()
        if self._ends_stalls:
            self._watching.append(asyncio.create_task(self._gate.reads.run()))
        self._watching.append(asyncio.create_task(self._gate.watch_keys()))
        if port_file:
            write_whole(Path(port_file), f"{self.port}\n")
        how = "with TLS" if credentials else "in plain text"
        _log.info("%s at %s:%d, %s", whose, address.rpartition(":")[0], self.port, how)

    async def stop(self, grace_s: float = 0) -> None:
        """Stop; calls under way get the grace, seconds, and are ended then."""
        await self.grpc_server.stop(grace_s)
        for task in self._watching:
            task.cancel()
