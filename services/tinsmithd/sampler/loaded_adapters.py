"""Which adapters the engine holds: those used last, within a budget of bytes.

One that is in use stays. A call whose adapter finds no room waits for one to be idle.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tinsmithd.domain import ModelState
from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.sampler.engines.interface import SamplingEngine


@dataclass(frozen=True)
class Adapter:
    """An adapter that a request wants: its immutable key, and how to get it."""

    key: str
    fetch: Callable[[], Awaitable[ModelState]]


class LoadedAdapters:
    """The adapters in an engine's memory, and those on their way to it. Lives on one event loop.

    Args:
        engine: Holds them.
        adapters_max, adapters_bytes_max: Maximum number of them, and of their bytes as
            `state_bytes` counts.
        fetches_max: Maximum number that are fetched at the same time.

    Attributes:
        fetching: Number of requests that wait for their adapter to come.
        count, nbytes: Number and bytes of those in memory, or that room was made for.
    """

    def __init__(
        self,
        engine: SamplingEngine,
        *,
        adapters_max: int,
        adapters_bytes_max: int,
        fetches_max: int,
    ) -> None:
        self._engine = engine
        self._adapters_max = adapters_max
        self._bytes_max = adapters_bytes_max
        # In the order of their last use.
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._fetches: dict[str, _Fetch] = {}
        self._fetch_places = asyncio.Semaphore(fetches_max)
        self._making_room = asyncio.Lock()
        self._idle = asyncio.Event()
        """Set when an adapter was left, or is loaded, or could not be."""
        self.fetching = 0
        self.count = self.nbytes = 0

    def __len__(self) -> int:
        return len(self._loaded.keys() | self._fetches.keys())

    def has(self, key: str) -> bool:
        """Whether an adapter is in memory."""
        loaded = self._loaded.get(key)
        return loaded is not None and not _failed(loaded.loading)

    @contextlib.asynccontextmanager
    async def fetched(self, adapter: Adapter) -> AsyncIterator[ModelState | None]:
        """Have an adapter's state for the body of the `async with`; None where it is loaded."""
        if self.has(adapter.key):
            yield None
            return
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

    async def use(self, adapter: Adapter, state: ModelState | None) -> bool:
        """Keep an adapter in memory until `leave`, loading it first.

        Args:
            adapter: Which one.
            state: As `fetched` gave it.

        Returns:
            False where it is not in memory and its state is not given.
        """
        if not self.has(adapter.key):
            if state is None:
                return False
            self._begin_load(adapter.key, state)
        loaded = self._loaded[adapter.key]
        self._loaded.move_to_end(adapter.key)
        loaded.users += 1
        try:
            # One caller that goes away must not stop the loading for the others.
            await asyncio.shield(loaded.loading)
        except BaseException:
            self._leave(loaded)
            raise
        return True

    def leave(self, adapter: Adapter) -> None:
        """End a use: without another one the adapter may be unloaded."""
        self._leave(self._loaded[adapter.key])

    def _leave(self, loaded: "_Loaded") -> None:
        loaded.users -= 1
        self._idle.set()

    def _begin_load(self, key: str, state: ModelState) -> None:
        loaded = _Loaded(asyncio.create_task(self._load(key, state)), state_bytes(state))
        self._loaded[key] = loaded
        loaded.loading.add_done_callback(lambda _: self._end_load(key, loaded))

    def _end_load(self, key: str, loaded: "_Loaded") -> None:
        if _failed(loaded.loading) and self._loaded.get(key) is loaded:
            del self._loaded[key]
        self._idle.set()

    async def _load(self, key: str, state: ModelState) -> None:
        nbytes = state_bytes(state)
        if nbytes > self._bytes_max:
            text = f"the adapter has {nbytes} bytes, adapters_bytes_max is {self._bytes_max}"
            raise FailedPrecondition(text, Reason.INCOMPATIBLE_CHECKPOINT)
        await self._make_room(nbytes)
        try:
            await self._engine.load_adapter(key, state)
        except BaseException:
            self._give_room(nbytes)
            raise

    async def _make_room(self, nbytes: int) -> None:
        """Take `nbytes` of the room, once the adapters that were unused longest left so much.

        Those that ask come one after the other, so that none is overtaken for ever.
        """
        async with self._making_room:
            while self.count >= self._adapters_max or self.nbytes + nbytes > self._bytes_max:
                # Looked for anew each time: while one was unloaded, another may be in use again.
                idle = (k for k, a in self._loaded.items() if not a.users and a.loading.done())
                key = next(idle, None)
                if key is None:
                    self._idle.clear()
                    await self._idle.wait()
                    continue
                unloaded = self._loaded.pop(key)
                try:
                    await self._engine.unload_adapter(key)
                finally:
                    self._give_room(unloaded.nbytes)
            self.count += 1
            self.nbytes += nbytes

    def _give_room(self, nbytes: int) -> None:
        self.count -= 1
        self.nbytes -= nbytes


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
    nbytes: int
    users: int = 0


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def state_bytes(state: ModelState) -> int:
    """Bytes of an adapter's weights, float32: what the budget counts, whatever an engine makes."""
    return sum(array.nbytes for array in state.weights.values())
