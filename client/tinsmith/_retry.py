"""Sends calls again until they get through: same content, same number."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from tinsmith.errors import TinsmithError, UnavailableError, from_rpc_error

T = TypeVar("T")

DELAY_S_FIRST = 0.2
DELAY_S_MAX = 10.0
STATUS_INTERVAL_S = 10.0
_BROKEN_CONNECTION = ("RST_STREAM", "Socket closed", "Connection reset", "GOAWAY")

_log = logging.getLogger("tinsmith")


async def retrying(what: str, call: Callable[[], Awaitable[T]], give_up_after_s: float) -> T:
    """Make a call until it gets an answer that waiting does not change.

    Args:
        what: Names the call in the status line that is logged while it waits.
        call: Makes one attempt; every attempt must be the same call.
        give_up_after_s: Seconds of failed attempts after which the last error is raised.

    Raises:
        TinsmithError: The answer, or the last failure.
    """
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + give_up_after_s
    next_status_s = loop.time()
    delay_s = DELAY_S_FIRST
    while True:
        try:
            return await call()
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            if not is_retryable(error) or loop.time() > give_up_s:
                raise error from None
        if loop.time() >= next_status_s:
            _log.warning("%s waits for the service: %s", what, error)
            next_status_s = loop.time() + STATUS_INTERVAL_S
        wait_s = max(delay_s, error.retry_after_s or 0.0)
        await asyncio.sleep(wait_s * random.uniform(0.75, 1.25))
        delay_s = min(2 * delay_s, DELAY_S_MAX)


def is_retryable(error: TinsmithError) -> bool:
    """True when nothing was done and the same call can succeed later."""
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # Without a delay it is a message that will always be too large.
        return error.retry_after_s is not None
    if error.reason:
        return isinstance(error, UnavailableError) or error.reason == "SEQ_ID_GAP"
    # No server of ours said that: the connection, or a proxy.
    broken = any(text in str(error) for text in _BROKEN_CONNECTION)
    return isinstance(error, UnavailableError) or broken
