"""A short way to what is asked for most: paths that are known whole are looked up, not searched.

A step of the SDK is four requests, and each would be held against every route before its own.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tinsmithd.gateway.problems import Problem, problem_of

Endpoint = Callable[[Request], Awaitable[Response]]


class Direct:
    """Answers requests to paths without parameters; all others go on.

    Args:
        app: Where they go.
        routes: All routes.
        refused: Writes a refusal in the form of the API that a path is of.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Sequence[BaseRoute],
        refused: Callable[[Problem, str], Response],
    ) -> None:
        self._app = app
        self._refused = refused
        self._endpoints: dict[tuple[str, str], Endpoint] = {}
        for path, route in _whole(routes):
            for method in (route.methods or set()) - {"HEAD"}:
                self._endpoints.setdefault((method, path), route.endpoint)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        endpoint = None
        if scope["type"] == "http":
            endpoint = self._endpoints.get((scope["method"], scope["path"]))
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        scope["endpoint"], scope["path_params"] = endpoint, {}
        try:
            response = await endpoint(Request(scope, receive, send))
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                raise
            response = self._refused(problem, scope["path"])
        await response(scope, receive, send)


def _whole(routes: Sequence[BaseRoute], prefix: str = "") -> Iterator[tuple[str, Route]]:
    """Paths without parameters, with their routes."""
    for route in routes:
        if isinstance(route, Mount):
            yield from _whole(route.routes, prefix + route.path)
        elif isinstance(route, Route) and not route.param_convertors:
            yield prefix + route.path, route
