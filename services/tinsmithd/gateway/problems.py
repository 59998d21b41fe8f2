"""What went wrong, as HTTP says it.

Statuses are chosen for what the callers do with them. A Tinker SDK sends a request again after 408,
409, 429 and all from 500 on, for minutes: so what cannot succeed later has none of these, and what
can has one of them and says when. It takes a 400 without a body for a broken connection.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from starlette.responses import JSONResponse, Response

from tinsmith.errors import TinsmithError, from_rpc_error
from tinsmithd import errors
from tinsmithd.reasons import RULES

RETRY_S = 1.0
"""When to come again where nobody has said it, seconds."""
_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "ALREADY_EXISTS": 400,
    "ABORTED": 400,
    "UNIMPLEMENTED": 400,
    "DATA_LOSS": 422,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 400,
    "UNAVAILABLE": 503,
    "CANCELLED": 503,
    "DEADLINE_EXCEEDED": 503,
}
_SERVERS = ("DATA_LOSS", "INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")


@dataclass
class Problem(Exception):
    """A request that is refused; the rooms of the SDK and of OpenAI each write it their way.

    Attributes:
        status: HTTP status.
        message: For a person.
        reason: As `ErrorReason` without its prefix; empty where the gateway itself refuses.
        field: The field of the request that is to blame; may be empty.
        retry_after_s: Seconds after which the same request can succeed; None where it cannot.
        is_servers: Whether the service is to blame, and not the request.
        metadata: What else the reason comes with.
    """

    status: int
    message: str
    reason: str = ""
    field: str = ""
    retry_after_s: float | None = None
    is_servers: bool = False
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def problem_of(error: Exception) -> Problem | None:
    """An error as what HTTP says of it; None where nobody foresaw it."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, grpc.RpcError):
        error = from_rpc_error(error)
    if isinstance(error, TimeoutError):
        return Problem(503, "the cluster did not answer in time", "", "", RETRY_S, True)
    if isinstance(error, errors.TinsmithError):  # what a part that servers share has found
        name = RULES[error.reason].status
    elif isinstance(error, TinsmithError):
        name = error.code.name if error.code is not None else _kind_of(error)
    else:
        return None
    status = _STATUSES.get(name, 500)
    if error.retry_after_s is not None:
        status = 429 if name == "RESOURCE_EXHAUSTED" else 503
    retry_after_s = error.retry_after_s
    if status == 503 and retry_after_s is None:
        retry_after_s = RETRY_S
    return Problem(
        status,
        error.message,
        error.reason,
        error.field,
        retry_after_s,
        name in _SERVERS,
        error.metadata,
    )


def _kind_of(error: TinsmithError) -> str:
    # What the client part of the connection found by itself has no code.
    status = getattr(error, "status_code", 503)
    return {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 501: "UNIMPLEMENTED"}.get(
        status, "UNAVAILABLE"
    )


def headers_of(problem: Problem) -> dict[str, str]:
    """Headers that go with a problem, in whatever form its body has."""
    if problem.status == 401:
        return {"www-authenticate": "Bearer"}
    if problem.retry_after_s is None:
        return {"x-should-retry": "false"} if problem.status >= 500 else {}
    return {
        "retry-after-ms": str(max(1, round(problem.retry_after_s * 1000))),
        "retry-after": str(max(1, round(problem.retry_after_s))),
    }


def detail_response(problem: Problem) -> Response:
    """A problem in the form that the SDK shows: `{"detail": ...}`."""
    body: dict[str, Any] = {"detail": problem.message}
    if problem.reason:
        body["reason"] = problem.reason
    if problem.field:
        body["field"] = problem.field
    return JSONResponse(body, problem.status, headers_of(problem))


def failure_of(problem: Problem) -> Mapping[str, str]:
    """A problem as the result of a promise: `{"error": ..., "category": ...}`."""
    return {"error": problem.message, "category": "server" if problem.is_servers else "user"}
