"""Server-sent events: written as fast as they are read, and ended with their reader."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tinsmithd.gateway.openai.errors import error_of, foreseen

T = TypeVar("T")

Events = AsyncGenerator[Mapping[str, Any], None]
_DONE = b"data: [DONE]\n\n"
_log = logging.getLogger(__name__)


class CallerLeft(Exception):
    """The connection of a request ended before its answer."""


async def until_left(request: Request, work: Awaitable[T]) -> T:
    """Wait for work, or cancel it when the caller's connection ends.

    Args:
        request: Its body was read.
        work: What it asked for.

    Raises:
        CallerLeft: It did.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(request.receive))
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise CallerLeft
    finally:
        leaving.cancel()
        task.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer of events. What makes them is asked for the next one when this one was taken.

    Args:
        first: The first event, which was waited for: whatever was wrong before it has a status.
        events: The rest; closed when the answer ends, however it ends.
        stall_s: A reader that takes nothing for this long is given up.
        close: Called last.
    """

    def __init__(
        self,
        first: Mapping[str, Any],
        events: Events,
        stall_s: float,
        close: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(None, 200)
        self._first = first
        self._events = events
        self._stall_s = stall_s
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        writing = asyncio.create_task(self._write(scope, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait([writing, leaving], return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                try:
                    writing.result()
                except TimeoutError:
                    _log.info("a reader took nothing for %g s: its stream ends", self._stall_s)
        finally:
            writing.cancel()
            leaving.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)
            await self._events.aclose()
            await self._close()

    async def _write(self, scope: Scope, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx would keep events until it has many
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._event(send, _data(self._first))
        try:
            async for event in self._events:
                await self._event(send, _data(event))
            await self._event(send, _DONE)
        except TimeoutError:
            raise
        except Exception as error:
            path = scope["path"]
            await self._event(send, _data(error_of(foreseen(error), path)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _event(self, send: Send, data: bytes) -> None:
        """Send one; waits while the reader has too much unread."""
        async with asyncio.timeout(self._stall_s):
            await send({"type": "http.response.body", "body": data, "more_body": True})


def _data(event: Mapping[str, Any]) -> bytes:
    text = json.dumps(event, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return b"data: " + text.encode() + b"\n\n"
