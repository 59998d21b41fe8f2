"""Refusals in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

import functools
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinsmithd.gateway.problems import Problem, headers_of, problem_of

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    "BASE_MODEL_NOT_FOUND": "model_not_found",
    "CHECKPOINT_NOT_FOUND": "model_not_found",
    "MODEL_NOT_FOUND": "model_not_found",
    "MISSING_FIELD": "missing_required_parameter",
    "INVALID_FIELD": "invalid_value",
}
_PARAMETERS = {
    "num_samples": "n",
    "topk_prompt_logprobs": "logprobs",
    "topk_sample_logprobs": "logprobs",
    "checkpoint_path": "model",
    "base_model": "model",
}
"""What this API calls the fields of the Sampler's contract."""
_OF_CHATS = {"prompt": "messages", "logprobs": "top_logprobs"}
_IN_PARAMS = "sampling_params."
_log = logging.getLogger(__name__)

Handler = Callable[[Any, Request], Awaitable[Response]]


def error_of(problem: Problem, path: str) -> Mapping[str, Any]:
    """The body that says what is wrong with a request to a path."""
    kind = "server_error" if problem.status >= 500 else "invalid_request_error"
    code = _CODES.get(problem.reason, problem.reason.lower() or None)
    if problem.metadata.get("limit") == "context_length":
        code = "context_length_exceeded"
    field = _parameter(problem.field, chat=path.endswith("/chat/completions"))
    message = problem.message
    if problem.field and message.startswith(problem.field):
        message = field + message[len(problem.field) :]
    return {
        "error": {
            "message": message,
            "type": _TYPES.get(problem.status, kind),
            "param": field or None,
            "code": code,
        }
    }


def error_response(problem: Problem, path: str) -> Response:
    """The answer to a request to a path that is refused."""
    return JSONResponse(error_of(problem, path), problem.status, headers_of(problem))


def _parameter(field: str, *, chat: bool) -> str:
    if field.startswith(_IN_PARAMS):
        return re.split(r"[.\[]", field.removeprefix(_IN_PARAMS))[0]
    name = re.split(r"[.\[]", field)[0]
    if name not in _PARAMETERS and name not in _OF_CHATS:
        return field
    if chat:
        return _OF_CHATS.get(_PARAMETERS.get(name, name), _PARAMETERS.get(name, name))
    return _PARAMETERS.get(name) or field.partition(".")[0]


def foreseen(error: BaseException) -> Problem:
    """An error as what HTTP says of it; a fault of the gateway is logged."""
    problem = problem_of(error) if isinstance(error, Exception) else None
    if problem is None:
        fault = secrets.token_hex(8)
        _log.error("fault %s", fault, exc_info=error)
        problem = Problem(500, f"a fault of the gateway; its log has {fault}", "INTERNAL")
    return problem


def answered(handler: Handler) -> Handler:
    """A handler whose refusals have OpenAI's form."""

    @functools.wraps(handler)
    async def handle(self: Any, request: Request) -> Response:
        try:
            return await handler(self, request)
        except Exception as error:
            return error_response(foreseen(error), request.url.path)

    return handle
