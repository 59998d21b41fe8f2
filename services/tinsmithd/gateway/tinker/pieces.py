"""Answers that are sent piece by piece, no faster than they are taken."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PIECE_BYTES = 256 * 1024
SEND_STALL_S = 60.0
"""A reader that takes no piece for this long is given up."""


class Pieces(Response):
    """Sends what comes. A reader that is slow holds one piece, and not all of it.

    Args:
        body: The bytes.
        media_type: What they are.
        headers: With the length: whoever gets less knows that it is not all.
        is_head: Whether only the headers are asked for.
        ended: Called once at the end, however that comes.
    """

    def __init__(
        self,
        body: AsyncIterator[bytes],
        media_type: str,
        headers: Mapping[str, str],
        *,
        is_head: bool = False,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers(headers)
        self._body = body
        self._is_head = is_head
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            if not self._is_head:
                async with aclosing(self._body) as body:  # type: ignore[type-var]
                    async for piece in body:
                        message = {"type": "http.response.body", "body": piece, "more_body": True}
                        async with asyncio.timeout(SEND_STALL_S):
                            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._ended()


def answer_of(body: bytes, media_type: str) -> Response:
    """An answer of these bytes; in pieces where they are many."""
    if len(body) <= PIECE_BYTES:
        return Response(body, media_type=media_type)
    return Pieces(_pieces(body), media_type, {"content-length": str(len(body))})


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]
