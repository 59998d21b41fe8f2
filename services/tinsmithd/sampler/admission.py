"""Who samples when: bounded, fair between requests, one compute thread.

The engine's thread takes one step of one request after the other, first come first served. A
request hands in its next step only when the last one is done, so all running requests advance at
the same pace and a cancelled one stops with the step it is in. None waits for its reader: what a
request makes is buffered (`Unread`), and its slot is free once it is made.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tinsmithd.domain import BaseModelInfo, ModelState, SampleRequest
from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.sampler.engines.interface import Generation, SamplingEngine
from tinsmithd.sampler.loaded_adapters import Adapter, LoadedAdapters
from tinsmithd.sampler.unread import Output, Unread


@dataclass(frozen=True)
class AdmissionLimits:
    """Bounds; the names are those of the settings."""

    running_max: int
    waiting_max: int
    adapters_max: int
    fetches_max: int = 16


class Admission:
    """Admits requests to one engine and runs them. Lives on one event loop.

    Attributes:
        running, waiting: Requests that have a place, and that wait for one.
        prompt_tokens, sampled_tokens: So far, of requests begun and of all their samples.
    """

    def __init__(self, engine: SamplingEngine, limits: AdmissionLimits) -> None:
        self._engine = engine
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._slots = asyncio.Semaphore(limits.running_max)
        self.running = self.waiting = 0
        self.prompt_tokens = self.sampled_tokens = 0
        self._loaded = LoadedAdapters(
            engine,
            self._in_thread,
            adapters_max=limits.adapters_max,
            fetches_max=limits.fetches_max,
        )

    @property
    def adapters(self) -> int:
        """Number of adapters in memory, or on their way to it."""
        return len(self._loaded)

    @property
    def fetching(self) -> int:
        """Number of requests that wait for their adapter to come, and are in nobody's way."""
        return self._loaded.fetching

    def has(self, key: str) -> bool:
        """Whether an adapter is in memory."""
        return self._loaded.has(key)

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
        unread = Unread()
        making = asyncio.create_task(self._make(request, adapter, unread))
        try:
            async for output in unread.read():
                yield output
        finally:
            making.cancel()
            await asyncio.wait([making])

    async def _make(self, request: SampleRequest, adapter: Adapter | None, unread: Unread) -> None:
        try:
            async with self._slot(adapter):
                await self._generate(request, adapter, unread)
        except Exception as error:
            unread.end(error)
        else:
            unread.end()

    async def _generate(
        self, request: SampleRequest, adapter: Adapter | None, unread: Unread
    ) -> None:
        generation = await self._start(request, adapter)
        self.prompt_tokens += len(request.prompt)
        try:
            if generation.prompt_scores is not None:
                unread.put(Output(prompt_scores=generation.prompt_scores))
            while not generation.finished:
                tokens = await self._in_thread(generation.step)
                self.sampled_tokens += sum(len(some.tokens) for some in tokens)
                unread.put(Output(tokens=tokens))
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

    # --- slots --------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _slot(self, adapter: Adapter | None) -> AsyncIterator[None]:
        """Hold a place among the running, and the adapter in memory.

        No place is held while an adapter is fetched: that may take as long as it likes.
        """
        while True:
            async with self._fetched(adapter) as state:
                await self._take_slot()
                try:
                    if adapter is None or await self._loaded.use(adapter, state):
                        break
                except BaseException:
                    self._give_slot()
                    raise
                self._give_slot()  # it was evicted meanwhile
        del state  # the engine has its own
        try:
            yield
        finally:
            if adapter is not None:
                self._loaded.leave(adapter)
            self._give_slot()

    @contextlib.asynccontextmanager
    async def _fetched(self, adapter: Adapter | None) -> AsyncIterator[ModelState | None]:
        """See `LoadedAdapters.fetched`; refuses where too many wait for theirs."""
        if adapter is None:
            yield None
            return
        most = self._limits.running_max + self._limits.waiting_max
        if self.fetching >= most and not self._loaded.has(adapter.key):
            raise self._full(self.fetching)
        async with self._loaded.fetched(adapter) as state:
            yield state

    async def _take_slot(self) -> None:
        if self._slots.locked() and self.waiting >= self._limits.waiting_max:
            raise self._full(self.waiting)
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1

    def _give_slot(self) -> None:
        self.running -= 1
        self._slots.release()

    def _full(self, waiting: int) -> ResourceExhausted:
        return ResourceExhausted(
            f"waiting_max = {self._limits.waiting_max} calls wait already",
            Reason.QUEUE_FULL,
            retry_after_s=1.0,
            metadata={"limit": "waiting_max", "value": str(waiting + 1)},
        )


def _close_started(future: "Future[Generation]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
