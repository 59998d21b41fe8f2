"""What the SDK can ask for that there is not here; each with a sentence, at once.

The status is 404: an SDK repeats what has one of 500 and above for minutes.
"""

from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.room import Room

BILLING = "nothing is billed here; the servers' metrics count tokens and steps (docs/operations.md)"
REFUSED = {
    "/billing/usage/events": BILLING,
    "/audit": "there is no audit log here; the servers' own logs say what was asked of them",
    "/auth/token": "there are no tokens here: a key is shown with each request",
    "/auth/apikey/me": "what a key is for is not told here: administrators have `tinsmith keys ls`",
    "/create_custom_loss": "custom losses are computed by the SDK here: give the function itself",
    "/external_weights_upload_start": "weights come in through the Checkpoint server alone",
    "/external_weights_upload_finish": "weights come in through the Checkpoint server alone",
}


def routes(room: Room) -> Sequence[BaseRoute]:
    """Routes of this module."""
    methods = ["GET", "POST", "PUT", "DELETE"]
    return [Route(path, _refusing(why), methods=methods) for path, why in REFUSED.items()]


def _refusing(why: str) -> Callable[[Request], Awaitable[Response]]:
    async def refused(request: Request) -> Response:
        raise Problem(404, why)

    return refused
