"""Builds and runs a gRPC server of this project: every server has the same outside.

Health (`grpc.health.v1`): the empty service name is SERVING while the process answers (liveness);
the service's own name is SERVING while a real call would succeed (readiness). Reflection and
channelz are on; metrics are at `metrics_address`, where that is set. SIGTERM and SIGINT: health
says NOT_SERVING, no new calls, calls under way get `stop_grace_s`, then the process ends.
"""

import asyncio
import errno
import logging
import math
import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tinsmithd.config import ServerConfig
from tinsmithd.rpc.flow import RECEIVE_SLACK, Gate
from tinsmithd.rpc.interceptors import CallInterceptor
from tinsmithd.rpc.metrics import Metrics, MetricsInterceptor, ServingCollector
from tinsmithd.rpc.reflection import add_reflection

INT32_MAX = 2**31 - 1
OWN_FILES_MAX = 1024
"""Number of descriptors that stay free of connections: a server opens files, too."""
READ_AHEAD_BYTES = 4 * 1024 * 1024
"""Bytes of a stream that gRPC's core takes in before they are read. Left to itself it measures
round trips and takes up to 16 MiB for each stream, the more the busier this process is: half calls
beside a budget of 64 MiB took 220 MiB on a loaded machine, and 120 with this."""

_log = logging.getLogger(__name__)


def make_grpc_server(
    config: ServerConfig, gate: Gate, first: Sequence[grpc.aio.ServerInterceptor]
) -> grpc.aio.Server:
    """A gRPC server without services; every listener of this project is made here.

    Args:
        config: Its limits.
        gate: What its calls share.
        first: What a call passes before errors become statuses.
    """
    return grpc.aio.server(
        interceptors=[*first, CallInterceptor(gate, config)],
        options=[
            ("grpc.max_concurrent_streams", config.concurrent_calls_max),
            # Beyond these gRPC ends calls that came together without saying why, some above the
            # first number and all above the second; the gate says it.
            ("grpc.server.max_pending_requests", max(1000, config.concurrent_calls_max)),
            ("grpc.server.max_pending_requests_hard_limit", 3 * config.concurrent_calls_max),
            ("grpc.max_allowed_incoming_connections", connections_max(config)),
            ("grpc.server_handshake_timeout_ms", _ms(config.handshake_s_max)),
            ("grpc.max_connection_idle_ms", _ms(config.connection_idle_s_max)),
            ("grpc.max_receive_message_length", RECEIVE_SLACK * config.message_bytes_max),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", READ_AHEAD_BYTES),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )


def bind(server: grpc.aio.Server, address: str) -> int:
    """Let a server listen; returns the port.

    Raises:
        OSError: The address cannot be bound.
    """
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        message = f"cannot listen on {address}: is the port taken?"
        raise OSError(errno.EADDRINUSE, message) from error


class RpcServer:
    """One gRPC server with health, reflection and channelz.

    Use: construct, `add` services on `grpc_server`, `await start()`, `set_serving(True)` when real
    calls would succeed, `await stop()`.

    Attributes:
        grpc_server: The server to register servicers on.
        metrics: The metrics to register collectors with.
        port: The port it listens on, after `start`.
        metrics_port: The port of its metrics, after `start`; 0 where they are not served.
        shutting_down: Set as soon as a stop began.
    """

    def __init__(
        self, config: ServerConfig, service_name: str, more_names: Sequence[str] = ()
    ) -> None:
        self._config = config
        self.service_name = service_name
        self._more_names = more_names
        self.port = self.metrics_port = 0
        self.metrics = Metrics()
        counting = [MetricsInterceptor(self.metrics)] if config.metrics_address else []
        self.shutting_down = asyncio.Event()
        self._gate = Gate(config)
        self._watching: asyncio.Task[None] | None = None
        self.grpc_server = make_grpc_server(config, self._gate, counting)
        self._said: dict[str, bool] = {}
        self.metrics.registry.register(ServingCollector(self._said))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        add_reflection(self.grpc_server, [service_name, health.SERVICE_NAME])
        channelz.add_channelz_servicer(self.grpc_server)

    async def start(self) -> None:
        """Bind and serve; the service itself is NOT_SERVING until `set_serving`.

        Raises:
            OSError: The address cannot be bound.
        """
        await self._set("", True)
        for name in (self.service_name, *self._more_names):
            await self._set(name, False)
        self.port = bind(self.grpc_server, self._config.listen_address)
        if self._config.metrics_address:
            self.metrics_port = self.metrics.serve(self._config.metrics_address)
        await self.grpc_server.start()
        self._watching = asyncio.create_task(self._gate.reads.run())
        if self._config.port_file:
            write_whole(Path(self._config.port_file), f"{self.port}\n")
        host = self._config.listen_address.rpartition(":")[0]
        _log.info(
            "%s listens on %s:%d, for %d connections",
            *(self.service_name, host, self.port, connections_max(self._config)),
        )
        if self.metrics_port:
            host = self._config.metrics_address.rpartition(":")[0]
            _log.info("metrics are at http://%s:%d/metrics", host, self.metrics_port)

    async def set_serving(self, serving: bool, name: str = "") -> None:
        """Say whether a real call would succeed now; with a name, what else that health has."""
        if not self.shutting_down.is_set():
            await self._set(name or self.service_name, serving)

    async def _set(self, name: str, serving: bool) -> None:
        if self._said.get(name) == serving:
            return
        self._said[name] = serving
        states = health_pb2.HealthCheckResponse
        await self._health.set(name, states.SERVING if serving else states.NOT_SERVING)

    async def stop(self) -> None:
        """Stop gracefully; returns when all calls ended."""
        if self.shutting_down.is_set():
            return
        self.shutting_down.set()
        await self._health.enter_graceful_shutdown()
        await self.grpc_server.stop(self._config.stop_grace_s)
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.to_thread(self.metrics.close)

    async def until_signal(self) -> None:
        """Return when SIGTERM or SIGINT asks to stop."""
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked.set)
        await asked.wait()
        grace_s = self._config.stop_grace_s
        _log.info("%s stops: calls under way have %g s", self.service_name, grace_s)


def connections_max(config: ServerConfig) -> int:
    """Connections that a server takes: what its descriptors allow, if nothing else is said."""
    if config.connections_max:
        return config.connections_max
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return INT32_MAX
    return min(files - min(files // 4, OWN_FILES_MAX), INT32_MAX)


def _ms(seconds: float) -> int:
    return min(math.ceil(seconds * 1000), INT32_MAX)


def write_whole(file: Path, text: str) -> None:
    """Write a file that somebody may be waiting for."""
    # Whoever waits for the file must not read half of it.
    part = file.with_suffix(".part")
    part.write_text(text)
    os.replace(part, file)
