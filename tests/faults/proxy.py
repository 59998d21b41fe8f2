"""A gRPC proxy that loses, doubles, delays and cuts calls: any method, raw bytes, from a seed.

What is done to a call depends on the seed, the method, the call's content and how often that
content came before, and on nothing else: neither on time nor on the order of arrival. A seed that
found a fault finds it again.
"""

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
)

PASS = "pass"
DROP_REPLY = "drop the reply"
CUT_REPLY = "cut the reply half-way"
DUPLICATE = "send twice at once"
DELAY = "delay"
CUT_REQUEST = "cut before the last message"
FAULTS = (DROP_REPLY, CUT_REPLY, DUPLICATE, DELAY, CUT_REQUEST)


@dataclass
class _Outcome:
    """What the target answered: messages, and an error unless it was OK."""

    messages: list[bytes]
    error: grpc.aio.AioRpcError | None = None

    def comparable(self) -> tuple[Any, ...]:
        """What must be equal when the same call is sent twice; errors carry a request id."""
        return (self.error.code(),) if self.error is not None else tuple(self.messages)

    def passing(self) -> bool:
        """True for an error that says nothing of the call itself, such as a server that stops."""
        codes = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
        return self.error is not None and self.error.code() in codes


class ChaosProxy(grpc.GenericRpcHandler):
    """Forwards calls to a target, and misbehaves; an async context manager.

    Args:
        target: `host:port`.
        seed: Where chance begins.
        share: Share of calls that meet a fault, 0 to 1.
        faults: Which of `FAULTS`.
        delay_s_max: Longest delay.
        options: More options of the proxy's server, such as a maximum connection age.

    Attributes:
        address: Where it listens, `host:port`.
        done: How often each of `PASS` and `FAULTS` was done.
        differences: Calls that were sent twice at once and got two different answers.
    """

    def __init__(
        self,
        target: str,
        seed: int,
        *,
        share: float = 0.3,
        faults: Sequence[str] = FAULTS,
        delay_s_max: float = 0.05,
        options: Sequence[tuple[str, int]] = (),
    ) -> None:
        self._target = target
        self._seed = seed
        self._share = share
        self._faults = faults
        self._delay_s_max = delay_s_max
        self._options = [*OPTIONS, *options]
        self._seen: Counter[bytes] = Counter()
        self.address = ""
        self.done: Counter[str] = Counter()
        self.differences: list[str] = []

    async def __aenter__(self) -> "ChaosProxy":
        self._channel = grpc.aio.insecure_channel(self._target, options=list(OPTIONS))
        self._server = grpc.aio.server(options=self._options)
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)
        await self._channel.close()

    def service(self, details: Any) -> Any:
        """Take any method; on the wire every call is a stream in both directions."""
        method: str = details.method

        async def handle(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for message in self._handle(method, requests, context):
                yield message

        return grpc.stream_stream_rpc_method_handler(handle)

    async def _handle(
        self, method: str, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        messages = [message async for message in requests]
        fault, rng = self._choose(method, messages)
        self.done[fault] += 1
        if fault == CUT_REQUEST:
            await self._cut(method, messages)
            await _lost(context)
        if fault == DELAY:
            await asyncio.sleep(rng.uniform(0, self._delay_s_max))
        if fault == DUPLICATE:
            outcome = await self._twice(method, messages)
        else:
            outcome = await self._forward(method, messages)
        if fault == DROP_REPLY:
            await _lost(context)
        count = len(outcome.messages) // 2 if fault == CUT_REPLY else len(outcome.messages)
        for message in outcome.messages[:count]:
            yield message
        if fault == CUT_REPLY:
            await _lost(context)
        if outcome.error is not None:
            error = outcome.error
            trailing = tuple(error.trailing_metadata() or ())
            await context.abort(error.code(), error.details() or "", trailing)

    def _choose(self, method: str, messages: Sequence[bytes]) -> tuple[str, random.Random]:
        content = hashlib.sha256(method.encode())
        for message in messages:
            content.update(len(message).to_bytes(8, "little") + message)
        key = content.digest()
        self._seen[key] += 1
        rng = random.Random(f"{self._seed} {key.hex()} {self._seen[key]}")
        fault = rng.choice(self._faults) if rng.random() < self._share else PASS
        return fault, rng

    async def _forward(self, method: str, messages: Sequence[bytes]) -> _Outcome:
        outcome = _Outcome([])
        try:
            async for message in self._channel.stream_stream(method)(iter(messages)):
                outcome.messages.append(message)
        except grpc.aio.AioRpcError as error:
            outcome.error = error
        return outcome

    async def _twice(self, method: str, messages: Sequence[bytes]) -> _Outcome:
        both = [self._forward(method, messages) for _ in range(2)]
        first, second = await asyncio.gather(*both)
        if first.comparable() != second.comparable() and not (first.passing() or second.passing()):
            self.differences.append(f"{method}: {first} and {second}")
        return first

    async def _cut(self, method: str, messages: Sequence[bytes]) -> None:
        call = self._channel.stream_stream(method)()
        try:
            for message in messages[:-1]:
                await call.write(message)
            await asyncio.sleep(0)
        except grpc.aio.AioRpcError:
            pass
        call.cancel()


async def _lost(context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "the proxy cut the connection")
