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
from tinsmithd.gateway.problems import RETRY_S, Problem

PIECE_BYTES = 1024 * 1024
DISCARDED_TIMES = 4
"""A body that is larger than the limit by no more than this is read to its end, and discarded."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Bodies:
    """Reads bodies of requests. One for the process.

    Args:
        settings: The limits.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._held_bytes = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """A request's whole body, unpacked; its memory is accounted for within the `with`.

        Raises:
            Problem: 400, 408, 413, 415 or 429.
        """
        with self._room() as room:
            body = await self._received(request, room)
            yield await self._unpacked(request, body, room)

    async def json(self, request: Request) -> dict[str, Any]:
        """A request's body as a JSON object; an empty body is an empty object.

        Raises:
            Problem: As `read`, and 400 for what is no object.
        """
        async with self.read(request) as body:
            return json_object(body)

    @contextlib.contextmanager
    def _room(self) -> Any:
        room = _Room(self, self._settings.received_bytes_max)
        try:
            yield room
        finally:
            self._held_bytes -= room.taken_bytes

    async def _received(self, request: Request, room: "_Room") -> bytes:
        most = self._settings.body_bytes_max
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said[:20]) > most:
            if int(said[:20]) <= DISCARDED_TIMES * most:
                await self._discard(request)
            raise _too_large(most)
        pieces = bytearray()
        stream = request.stream().__aiter__()
        while True:
            try:
                async with asyncio.timeout(self._settings.body_stall_s):
                    piece = await anext(stream)
            except StopAsyncIteration:
                return bytes(pieces)
            except TimeoutError:
                raise Problem(408, "the body did not arrive", retry_after_s=RETRY_S) from None
            except ClientDisconnect:
                raise Problem(400, "the connection ended within the body") from None
            if len(pieces) + len(piece) > most:
                raise _too_large(most)
            room.take(len(piece))
            pieces += piece

    async def _discard(self, request: Request) -> None:
        """Let a body come that is not kept: many clients read no answer before all is sent."""
        with contextlib.suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(self._settings.body_stall_s):
                async for _ in request.stream():
                    pass

    async def _unpacked(self, request: Request, body: bytes, room: "_Room") -> bytes:
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding in ("", "identity"):
            return body
        if encoding not in ("gzip", "zstd"):
            raise Problem(415, f"content-encoding must be gzip or zstd, not {encoding[:40]!r}")
        unpack = _unpack_gzip if encoding == "gzip" else _unpack_zstd
        pieces = bytearray()
        try:
            for piece in unpack(body):
                if len(pieces) + len(piece) > self._settings.body_bytes_max:
                    raise _too_large(self._settings.body_bytes_max)
                room.take(len(piece))
                pieces += piece
                await asyncio.sleep(0)  # what is large does not stop others
        except (zlib.error, zstandard.ZstdError):
            raise Problem(400, f"the body is no {encoding}") from None
        return bytes(pieces)

    def take(self, count: int, most: int) -> None:
        """Account for bytes; see `_Room.take`."""
        if self._held_bytes + count > most:
            raise Problem(429, "too many bytes of requests at once", retry_after_s=RETRY_S)
        self._held_bytes += count


class _Room:
    """What one request holds."""

    def __init__(self, bodies: Bodies, most: int) -> None:
        self._bodies = bodies
        self._most = most
        self.taken_bytes = 0

    def take(self, count: int) -> None:
        """Account for bytes.

        Raises:
            Problem: There is no room.
        """
        self._bodies.take(count, self._most)
        self.taken_bytes += count


def _too_large(most: int) -> Problem:
    return Problem(413, f"the body is larger than body_bytes_max, {most} bytes")


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


def json_object(body: bytes) -> dict[str, Any]:
    """Read a JSON object; an empty body is an empty one.

    Raises:
        Problem: It is none, or too deep for Python, or has a number that JSON does not.
    """
    if not body:
        return {}
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
