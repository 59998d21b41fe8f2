"""What is known of each call while it is served: for logs, for spans, and the line at its end."""

import asyncio
import contextlib
import functools
import logging
import secrets
import time
from collections.abc import Iterator
from typing import Any

import grpc

from tinsmithd import keys, tracing
from tinsmithd.rpc import flow

PUBLIC_PREFIX = "/tinsmith.v1."
_log = logging.getLogger("tinsmithd.calls")
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


@contextlib.contextmanager
def served(context: grpc.aio.ServicerContext, method: str) -> Iterator[tracing.ServedCall]:
    """Serve a call in the body of the `with`: whatever that logs says which call it was.

    Args:
        context: Of the call.
        method: `/package.Service/Method`.
    """
    call = tracing.claimed(method, context.invocation_metadata() or ())
    if method.startswith(PUBLIC_PREFIX):
        call.tenant = keys.current().owner
    with tracing.serving(call):
        if not tracing.on() or not method.startswith(PUBLIC_PREFIX):
            yield call
            return
        _, service, name = method.split("/", 2)
        about = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": name,
            "tinsmith.tenant": call.tenant,
        }
        with tracing.served(method[1:], about) as span:
            try:
                yield call
            finally:
                if span is not None:
                    span.say({"rpc.grpc.status_code": _number(context.code())})


def ended_with(reason: str) -> str:
    """Note what the call that is being served is answered; returns its id, for its caller."""
    place = tracing.here()
    if place is None:
        return secrets.token_hex(8)
    place.call.failure = reason
    return place.call.request_id


def log_at_end(method: str, messages: flow.Flow, context: grpc.aio.ServicerContext) -> None:
    """Log a line once the task of this call has ended, when its answer is written.

    Args:
        method: `/package.Service/Method`.
        messages: Those of the call.
        context: Of the call.
    """
    task = asyncio.current_task()
    assert task is not None
    begun_s = time.perf_counter()
    task.add_done_callback(functools.partial(_say, method, messages, context, begun_s))


def _say(
    method: str,
    messages: flow.Flow,
    context: grpc.aio.ServicerContext,
    begun_s: float,
    task: "asyncio.Task[Any]",
) -> None:
    code = "CANCELLED" if task.cancelled() else _CODES.get(_number(context.code()), "UNKNOWN")
    seconds = time.perf_counter() - begun_s
    fields = {
        "code": code,
        "seconds": round(seconds, 6),
        "received_bytes": messages.received_bytes,
        "sent_bytes": messages.sent_bytes,
        "tenant": keys.current().owner,
    }
    _log.info("%s ended", method, extra={"fields": fields})


def _number(code: Any) -> int:
    """A status as a number: grpc.aio gives an enum's member, a number or None."""
    if isinstance(code, grpc.StatusCode):
        return int(code.value[0])
    return int(code or 0)
