"""What every request passes first: a place, and its count."""

import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.metrics import HttpMetrics
from tinsmithd.gateway.problems import RETRY_S, Problem, detail_response

UNKNOWN_ROUTE = "none"
PROBES = ("/healthz", "/livez")
"""They are answered however busy the gateway is."""


class Watched:
    """Counts requests, and refuses those beyond `requests_max`.

    Args:
        app: What answers.
        metrics: Where they are counted.
        settings: The limits.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, settings: GatewaySettings) -> None:
        self._app = app
        self._metrics = metrics
        self._most = settings.requests_max
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun_s = time.perf_counter()
        status = 499  # nobody was there any more to take an answer

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        if self._under_way >= self._most and scope["path"] not in PROBES:
            busy = Problem(503, f"{self._most} requests are under way", retry_after_s=RETRY_S)
            await detail_response(busy)(scope, receive, sending)
        else:
            self._under_way += 1
            try:
                await self._app(scope, receive, sending)
            finally:
                self._under_way -= 1
        method = scope["method"] if scope["method"] in _METHODS else "other"
        seconds = time.perf_counter() - begun_s
        self._metrics.handled(method, _route_of(scope), status, seconds)


_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD")


def _route_of(scope: Any) -> str:
    """The pattern of the path, not the path: that has names that callers chose."""
    endpoint = scope.get("endpoint")
    return getattr(endpoint, "__qualname__", UNKNOWN_ROUTE) if endpoint else UNKNOWN_ROUTE
