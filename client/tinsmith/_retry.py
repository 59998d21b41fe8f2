"""Sends calls again until they get through: same content, same number."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from tinsmith._waiting import Attempts, Waiting
from tinsmith.errors import (
    APIConnectionError,
    TinsmithError,
    UnavailableError,
    from_rpc_error,
)

T = TypeVar("T")

DELAY_S_FIRST = 0.2
DELAY_S_MAX = 10.0
LONG_ATTEMPT_S = 100.0
"""A dead connection is found sooner: a call that was under way for longer was worked on."""

_LOST_CODES = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
_LOST_TEXTS = (
    *("RST_STREAM", "Socket closed", "Connection reset", "GOAWAY", "Stream removed"),
    "Internal error from Core",  # what grpc.aio says when a message cannot be sent any more
)
_BUSY_TEXT = "Concurrent RPC limit exceeded"  # what grpc's server itself says
_AT_WORK = ("QUEUE_FULL", "SEQ_ID_GAP", "SERVER_BUSY")


async def retrying(
    call: Attempts, attempt: Callable[[], Awaitable[T]], waiting: Waiting, give_up_after_s: float
) -> T:
    """Make a call until it gets an answer that waiting does not change.

    The clock of `give_up_after_s` runs while nothing but failures comes: it starts anew with every
    answer to another call of the same model (or, without a model, of the same service), when the
    service says that it is at work but full, and after an attempt that was worked on for long.

    Args:
        call: What the call is called, and to whom it goes.
        attempt: Makes one attempt; every attempt must be the same call. UnavailableError is what it
            raises when the answer is that there is nothing yet.
        waiting: Where calls are that wait, so that one line speaks of all of them.
        give_up_after_s: Seconds of nothing but failures after which the last error is raised.

    Raises:
        TinsmithError: The answer, or the last failure.
    """
    loop = asyncio.get_running_loop()
    delay_s, woken = DELAY_S_FIRST, False
    with waiting.under_way(call):
        while True:
            call.attempt_s = loop.time()
            try:
                result = await attempt()
            except (grpc.RpcError, TinsmithError) as failure:
                error = _as_error(failure)
                if not is_retryable(error):
                    waiting.answered(call)
                    raise error from None
            else:
                waiting.answered(call)
                return result
            now_s = loop.time()
            if call.failing_s is None or now_s - call.attempt_s > LONG_ATTEMPT_S:
                call.failing_s = now_s
            if error.reason in _AT_WORK:
                call.failing_s = now_s
            waiting.failed(call, error)
            if now_s - max(call.failing_s, waiting.answered_s(call)) > give_up_after_s:
                waiting.gave_up(call)
                raise error if isinstance(error, APIConnectionError) else _unanswered(error)
            wait_s = _wait_s(error, delay_s)
            # Woken only every other time: whoever gets through must not make the rest hammer.
            woken = await waiting.pause(call, wait_s, wakes=not woken and not error.retry_after_s)
            delay_s = min(2 * delay_s, DELAY_S_MAX)


def _as_error(failure: grpc.RpcError | TinsmithError) -> TinsmithError:
    return failure if isinstance(failure, TinsmithError) else from_rpc_error(failure)


def _unanswered(error: TinsmithError) -> TinsmithError:
    """The error for a connection that broke for good, whatever its status says."""
    return UnavailableError(str(error), code=error.code) if is_lost(error) else error


def _wait_s(error: TinsmithError, delay_s: float) -> float:
    if not error.retry_after_s:  # a server that names no time is not asked at once again and again
        return delay_s * random.uniform(0.75, 1.25)
    # A server that waits for something knows best; one that is full must not be made fuller.
    least_s = error.retry_after_s
    wait_s = least_s if isinstance(error, UnavailableError) else max(delay_s, least_s)
    return wait_s * random.uniform(1.0, 1.5)


def is_lost(error: TinsmithError) -> bool:
    """True when no server of ours said that: the connection broke, or a proxy gave up."""
    if error.reason:
        return False
    text = str(error)
    broken = any(part in text for part in _LOST_TEXTS)
    return isinstance(error, UnavailableError) or error.code in _LOST_CODES or broken


def is_retryable(error: TinsmithError) -> bool:
    """True when the same call can succeed later: nothing was done, or a repeat is recognised."""
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # Without a delay it is a message that will always be too large.
        return error.retry_after_s is not None or _BUSY_TEXT in str(error)
    if error.reason:  # a server of ours says it with a delay
        return error.retry_after_s is not None
    return is_lost(error)
