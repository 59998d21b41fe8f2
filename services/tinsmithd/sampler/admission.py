"""Who samples when: bounded, fair between requests, one compute thread.

The engine's thread takes one step of one request after the other, first come first served. A
request hands in its next step only when the last one is done, so all running requests advance at
the same pace and a cancelled one stops with the step it is in. None waits for its reader: what a
request makes is buffered (`Unread`), and its slot is free once it is made.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tinsmithd.domain import BaseModelInfo, ModelState, SampleRequest
from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.sampler.engines.interface import Generation, SamplingEngine
from tinsmithd.sampler.unread import Output, Unread


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds; the names are those of the settings."""

    running_max: int
    waiting_max: int
    adapters_max: int
    fetches_max: int = 16


@dataclass(frozen=True)
class Adapter:
    """An adapter that a request wants: its immutable key, and how to get it."""

    key: str
    fetch: Callable[[], Awaitable[ModelState]]


class SamplerScheduler:
    """Runs requests on one engine. Lives on one event loop.

    Attributes:
        running, waiting: Requests that have a place, and that wait for one.
        fetching: Requests that wait for their adapter to come, and are in nobody's way.
        prompt_tokens, sampled_tokens: So far, of requests begun and of all their samples.
    """

    def __init__(self, engine: SamplingEngine, limits: SchedulerLimits) -> None:
        self._engine = engine
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._slots = asyncio.Semaphore(limits.running_max)
        self.running = self.waiting = self.fetching = 0
        self.prompt_tokens = self.sampled_tokens = 0
        self._adapters: OrderedDict[str, _Loaded] = OrderedDict()
        self._fetches: dict[str, _Fetch] = {}
        self._fetch_places = asyncio.Semaphore(limits.fetches_max)

    @property
    def adapters(self) -> int:
        """Adapters in memory, or on their way to it."""
        return len(self._adapters.keys() | self._fetches.keys())

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
                    if await self._use(adapter, state):
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
                self._adapters[adapter.key].users -= 1
            self._give_slot()

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

    # --- adapters -----------------------------------------------------------------------------

    def has(self, key: str) -> bool:
        """Whether an adapter is in memory."""
        loaded = self._adapters.get(key)
        return loaded is not None and not _failed(loaded.loading)

    @contextlib.asynccontextmanager
    async def _fetched(self, adapter: Adapter | None) -> AsyncIterator[ModelState | None]:
        """Have an adapter's state for the body of the `async with`; None where it is loaded."""
        if adapter is None or self.has(adapter.key):
            yield None
            return
        if self.fetching >= self._limits.running_max + self._limits.waiting_max:
            raise self._full(self.fetching)
        fetch = self._fetches.get(adapter.key)
        if fetch is None or _failed(fetch.task):
            fetch = self._fetches[adapter.key] = _Fetch(adapter, self._fetch_places)
        fetch.users += 1
        try:
            self.fetching += 1
            try:
                # One caller that goes away must not stop the fetching for the others.
                state = await asyncio.shield(fetch.task)
            finally:
                self.fetching -= 1
            yield state
        finally:
            fetch.users -= 1
            if not fetch.users:
                fetch.end()
                if self._fetches.get(adapter.key) is fetch:
                    del self._fetches[adapter.key]

    async def _use(self, adapter: Adapter | None, state: ModelState | None) -> bool:
        """Count as a user of an adapter in memory, loading it first; False without its state."""
        if adapter is None:
            return True
        if not self.has(adapter.key):
            if state is None:
                return False
            loading = asyncio.create_task(self._load(adapter.key, state))
            self._adapters[adapter.key] = _Loaded(loading)
        loaded = self._adapters[adapter.key]
        self._adapters.move_to_end(adapter.key)
        loaded.users += 1
        try:
            # One caller that goes away must not stop the loading for the others.
            await asyncio.shield(loaded.loading)
        except BaseException:
            loaded.users -= 1
            if _failed(loaded.loading) and self._adapters.get(adapter.key) is loaded:
                del self._adapters[adapter.key]
            raise
        return True

    async def _load(self, key: str, state: ModelState) -> None:
        await self._make_room()
        await self._in_thread(self._engine.load_adapter, key, state)

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


class _Fetch:
    """An adapter on its way, or here and not loaded yet."""

    def __init__(self, adapter: Adapter, places: asyncio.Semaphore) -> None:
        self.users = 0
        self._places = places
        self._has_place = False
        self.task = asyncio.create_task(self._run(adapter))

    async def _run(self, adapter: Adapter) -> ModelState:
        await self._places.acquire()
        self._has_place = True
        return await adapter.fetch()

    def end(self) -> None:
        """Nobody wants it any more, or it is loaded."""
        self.task.cancel()
        self.task.add_done_callback(self._give_place)

    def _give_place(self, task: "asyncio.Task[ModelState]") -> None:
        if self._has_place:
            self._places.release()
        if not task.cancelled():
            task.exception()  # whoever wanted it is gone, or heard of it


@dataclass
class _Loaded:
    loading: asyncio.Task[None]
    users: int = 0


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _close_started(future: "Future[Generation]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
