"""Bodies of requests: bounded in bytes, in time, and in how many there are.

A body is read into memory that was accounted for; what a compressed one unpacks to is bounded
likewise, and by the same limit. Whatever is wrong has an answer with a body that says it.
"""

import asyncio
import contextlib
import json
import re
import zlib
from collections.abc import AsyncIterator
from typing import Any

import zstandard
from starlette.requests import ClientDisconnect, Request

from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.callers import caller_of
from tinsmithd.gateway.problems import RETRY_S, Problem
from tinsmithd.rpc.budget import Budget, Lease

PIECE_BYTES = 1024 * 1024
STALL_BYTES = 256 * 1024
"""A body that is not complete brings at least so much within `body_stall_s`, or it stalls."""
VALUES_PER_ITEM = 8
"""Values that a JSON body may have for each item of `body_items_max`: a number takes less memory
than a list, and less time to read."""
DISCARDED_TIMES = 4
"""A body that is larger than the limit by no more than this is read to its end, and discarded."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Bodies:
    """Reads bodies of requests. One for the process.

    Args:
        settings: The limits.
        limit: Name of that which says how large a body may be, where `body_bytes_max` is larger.
    """

    def __init__(self, settings: GatewaySettings, limit: str = "body_bytes_max") -> None:
        self._settings = settings
        self._most = min(getattr(settings, limit), settings.body_bytes_max)
        self._limit = limit if self._most < settings.body_bytes_max else "body_bytes_max"
        share = settings.peer_share_max
        self._held = Budget("received_bytes_max", settings.received_bytes_max, share)

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """A request's whole body, unpacked; its memory is accounted for within the `with`.

        Raises:
            Problem: 400, 408, 413 or 415.
            ResourceExhausted: There is no room, in all or for this host.
        """
        with self._held.lease(caller_of(request.scope)) as room:
            body = await self._received(request, room)
            yield await self._unpacked(request, body, room)

    async def json(self, request: Request) -> dict[str, Any]:
        """A request's body as a JSON object; an empty body is an empty object.

        Raises:
            Problem: As `read`, and 400 for what is no object.
        """
        async with self.read(request) as body:
            return json_object(body, self._settings.body_items_max)

    async def _received(self, request: Request, room: Lease) -> bytes:
        most = self._most
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said[:20]) > most:
            if int(said[:20]) <= DISCARDED_TIMES * most:
                await self._discard(request)
            raise self._too_large()
        pieces, wanted = bytearray(), STALL_BYTES
        clock, stall_s = asyncio.get_running_loop().time, self._settings.body_stall_s
        try:
            async with asyncio.timeout(stall_s) as limit:
                async for piece in request.stream():
                    if len(pieces) + len(piece) > most:
                        raise self._too_large()
                    room.take(len(piece))
                    pieces += piece
                    if len(pieces) >= wanted:
                        limit.reschedule(clock() + stall_s)
                        wanted = len(pieces) + STALL_BYTES
        except TimeoutError:
            raise Problem(408, "the body did not arrive", retry_after_s=RETRY_S) from None
        except ClientDisconnect:
            raise Problem(400, "the connection ended within the body") from None
        return bytes(pieces)

    def _too_large(self) -> Problem:
        return Problem(413, f"the body is larger than {self._limit}, {self._most} bytes")

    async def _discard(self, request: Request) -> None:
        """Let a body come that is not kept: many clients read no answer before all is sent."""
        with contextlib.suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(self._settings.body_stall_s):
                async for _ in request.stream():
                    pass

    async def _unpacked(self, request: Request, body: bytes, room: Lease) -> bytes:
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding in ("", "identity"):
            return body
        if encoding not in ("gzip", "zstd"):
            raise Problem(415, f"content-encoding must be gzip or zstd, not {encoding[:40]!r}")
        unpack = _unpack_gzip if encoding == "gzip" else _unpack_zstd
        pieces = bytearray()
        try:
            for piece in unpack(body):
                if len(pieces) + len(piece) > self._most:
                    raise self._too_large()
                room.take(len(piece))
                pieces += piece
                await asyncio.sleep(0)  # what is large does not stop others
        except (zlib.error, zstandard.ZstdError):
            raise Problem(400, f"the body is no {encoding}") from None
        return bytes(pieces)


def _unpack_gzip(body: bytes) -> Any:
    unpacker = zlib.decompressobj(wbits=31)
    while True:
        yield unpacker.decompress(body, PIECE_BYTES)
        body = unpacker.unconsumed_tail
        if unpacker.eof:
            if unpacker.unused_data:
                raise zlib.error("something follows")
            return
        if not body:
            raise zlib.error("it ends early")


def _unpack_zstd(body: bytes) -> Any:
    # The window says how much memory unpacking takes, whatever comes out.
    unpacker = zstandard.ZstdDecompressor(max_window_size=8 * PIECE_BYTES)
    with unpacker.stream_reader(body, read_across_frames=False) as reader:
        while piece := reader.read(PIECE_BYTES):
            yield piece
    if not body:
        raise zstandard.ZstdError("it is empty")


def json_object(body: bytes, items_max: int) -> dict[str, Any]:
    """Read a JSON object; an empty body is an empty one.

    What is read takes up to thirty times the memory of its text, and holds everybody up for seconds
    where it is nothing but brackets. So it is counted before.

    Args:
        body: The text.
        items_max: Most lists and objects that it may have, and for each of them `VALUES_PER_ITEM`
            values; brackets and commas in texts count, too.

    Raises:
        Problem: It is none, or has too much in it, or is too deep for Python, or has a number that
            JSON does not.
    """
    if not body:
        return {}
    if body.count(b"[") + body.count(b"{") > items_max:
        raise Problem(400, f"the body has more lists and objects than body_items_max, {items_max}")
    if body.count(b",") > VALUES_PER_ITEM * items_max:
        most = f"{VALUES_PER_ITEM} times body_items_max, {VALUES_PER_ITEM * items_max}"
        raise Problem(400, f"the body has more values than {most}")
    try:
        found = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise Problem(400, "the body must be a JSON object")
    if has_half_characters(body, found):
        raise Problem(400, "the body is no JSON: a text has half a character")
    return found


def has_half_characters(text: bytes, found: Any) -> bool:
    """Whether a text of a JSON value has a surrogate alone, which nothing else can carry.

    Args:
        text: The JSON.
        found: What it was read as.
    """
    if _SURROGATE.search(text) is None:
        return False
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
