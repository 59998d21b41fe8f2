"""Puts the gateway together: the rooms' routes in one application, and a server for it."""

import asyncio
import contextlib
import errno
import logging
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router

from tinsmith.errors import TinsmithError
from tinsmithd import errors
from tinsmithd.config import GatewaySettings
from tinsmithd.gateway import openai, tinker
from tinsmithd.gateway.callers import Doorkeeper
from tinsmithd.gateway.cluster import Cluster
from tinsmithd.gateway.connections import bounded
from tinsmithd.gateway.direct import Direct
from tinsmithd.gateway.metrics import HttpMetrics
from tinsmithd.gateway.middleware import Watched
from tinsmithd.gateway.pages import Pages
from tinsmithd.gateway.problems import Problem, detail_response, problem_of
from tinsmithd.gateway.tls import Connections, with_tls
from tinsmithd.rpc.auth import ClusterKey
from tinsmithd.rpc.collectors import CertificateCollector, KeysCollector
from tinsmithd.rpc.ring import Ring, open_ring
from tinsmithd.rpc.scrapes import Scrapes
from tinsmithd.tenants import Tenants
from tinsmithd.tls import ServerContext, of_callers, of_cluster, watch
from tinsmithd.tracing.asked import start_spans

KEEP_ALIVE_S = 75
"""How long a connection may be idle; SDKs beat every 10 seconds."""
BACKLOG = 2048
INT32_MAX = 2**31 - 1
_log = logging.getLogger(__name__)


def build_app(
    cluster: Cluster,
    settings: GatewaySettings,
    metrics: HttpMetrics,
    stopping: asyncio.Event,
    ring: Ring | None = None,
) -> Starlette:
    """The whole application. A room adds itself by its `routes`.

    Args:
        cluster: What stands behind it.
        settings: Its limits.
        metrics: Where requests are counted.
        stopping: Set when the process is about to end: whoever waits is told to ask again.
        ring: By what callers are known; None: they need no keys.
    """
    routes: list[BaseRoute] = [
        Route("/healthz", _healthz),
        Route("/livez", _livez),
        *tinker.routes(cluster, settings, stopping, metrics),
        *openai.routes(cluster, settings),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: _http_exception,
            Problem: _problem,
            TinsmithError: _problem,
            errors.TinsmithError: _problem,
            TimeoutError: _problem,
            Exception: _fault,
        },
    )
    mounted = [cast(Router, route.app) for route in routes if isinstance(route, Mount)]
    for router in (app.router, *mounted):
        router.redirect_slashes = False  # a redirect would name whatever host the request named
    app.state.cluster = cluster
    app.add_middleware(Direct, routes=routes, refused=_refused)
    app.add_middleware(
        Watched,
        metrics=metrics,
        settings=settings,
        doorkeeper=Doorkeeper(ring),
        refused=_refused,
    )
    app.add_middleware(Pages, settings=settings, refused=_refused)
    return app


def _refused(problem: Problem, path: str) -> Response:
    if path.startswith(openai.PREFIXES):
        return openai.error_response(problem, path)
    return detail_response(problem)


async def _healthz(request: Request) -> Response:
    """Readiness: 200 while the Training server answers."""
    cluster: Cluster = request.app.state.cluster
    try:
        found = await cluster.capabilities()
    except (TinsmithError, TimeoutError) as error:
        return JSONResponse({"status": "unavailable", "detail": str(error)[:500]}, 503)
    loading = not found.base_models
    return JSONResponse({"status": "loading" if loading else "ok"}, 503 if loading else 200)


async def _livez(_: Request) -> Response:
    """Liveness: the process answers, whatever its cluster does."""
    return JSONResponse({"status": "ok"})


async def _http_exception(request: Request, error: Exception) -> Response:
    # Such as no such path, or another method: always with a body.
    assert isinstance(error, HTTPException)
    said = {404: "there is no such path here", 405: "this path does not take that method"}
    message = said.get(error.status_code, str(error.detail))
    response = _refused(Problem(error.status_code, message), request.scope["path"])
    response.headers.update(error.headers or {})
    return response


async def _problem(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    assert problem is not None
    return _refused(problem, request.scope["path"])


async def _fault(request: Request, error: Exception) -> Response:
    fault = secrets.token_hex(8)
    _log.error("fault %s", fault, exc_info=error)
    problem = Problem(500, f"a fault of the gateway; its log has {fault}", "INTERNAL")
    return _refused(problem, request.scope["path"])


class _Quiet(uvicorn.Server):
    """Signals are the gateway's own affair."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


class Gateway:
    """The gateway: construct, `await start()`, `await run()` or `await stop()`.

    Args:
        settings: Its settings.

    Raises:
        ConfigError: A certificate, or a file of keys, cannot be used.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        key = ClusterKey(settings.cluster_key_file, "gateway.cluster_key_file")
        self._ring = open_ring(settings)
        self._settings = settings
        self._stopping = asyncio.Event()
        named = settings.metrics_tenant_names
        self._metrics = HttpMetrics(Tenants(named, settings.metrics_tenants_max))
        self._shown, cluster = of_callers(settings), of_cluster(settings)
        self._certificates = [each for each in (self._shown, cluster) if each is not None]
        self._metrics.registry.register(CertificateCollector(self._certificates))
        if settings.keys_file:
            self._metrics.registry.register(KeysCollector(Path(settings.keys_file)))
        self._cluster = Cluster(settings.training_address, settings.request_s_max, cluster, key)
        self._serving: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._scrapes: Scrapes | None = None
        self.port = self.metrics_port = 0

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            ConfigError: No spans can be made.
            OSError: The address cannot be bound.
        """
        settings = self._settings
        start_spans(settings)
        listener = _bind(settings.listen_address, settings.stream_stall_s)
        self.port = listener.getsockname()[1]
        if settings.metrics_address:
            registry = self._metrics.registry
            self._scrapes = Scrapes(settings.metrics_address, registry, self._shown)
            self.metrics_port = self._scrapes.port
        app = build_app(self._cluster, settings, self._metrics, self._stopping, self._ring)
        connections: Connections = bounded(settings.body_stall_s, settings.peer_share_max)
        if self._shown is not None:
            self._shown.warn_of_names(settings.listen_address)
            shown = ServerContext(self._shown, protocols=("http/1.1",))
            connections = with_tls(connections, shown, settings.peer_share_max)
        self._watching = asyncio.create_task(watch(self._certificates))
        if self._ring is not None:
            self._ring.begin()
        self._server = _Quiet(_uvicorn_config(app, settings, connections))
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            await asyncio.sleep(0.005)
            if self._serving.done():
                await self._serving
        if settings.port_file:
            # Whoever waits for the file must not read half of it.
            part = Path(settings.port_file).with_suffix(".part")
            part.write_text(f"{self.port}\n")
            part.replace(settings.port_file)
        host = settings.listen_address.rpartition(":")[0]
        _log.info(
            "the gateway of %s listens on %s:%d%s",
            *(settings.training_address, host, self.port, " with TLS" if self._shown else ""),
        )
        if self.metrics_port:
            host = settings.metrics_address.rpartition(":")[0]
            scheme = "http" if self._shown is None else "https"
            _log.info("metrics are at %s://%s:%d/metrics", scheme, host, self.metrics_port)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked.set)
        assert self._serving is not None
        waiting = asyncio.create_task(asked.wait())
        await asyncio.wait([waiting, self._serving], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        await self.stop()

    async def stop(self) -> None:
        """Stop gracefully: no new requests, waiting ones are told to ask again."""
        self._stopping.set()
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        await self._cluster.close()
        if self._watching is not None:
            self._watching.cancel()
        if self._scrapes is not None:
            await asyncio.to_thread(self._scrapes.close)


def _uvicorn_config(
    app: Starlette, settings: GatewaySettings, connections: Connections
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.stop_grace_s)),
        http=cast(Any, connections),  # anything that makes them
        loop="asyncio",
    )


def _bind(address: str, stall_s: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY where the protocol is said; else each answer waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":
        # Whoever never reads what was sent would otherwise keep a connection for good. A stream
        # ends before that, and says why.
        timeout_ms = min(round(2 * 1000 * stall_s), INT32_MAX)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    try:
        listener.bind((host, int(port)))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        message = f"cannot listen on {address}: {error.strerror}"
        raise OSError(error.errno or errno.EADDRINUSE, message) from error
    listener.setblocking(False)
    return listener


__all__: Sequence[str] = ["Gateway", "build_app"]
