"""What every request passes first: an id, a look at its key, a place, its count and its span.

One host, or where there are keys one tenant, has a share of the places.
"""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinsmithd import keys, tracing
from tinsmithd.config import GatewaySettings
from tinsmithd.errors import ResourceExhausted
from tinsmithd.gateway.callers import Doorkeeper, caller_of, set_peer
from tinsmithd.gateway.metrics import HttpMetrics
from tinsmithd.gateway.problems import Problem, problem_of
from tinsmithd.rpc.budget import Budget

UNKNOWN_ROUTE = "none"
PROBES = ("/healthz", "/livez")
"""They are answered however busy the gateway is."""
REQUEST_ID = b"x-request-id"
"""A header of each answer; the gateway's log has the same id."""
_SAID = (REQUEST_ID, tracing.TRACEPARENT.encode())
_log = logging.getLogger("tinsmithd.calls")


class Watched:
    """Counts requests, and refuses those without a good key, and those beyond `requests_max` or the
    caller's share of it.

    Args:
        app: What answers.
        metrics: Where they are counted.
        settings: The limits.
        doorkeeper: Looks at keys.
        refused: Writes a refusal in the form of the API that a path is of.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: HttpMetrics,
        settings: GatewaySettings,
        doorkeeper: Doorkeeper,
        refused: Callable[[Problem, str], Response],
    ) -> None:
        self._doorkeeper = doorkeeper
        self._refused = refused
        self._app = app
        self._metrics = metrics
        self._places = Budget("requests_max", settings.requests_max, settings.peer_share_max)
        metrics.running = lambda: (self._places.taken, self._places.most)
        self._logs = settings.log_calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun_s = time.perf_counter()
        passed = _Passed()
        method = scope["method"] if scope["method"] in _METHODS else "other"
        call = tracing.claimed(method, _said(scope))
        tracing.begin(call)  # for good: what goes wrong above this is logged with it, too
        request_id = (REQUEST_ID, call.request_id.encode())

        async def receiving() -> Message:
            message = await receive()
            passed.received_bytes += len(message.get("body", b""))
            return message

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                passed.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), request_id]}
            else:
                passed.sent_bytes += len(message.get("body", b""))
            await send(message)

        with tracing.served(method, {}) as span:
            problem = await self._doorkeeper.enter(scope)
            call.tenant = keys.current().owner
            if problem is not None:
                await self._refused(problem, scope["path"])(scope, receive, sending)
            else:
                await self._placed(scope, receiving, sending)
            route = _route_of(scope)
            call.method = f"{method} {route}"
            if span is not None:
                _say(span, call, passed.status, method, route)
        seconds = time.perf_counter() - begun_s
        tenant = "" if problem is not None else keys.current().account
        self._metrics.handled(method, route, passed.status, seconds, tenant)
        if self._logs:
            fields = {
                "code": passed.status,
                "seconds": round(seconds, 6),
                "received_bytes": passed.received_bytes,
                "sent_bytes": passed.sent_bytes,
                "tenant": call.tenant,
            }
            _log.info("%s ended", call.method, extra={"fields": fields})

    async def _placed(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = caller_of(scope)
        set_peer(caller)
        with self._places.lease(caller) as place:
            try:
                if scope["path"] not in PROBES:
                    place.take(1)
            except ResourceExhausted as error:
                # 429: an SDK asks for a result again at once after 503.
                busy = problem_of(error)
                assert busy is not None
                await self._refused(busy, scope["path"])(scope, receive, send)
            else:
                await self._app(scope, receive, send)


class _Passed:
    """What passed of one request, so far."""

    status = 499  # nobody was there any more to take an answer
    received_bytes = sent_bytes = 0


def _said(scope: Scope) -> Iterator[tuple[str, str]]:
    """What a caller says of the request itself."""
    for name, value in scope["headers"]:
        if name in _SAID:
            yield name.decode("latin-1"), value.decode("latin-1")


def _say(
    span: tracing.Span, call: tracing.ServedCall, status: int, method: str, route: str
) -> None:
    if status >= 499:
        call.failure = str(status)
    span.rename(call.method)
    about = {
        "http.request.method": method,
        "tinsmith.endpoint": route,
        "tinsmith.tenant": call.tenant,
    }
    span.say({**about, "http.response.status_code": status})


_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD")


def _route_of(scope: Any) -> str:
    """The pattern of the path, not the path: that has names that callers chose."""
    endpoint = scope.get("endpoint")
    return getattr(endpoint, "__qualname__", UNKNOWN_ROUTE) if endpoint else UNKNOWN_ROUTE
