"""Which adapters the engine holds: those used last, within a budget of bytes.

One that is in use stays. A call whose adapter finds no room waits for one to be idle. Adapters that
no call has asked for yet may be brought in ahead. They take the place of idle ones as others do,
but all of them together have a share of the room: whoever saves and never samples, however much,
moves nobody else's beyond that.
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

AHEAD_SHARE = 0.25
"""Share of the room for adapters that were brought in ahead, until a call asks for them; there is
always room for one, if it is no larger than that."""


@dataclass(frozen=True)
class Fetched:
    """The state of an adapter.

    Attributes:
        state: As its files say.
        proven: Ends once they are seen to be the files that were wanted, and raises Unavailable
            where they are not; None: they are. Until then it may be loaded, but not used.
    """

    state: ModelState
    proven: asyncio.Future[None] | None = None

    async def are_proven(self) -> None:
        """Wait until its files are; whoever does not wait any more ends nothing."""
        if self.proven is not None:
            await asyncio.shield(self.proven)


@dataclass(frozen=True)
class Adapter:
    """An adapter that a request wants: its immutable key, and how to get it."""

    key: str
    fetch: Callable[[], Awaitable[Fetched]]


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
        ahead, ahead_used: How many were brought in ahead so far; how many of them a call used.
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
        self.ahead = self.ahead_used = 0

    def __len__(self) -> int:
        return len(self._loaded.keys() | self._fetches.keys())

    def has(self, key: str) -> bool:
        """Whether an adapter is in memory."""
        loaded = self._loaded.get(key)
        return loaded is not None and not _failed(loaded.loading)

    @contextlib.asynccontextmanager
    async def fetched(self, adapter: Adapter) -> AsyncIterator[Fetched | None]:
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
                fetched = await asyncio.shield(fetch.task)
            finally:
                self.fetching -= 1
            yield fetched
        finally:
            fetch.users -= 1
            if not fetch.users:
                fetch.end()
                if self._fetches.get(adapter.key) is fetch:
                    del self._fetches[adapter.key]

    async def use(self, adapter: Adapter, fetched: Fetched | None) -> bool:
        """Keep an adapter in memory until `leave`, loading it first.

        Args:
            adapter: Which one.
            fetched: As `fetched` gave it.

        Returns:
            False where it is not in memory and its state is not given.
        """
        if not self.has(adapter.key):
            if fetched is None:
                return False
            self._begin_load(adapter.key, fetched)
        loaded = self._loaded[adapter.key]
        self._loaded.move_to_end(adapter.key)
        loaded.users += 1
        self.ahead_used += loaded.ahead
        loaded.ahead = False
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

    async def bring_ahead(self, adapter: Adapter) -> bool:
        """Fetch and load an adapter that no call has asked for; it waits for no other one.

        Returns:
            False where it was there, or on its way, or there is no room for it.

        Raises:
            TinsmithError: It cannot be fetched or loaded.
        """
        if self.has(adapter.key) or adapter.key in self._fetches:
            return False
        async with self.fetched(adapter) as fetched:
            if fetched is None or self.has(adapter.key):
                return False  # a call came for it meanwhile
            nbytes = state_bytes(fetched.state)
            if not await self._make_room_ahead(nbytes):
                return False
            if self.has(adapter.key):
                self._give_room(nbytes)
                return False
            loading = asyncio.create_task(self._put_in(adapter.key, fetched, nbytes))
            self._keep(adapter.key, _Loaded(loading, nbytes, ahead=True))
        self.ahead += 1
        await asyncio.shield(loading)
        return True

    def _begin_load(self, key: str, fetched: Fetched) -> None:
        loading = asyncio.create_task(self._load(key, fetched))
        self._keep(key, _Loaded(loading, state_bytes(fetched.state)))

    def _keep(self, key: str, loaded: "_Loaded") -> None:
        self._loaded[key] = loaded
        loaded.loading.add_done_callback(lambda _: self._end_load(key, loaded))

    def _end_load(self, key: str, loaded: "_Loaded") -> None:
        if _failed(loaded.loading) and self._loaded.get(key) is loaded:
            del self._loaded[key]
        self._idle.set()

    async def _load(self, key: str, fetched: Fetched) -> None:
        nbytes = state_bytes(fetched.state)
        if nbytes > self._bytes_max:
            text = f"the adapter has {nbytes} bytes, adapters_bytes_max is {self._bytes_max}"
            raise FailedPrecondition(text, Reason.INCOMPATIBLE_CHECKPOINT)
        await self._make_room(nbytes)
        await self._put_in(key, fetched, nbytes)

    async def _put_in(self, key: str, fetched: Fetched, nbytes: int) -> None:
        """Load an adapter into room that was taken for it. Nobody uses it before this ends."""
        try:
            await self._load_proven(key, fetched)
        except BaseException:
            self._give_room(nbytes)
            raise

    async def _load_proven(self, key: str, fetched: Fetched) -> None:
        try:
            await self._engine.load_adapter(key, fetched.state)
        except Exception:
            await fetched.are_proven()  # files that are others may be to blame
            raise
        try:
            await fetched.are_proven()
        except BaseException:
            await self._engine.unload_adapter(key)
            raise

    async def _make_room(self, nbytes: int) -> None:
        """Take `nbytes` of the room, once the adapters that were unused longest left so much.

        Those that ask come one after the other, so that none is overtaken for ever.
        """
        async with self._making_room:
            while not self._has_room(nbytes):
                if not await self._unload_idlest():
                    self._idle.clear()
                    await self._idle.wait()
            self._take_room(nbytes)

    async def _make_room_ahead(self, nbytes: int) -> bool:
        """Take `nbytes` of the room for what no call needs yet, if that is to be had now."""
        if nbytes > AHEAD_SHARE * self._bytes_max or self._making_room.locked():
            return False
        async with self._making_room:
            while not self._has_room_ahead(nbytes):
                if not await self._unload_idlest(ahead=True):
                    return False
            while not self._has_room(nbytes):
                if not await self._unload_idlest():
                    return False
            self._take_room(nbytes)
            return True

    def _has_room(self, nbytes: int) -> bool:
        return self.count < self._adapters_max and self.nbytes + nbytes <= self._bytes_max

    def _has_room_ahead(self, nbytes: int) -> bool:
        sizes = [loaded.nbytes for loaded in self._loaded.values() if loaded.ahead]
        count_max = max(1, int(AHEAD_SHARE * self._adapters_max))
        return len(sizes) < count_max and sum(sizes) + nbytes <= AHEAD_SHARE * self._bytes_max

    async def _unload_idlest(self, *, ahead: bool = False) -> bool:
        """Drop the adapter that was unused longest, of all or of those brought ahead, if any."""
        # Looked for anew each time: while one was unloaded, another may be in use again.
        idle = (k for k, a in self._loaded.items() if a.is_idle and a.ahead >= ahead)
        key = next(idle, None)
        if key is None:
            return False
        unloaded = self._loaded.pop(key)
        try:
            await self._engine.unload_adapter(key)
        finally:
            self._give_room(unloaded.nbytes)
        return True

    def _take_room(self, nbytes: int) -> None:
        self.count += 1
        self.nbytes += nbytes

    def _give_room(self, nbytes: int) -> None:
        self.count -= 1
        self.nbytes -= nbytes
        self._idle.set()


class _Fetch:
    """An adapter on its way, or here and not loaded yet."""

    def __init__(self, adapter: Adapter, places: asyncio.Semaphore) -> None:
        self.users = 0
        self._places = places
        self._has_place = False
        self.task = asyncio.create_task(self._run(adapter))

    async def _run(self, adapter: Adapter) -> Fetched:
        await self._places.acquire()
        self._has_place = True
        return await adapter.fetch()

    def end(self) -> None:
        """Nobody wants it any more, or it is loaded."""
        self.task.cancel()
        self.task.add_done_callback(self._give_place)

    def _give_place(self, task: "asyncio.Task[Fetched]") -> None:
        if self._has_place:
            self._places.release()
        if not task.cancelled():
            task.exception()  # whoever wanted it is gone, or heard of it


@dataclass
class _Loaded:
    loading: asyncio.Task[None]
    nbytes: int
    users: int = 0
    ahead: bool = False

    @property
    def is_idle(self) -> bool:
        return not self.users and self.loading.done()


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def state_bytes(state: ModelState) -> int:
    """Bytes of an adapter's weights, float32: what the budget counts, whatever an engine makes."""
    return sum(array.nbytes for array in state.weights.values())
