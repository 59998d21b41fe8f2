"""Who samples when: bounded, fair between requests, one compute thread.

The engine's thread takes one step of one request after the other, first come first served. A
request hands in its next step only when the last one is done, so all running requests advance at
the same pace and a cancelled one stops with the step it is in.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tinsmithd.domain import BaseModelInfo, ModelState, PromptScores, SampledTokens, SampleRequest
from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.sampler.engines.interface import Generation, SamplingEngine


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds; the names are those of the settings."""

    running_max: int
    waiting_max: int
    adapters_max: int


@dataclass(frozen=True)
class Adapter:
    """An adapter that a request wants: its immutable key, and how to get it."""

    key: str
    fetch: Callable[[], Awaitable[ModelState]]


@dataclass(frozen=True)
class Output:
    """Some of what a request made: its prompt's scores first, where asked for, then tokens."""

    prompt_scores: PromptScores | None = None
    tokens: Sequence[SampledTokens] = ()


class SamplerScheduler:
    """Runs requests on one engine. Lives on one event loop.

    Attributes:
        running, waiting: Requests that have a place, and that wait for one.
        prompt_tokens, sampled_tokens: So far, of requests begun and of all their samples.
    """

    def __init__(self, engine: SamplingEngine, limits: SchedulerLimits) -> None:
        self._engine = engine
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._slots = asyncio.Semaphore(limits.running_max)
        self.running = self.waiting = 0
        self.prompt_tokens = self.sampled_tokens = 0
        self._adapters: OrderedDict[str, _Loaded] = OrderedDict()

    @property
    def adapters(self) -> int:
        """Adapters in memory, or on their way to it."""
        return len(self._adapters)

    @property
    def info(self) -> BaseModelInfo:
        """The base model."""
        return self._engine.info

    async def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files."""
        files: dict[str, bytes] = await self._in_thread(self._engine.tokenizer_files)
        return files

    def close(self) -> None:
        """Let the thread end after the step it is in."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, request: SampleRequest, adapter: Adapter | None) -> AsyncIterator[Output]:
        """Run a request; closing the iterator early stops it.

        Raises:
            ResourceExhausted: Too many wait already (QUEUE_FULL).
        """
        async with self._slot(), self._loaded(adapter):
            generation = await self._start(request, adapter)
            self.prompt_tokens += len(request.prompt)
            try:
                if generation.prompt_scores is not None:
                    yield Output(prompt_scores=generation.prompt_scores)
                while not generation.finished:
                    tokens = await self._in_thread(generation.step)
                    self.sampled_tokens += sum(len(some.tokens) for some in tokens)
                    yield Output(tokens=tokens)
            finally:
                with contextlib.suppress(RuntimeError):  # the server is stopping
                    self._thread.submit(generation.close)

    async def _start(self, request: SampleRequest, adapter: Adapter | None) -> Generation:
        key = None if adapter is None else adapter.key
        future = self._thread.submit(self._engine.start, request, key)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            # It may have begun, and then nobody else would free it.
            future.add_done_callback(_close_started)
            raise

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        if self._slots.locked() and self.waiting >= self._limits.waiting_max:
            raise ResourceExhausted(
                f"waiting_max = {self._limits.waiting_max} calls wait already",
                Reason.QUEUE_FULL,
                retry_after_s=1.0,
                metadata={"limit": "waiting_max", "value": str(self.waiting + 1)},
            )
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._slots.release()

    # --- adapters -----------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _loaded(self, adapter: Adapter | None) -> AsyncIterator[None]:
        """Hold an adapter in memory, loading it first where it is not there."""
        if adapter is None:
            yield
            return
        loaded = self._adapters.get(adapter.key)
        if loaded is None or _failed(loaded.loading):
            loaded = _Loaded(asyncio.create_task(self._load(adapter)))
            self._adapters[adapter.key] = loaded
        self._adapters.move_to_end(adapter.key)
        loaded.users += 1
        try:
            # One caller that goes away must not stop the loading for the others.
            await asyncio.shield(loaded.loading)
            yield
        finally:
            loaded.users -= 1
            if _failed(loaded.loading) and self._adapters.get(adapter.key) is loaded:
                del self._adapters[adapter.key]

    async def _load(self, adapter: Adapter) -> None:
        state = await adapter.fetch()
        await self._make_room()
        await self._in_thread(self._engine.load_adapter, adapter.key, state)

    async def _make_room(self) -> None:
        """Drop the adapters that were unused longest until one more fits."""
        while len(self._adapters) > self._limits.adapters_max:
            # Looked for anew each time: while one was unloaded, another may have come into use.
            idle = (k for k, a in self._adapters.items() if not a.users and a.loading.done())
            key = next(idle, None)
            if key is None:
                return
            del self._adapters[key]
            await self._in_thread(self._engine.unload_adapter, key)


@dataclass
class _Loaded:
    loading: asyncio.Task[None]
    users: int = 0


def _failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _close_started(future: "Future[Generation]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
