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
    "/billing/usage/checkpoints/current": BILLING,
    "/audit": "there is no audit log here; the servers' own logs say what was asked of them",
    "/sessions/{session_id}/trace_export": "sessions are not traced here",
    "/sessions/{session_id}/project": "there are no projects here: all sessions are in one",
    "/auth/token": "there are no identities here: every key is taken",
    "/auth/apikey/me": "keys are not told apart here: every key is taken",
    "/create_custom_loss": "custom losses are computed by the SDK here: give the function itself",
    "/join_sampling_session": "clients number themselves here: leave the flag for it off",
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
