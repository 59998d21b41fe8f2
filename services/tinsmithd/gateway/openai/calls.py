"""Calls of the Sampler: made again where they are lost, read no faster than somebody wants them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np

from tinsmith import tensors
from tinsmith.errors import from_rpc_error
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmithd.gateway.cluster import SAMPLER, Cluster, Work
from tinsmithd.gateway.problems import Problem, problem_of

AT_ONCE = 32
"""Calls of one request that are under way at once."""
WAITING_MAX = 64
"""Pieces of a request's answer that wait to be read; the Sampler keeps what comes after them."""
WHOLE = (("tinsmith-gather-s", "10"),)
"""Nobody sees a token before the last one is there: messages may be few and large."""

Request = pb.SampleRequest | pb.ComputeLogprobsRequest


@dataclass(frozen=True)
class Tokens:
    """New tokens of one sequence, n of them.

    Attributes:
        call: Which of the request's calls.
        sequence: Which sequence of that.
        tokens: int (n,).
        logprobs: float (n,).
        topk_tokens: int (n, k), or None.
        topk_logprobs: float (n, k), or None; NaN where there is no token.
        stop_reason: Set with the last ones.
    """

    call: int
    sequence: int
    tokens: np.ndarray
    logprobs: np.ndarray
    topk_tokens: np.ndarray | None
    topk_logprobs: np.ndarray | None
    stop_reason: int

    def after(self, count: int) -> "Tokens":
        """The same without its first tokens."""
        if not count:
            return self
        topk_tokens, topk_logprobs = self.topk_tokens, self.topk_logprobs
        return replace(
            self,
            tokens=self.tokens[count:],
            logprobs=self.logprobs[count:],
            topk_tokens=None if topk_tokens is None else topk_tokens[count:],
            topk_logprobs=None if topk_logprobs is None else topk_logprobs[count:],
        )


@dataclass(frozen=True)
class Scores:
    """What a call says of its prompt of P tokens.

    Attributes:
        call: Which of the request's calls.
        cached_tokens: How many of them were not computed again.
        logprobs: float (P,), or None; NaN for the first.
        topk_tokens: int (P, k), or None.
        topk_logprobs: float (P, k), or None.
    """

    call: int
    cached_tokens: int
    logprobs: np.ndarray | None
    topk_tokens: np.ndarray | None
    topk_logprobs: np.ndarray | None


Part = Tokens | Scores


@dataclass
class _Given:
    """What was given out of one sequence, over all attempts of its call."""

    tokens: list[int] = field(default_factory=list)
    seen: int = 0
    ended: bool = False


class Calls:
    """All calls of one request, at once; a context manager, which ends them all when it is left.

    Args:
        cluster: Where they go.
        requests: One for each prompt, each with a seed of its own: made again, it is the same.
        within_s: How long a call is tried while it meets nothing but failures.
        streams: Whether somebody wants each token when it is made.
    """

    def __init__(
        self, cluster: Cluster, requests: Sequence[Request], within_s: float, *, streams: bool
    ) -> None:
        self._cluster = cluster
        self._requests = requests
        self._within_s = within_s
        self._metadata = () if streams else WHOLE
        self._parts: asyncio.Queue[Part | None] = asyncio.Queue(WAITING_MAX)
        self._error: BaseException | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Calls":
        self._task = asyncio.create_task(self._all())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls that are under way; the Sampler stops to work on them."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def __aiter__(self) -> AsyncIterator[Part]:
        return self

    async def __anext__(self) -> Part:
        part = await self._parts.get()
        if part is not None:
            return part
        await self._parts.put(None)  # whoever asks again is told again
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    async def _all(self) -> None:
        places = asyncio.Semaphore(AT_ONCE)

        async def one(index: int) -> None:
            async with places:
                await self._call(index, self._requests[index])

        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(self._requests)):
                    group.create_task(one(index))
        except ExceptionGroup as errors:
            self._error = errors.exceptions[0]
        await self._parts.put(None)

    async def _call(self, index: int, request: Request) -> None:
        """Make one call, again and again, until it is answered."""
        scores = isinstance(request, pb.ComputeLogprobsRequest)
        given = [_Given() for _ in range(1 if scores else request.num_samples)]  # type: ignore[union-attr]
        work = Work(
            weights=f"{request.base_model} {request.checkpoint_path}",
            tokens=tensors.decode(request.prompt.chunks[0].tokens),
            sequences=len(given),
        )
        loop = asyncio.get_running_loop()
        failing_s: float | None = None
        told = False

        async def make(sampler: Any) -> None:
            nonlocal failing_s, told
            for each in given:
                each.seen = 0
            responses = _responses(sampler, request, self._metadata)
            async with contextlib.aclosing(responses):
                async for response in responses:
                    failing_s = None
                    for part in _parts_of(index, response, first=not told):
                        told = True
                        new = part if isinstance(part, Scores) else _new(given[part.sequence], part)
                        if new is not None:
                            await self._parts.put(new)

        async def attempt() -> None:
            nonlocal failing_s
            try:
                await self._cluster.on_a_sampler(work, make)
            except grpc.RpcError as failure:
                now_s = loop.time()
                failing_s = now_s if failing_s is None else failing_s
                if now_s - failing_s > self._within_s:
                    error = from_rpc_error(failure)
                    raise problem_of(error) or error from None
                raise

        await self._cluster.retrying("sample", attempt, service=SAMPLER)


async def _responses(
    sampler: Any, request: Request, metadata: Any
) -> AsyncGenerator[pb.SampleResponse, None]:
    """Messages of one attempt; a scored prompt is one as well."""
    if isinstance(request, pb.ComputeLogprobsRequest):
        scored = await sampler.ComputeLogprobs(request)
        yield pb.SampleResponse(
            prompt_logprobs=scored.prompt_logprobs,
            prompt_cache_hit_tokens=scored.prompt_cache_hit_tokens,
        )
        return
    call = sampler.Sample(request, metadata=metadata)
    try:
        async for response in call:
            yield response
    finally:
        call.cancel()  # one that nobody reads goes on otherwise


def _parts_of(index: int, response: pb.SampleResponse, *, first: bool) -> Iterator[Part]:
    """What a message has; the scores of a prompt are in the first one alone."""
    if first:
        scores = response.prompt_logprobs
        yield Scores(
            index,
            response.prompt_cache_hit_tokens,
            tensors.decode(scores.logprobs) if scores.HasField("logprobs") else None,
            *_topk(scores),
        )
    for delta in response.deltas:
        yield Tokens(
            index,
            delta.sequence_index,
            tensors.decode(delta.tokens),
            tensors.decode(delta.logprobs),
            *_topk(delta),
            delta.stop_reason,
        )


def _topk(message: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    if not message.HasField("topk_token_ids"):
        return None, None
    return tensors.decode(message.topk_token_ids), tensors.decode(message.topk_logprobs)


def _new(given: _Given, part: Tokens) -> Tokens | None:
    """A part without what an attempt before gave out; None when nothing is left.

    Raises:
        Problem: It has other tokens than those.
    """
    start, given.seen = given.seen, given.seen + len(part.tokens)
    known = given.tokens[start : given.seen]
    tokens = part.tokens.tolist()
    if tokens[: len(known)] != known:
        why = "a Sampler went away, and another one makes other tokens"
        raise Problem(503, why, "SAMPLE_DIFFERS", is_servers=True, retry_after_s=1.0)
    given.tokens.extend(tokens[len(known) :])
    ends = bool(part.stop_reason) and not given.ended
    given.ended = given.ended or ends
    left = part.after(len(known))
    return left if len(left.tokens) or ends else None
