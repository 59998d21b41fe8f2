"""Builds and runs a gRPC server of this project: every server has the same outside.

Health (`grpc.health.v1`): the empty service name is SERVING while the process answers (liveness);
the service's own name is SERVING while a real call would succeed (readiness). Reflection and
channelz are on; metrics are at `metrics_address`, where that is set. With `tls_certificate_file`
all of that speaks TLS. SIGTERM and SIGINT: health
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
from tinsmithd.processes.event_loop import go_first
from tinsmithd.rpc.auth import KeyInterceptor
from tinsmithd.rpc.collectors import CertificateCollector, KeysCollector, ServingCollector
from tinsmithd.rpc.credentials import server_credentials
from tinsmithd.rpc.flow import RECEIVE_SLACK, Gate
from tinsmithd.rpc.interceptors import CallInterceptor
from tinsmithd.rpc.metrics import Metrics, MetricsInterceptor
from tinsmithd.rpc.reflection import add_reflection
from tinsmithd.rpc.ring import open_ring
from tinsmithd.tenants import Tenants
from tinsmithd.tls import Certificates, of_callers, watch
from tinsmithd.tracing.asked import start_spans

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


def bind(
    server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None
) -> int:
    """Let a server listen; returns the port.

    Args:
        server: Which.
        address: host:port.
        credentials: What it speaks TLS with; None is plain text.

    Raises:
        OSError: The address cannot be bound.
    """
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        message = f"cannot listen on {address}: is the port taken?"
        raise OSError(errno.EADDRINUSE, message) from error


class RpcServer:
    """One gRPC server with health, reflection and channelz, and with keys where it has some.

    Use: construct, `add` services on `grpc_server`, `await start()`, `set_serving(True)` when real
    calls would succeed, `await stop()`.

    Args:
        config: Its settings.
        service_name: The name that its health has.
        more_names: What else health has a name for.
        cluster: By what the cluster's other processes know this one, for its age in the metrics.

    Attributes:
        grpc_server: The server to register servicers on.
        first: What a call passes first: a look at its key, and its count, as far as there are any.
        ring: By what callers are known; None where they need no keys.
        metrics: The metrics to register collectors with.
        port: The port it listens on, after `start`.
        metrics_port: The port of its metrics, after `start`; 0 where they are not served.
        shutting_down: Set as soon as a stop began.

    Raises:
        ConfigError: The file of keys cannot be used.
    """

    def __init__(
        self,
        config: ServerConfig,
        service_name: str,
        more_names: Sequence[str] = (),
        cluster: Certificates | None = None,
    ) -> None:
        self._config = config
        self.service_name = service_name
        self._more_names = more_names
        self.port = self.metrics_port = 0
        named = config.metrics_tenant_names
        self.metrics = Metrics(Tenants(named, config.metrics_tenants_max))
        self._shown = of_callers(config)
        self._certificates = [each for each in (self._shown, cluster) if each is not None]
        self.metrics.registry.register(CertificateCollector(self._certificates))
        self.ring = open_ring(config)
        # Keys before all: the others keep the handler of a method for all callers.
        self.first: list[grpc.aio.ServerInterceptor] = []
        if self.ring is not None:
            keys = KeyInterceptor(self.ring)
            self.first.append(keys)
            refusals = keys.refusals.counts
            self.metrics.registry.register(KeysCollector(Path(config.keys_file), refusals))
        if config.metrics_address:
            self.first.append(MetricsInterceptor(self.metrics))
            self.metrics.expect(service_name)
        self.shutting_down = asyncio.Event()
        self._gate = Gate(config, self.ring)
        self._watching: list[asyncio.Task[None]] = []
        self.grpc_server = make_grpc_server(config, self._gate, self.first)
        self._said: dict[str, bool] = {}
        self.metrics.registry.register(ServingCollector(self._said))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        add_reflection(self.grpc_server, [service_name, health.SERVICE_NAME])
        channelz.add_channelz_servicer(self.grpc_server)

    @property
    def is_idle(self) -> bool:
        """Whether no call is under way, but for those that watch health."""
        return self._gate.is_idle

    async def start(self) -> None:
        """Bind and serve; the service itself is NOT_SERVING until `set_serving`.

        Raises:
            ConfigError: A certificate cannot be used, or no spans can be made.
            OSError: The address cannot be bound.
        """
        start_spans(self._config)
        await self._set("", True)
        for name in (self.service_name, *self._more_names):
            await self._set(name, False)
        credentials = None
        if self._shown is not None:
            asks = bool(self._config.tls_client_ca_file)
            credentials = server_credentials(self._shown, asks=asks)
            self._shown.warn_of_names(self._config.listen_address)
        self.port = bind(self.grpc_server, self._config.listen_address, credentials)
        if self._config.metrics_address:
            self.metrics_port = self.metrics.serve(self._config.metrics_address, self._shown)
        await asyncio.create_task(self._take_calls())
        if self.ring is not None:
            self.ring.begin()
        self._watching = [
            asyncio.create_task(self._gate.reads.run()),
            asyncio.create_task(watch(self._certificates)),
            asyncio.create_task(self._gate.watch_keys()),
        ]
        if self._config.port_file:
            write_whole(Path(self._config.port_file), f"{self.port}\n")
        host = self._config.listen_address.rpartition(":")[0]
        _log.info(
            "%s listens on %s:%d%s, for %d connections",
            *(self.service_name, host, self.port, " with TLS" if credentials else ""),
            connections_max(self._config),
        )
        if self.metrics_port:
            host = self._config.metrics_address.rpartition(":")[0]
            scheme = "http" if self._shown is None else "https"
            _log.info("metrics are at %s://%s:%d/metrics", scheme, host, self.metrics_port)

    async def _take_calls(self) -> None:
        # Calls begin first, and health's go on so; `CallInterceptor` has the others wait.
        go_first()
        await self.grpc_server.start()

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
        for task in self._watching:
            task.cancel()
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
