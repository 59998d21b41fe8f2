"""An answer's head goes out with its body."""

import asyncio
from typing import Any

from tinsmithd.gateway.connections import JoinedWrites


class Written:
    """A transport that notes what it was told."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def write(self, data: bytes) -> None:
        self.said.append(data)

    def close(self) -> None:
        self.said.append("close")


async def test_a_head_waits_for_the_body_that_follows_it_at_once() -> None:
    transport: Any = Written()
    joined = JoinedWrites(transport, asyncio.get_running_loop())
    joined.write(b"HTTP/1.1 200 OK\r\n\r\n")
    assert transport.said == []
    joined.write(b"body")
    joined.write(b" and more")
    assert transport.said == [b"HTTP/1.1 200 OK\r\n\r\nbody", b" and more"]
    await asyncio.sleep(0)
    assert len(transport.said) == 2


async def test_a_head_alone_goes_out_in_the_next_turn() -> None:
    """Such as that of a stream whose first event is not there yet."""
    transport: Any = Written()
    joined = JoinedWrites(transport, asyncio.get_running_loop())
    joined.write(b"HTTP/1.1 200 OK\r\n\r\n")
    await asyncio.sleep(0)
    assert transport.said == [b"HTTP/1.1 200 OK\r\n\r\n"]


async def test_nothing_is_lost_where_it_is_closed_at_once() -> None:
    transport: Any = Written()
    joined = JoinedWrites(transport, asyncio.get_running_loop())
    joined.write(b"HTTP/1.1 413 Too Large\r\n\r\n")
    joined.close()
    assert transport.said == [b"HTTP/1.1 413 Too Large\r\n\r\n", "close"]
