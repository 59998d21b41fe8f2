"""Who samples when: bounded, fair between owners; what the engine makes waits for its reader.

A call takes a place at the engine, which computes as it likes. None waits for its reader: what a
call makes is buffered (`Unread`), and its place is free once it is made. A call that is cancelled,
or whose deadline passes, leaves wherever it waits, and stops after the step that it is in.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tinsmithd import tracing
from tinsmithd.domain import DEFAULT_OWNER, BaseModelInfo, Output, SampleRequest
from tinsmithd.durations import Durations
from tinsmithd.sampler.engines.interface import EngineStats, EngineTraits, SamplingEngine
from tinsmithd.sampler.loaded_adapters import Adapter, Fetched, LoadedAdapters
from tinsmithd.sampler.places import NO_QUOTA, Demand, PlaceLimits, Places, Quota, full
from tinsmithd.sampler.unread import Unread
from tinsmithd.tenants import NO_TENANTS, TenantCounter, Tenants

MESSAGES_PER_S_MAX = 100
"""Messages that several streams give out in a second, together; see `Admission._pause_s`."""
PAUSE_S_MAX = 0.25


class Admission:
    """Admits requests to one engine and runs them. Lives on one event loop.

    Args:
        engine: Computes them.
        limits: Bounds of what is computed at once.
        adapters_max, adapters_bytes_max, fetches_max: See `LoadedAdapters`.
        tenants: Names tenants for metrics.

    Attributes:
        loaded: The adapters in the engine's memory.
        prompt_tokens, sampled_tokens: So far, of requests begun and of all their samples.
        prompt_tokens_of, sampled_tokens_of: The same by tenant, as far as metrics name them.
        first_tokens: How long requests took to their first new token.
    """

    def __init__(
        self,
        engine: SamplingEngine,
        limits: PlaceLimits,
        *,
        adapters_max: int,
        adapters_bytes_max: int,
        fetches_max: int = 16,
        tenants: Tenants = NO_TENANTS,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._places = Places(limits)
        self._streams = 0
        self.prompt_tokens = self.sampled_tokens = 0
        self.prompt_tokens_of = TenantCounter(tenants)
        self.sampled_tokens_of = TenantCounter(tenants)
        self.first_tokens = Durations()
        self.loaded = LoadedAdapters(
            engine,
            adapters_max=adapters_max,
            adapters_bytes_max=adapters_bytes_max,
            fetches_max=fetches_max,
        )

    @property
    def running(self) -> int:
        """Calls that have a place."""
        return self._places.running

    @property
    def waiting(self) -> int:
        """Calls that wait for a place."""
        return self._places.waiting

    @property
    def idle(self) -> bool:
        """True while nobody's call is computed or waits to be."""
        return not (self.running or self.waiting or self.fetching)

    @property
    def adapters(self) -> int:
        """Number of adapters in memory, or on their way to it."""
        return len(self.loaded)

    @property
    def fetching(self) -> int:
        """Number of requests that wait for their adapter to come, and are in nobody's way."""
        return self.loaded.fetching

    def has(self, key: str) -> bool:
        """Whether an adapter is in memory."""
        return self.loaded.has(key)

    @property
    def info(self) -> BaseModelInfo:
        """The base model."""
        return self._engine.info

    @property
    def traits(self) -> EngineTraits:
        """What the engine is."""
        return self._engine.traits

    def stats(self) -> EngineStats:
        """What the engine has in hand, and what it did."""
        return self._engine.stats()

    async def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files."""
        return await self._engine.tokenizer_files()

    async def failed(self) -> None:
        """Wait until the engine can compute nothing more; see `SamplingEngine.failed`."""
        await self._engine.failed()

    async def close(self) -> None:
        """End what is under way, and the engine."""
        await self._engine.close()

    async def run(
        self,
        request: SampleRequest,
        adapter: Adapter | None,
        owner: str = DEFAULT_OWNER,
        *,
        quota: Quota = NO_QUOTA,
        gather_s: float | None = None,
    ) -> AsyncIterator[Output]:
        """Run a request; closing the iterator early stops it.

        Args:
            request: Checked.
            adapter: None for the base model.
            owner: Whose share it is taken from.
            quota: What that one may have.
            gather_s: How long tokens may wait for the next output; None: see `_pause_s`.

        Raises:
            ResourceExhausted: Too many wait already (QUEUE_FULL), or the owner has as much as it
                may have (QUOTA_EXCEEDED).
        """
        unread = Unread()
        making = asyncio.create_task(self._make(request, adapter, owner, quota, unread))
        streams = gather_s is None
        self._streams += streams
        try:
            pause_s = self._pause_s if gather_s is None else lambda: gather_s
            async for output in unread.read(pause_s, first_pause_s=gather_s or 0.0):
                yield output
        finally:
            self._streams -= streams
            making.cancel()
            await asyncio.wait([making])

    def _pause_s(self) -> float:
        """How long a stream gathers tokens before its next message.

        A message costs some 0.3 ms whether it has one token or ten: a token of 16 sequences takes 4
        to compute. A stream that is alone gets every token at once, and each its first and last.
        """
        return min((self._streams - 1) / MESSAGES_PER_S_MAX, PAUSE_S_MAX)

    async def _make(
        self,
        request: SampleRequest,
        adapter: Adapter | None,
        owner: str,
        quota: Quota,
        unread: Unread,
    ) -> None:
        key = None if adapter is None else adapter.key
        timing = _Timing()
        clock = asyncio.get_running_loop().time
        begun_s, is_first = clock(), True
        try:
            with self._places.within(owner, quota, Demand.of(request)) as made:

                def take(output: Output) -> None:
                    nonlocal is_first
                    tokens = sum(len(some.tokens) for some in output.tokens)
                    if is_first and tokens:
                        is_first = False
                        self.first_tokens.add(clock() - begun_s)
                    self.sampled_tokens += tokens
                    self.sampled_tokens_of.add(owner, tokens)
                    made(tokens)
                    timing.made(tokens)
                    unread.put(output)

                async with self._place(request, adapter, owner):
                    timing.begins()
                    self.prompt_tokens += len(request.prompt)
                    self.prompt_tokens_of.add(owner, len(request.prompt))
                    await self._engine.generate(request, key, take)
        except Exception as error:
            unread.end(error)
        else:
            unread.end()
        finally:
            timing.ended(len(request.prompt))

    @contextlib.asynccontextmanager
    async def _place(
        self, request: SampleRequest, adapter: Adapter | None, owner: str
    ) -> AsyncIterator[None]:
        """Hold a place among the running, and the adapter in memory.

        No place is held while an adapter is fetched: that may take as long as it likes.
        """
        demand = Demand.of(request)
        while True:
            async with contextlib.AsyncExitStack() as fetched:
                found = await fetched.enter_async_context(self._fetched(adapter))
                async with self._places.hold(owner, demand):
                    if adapter is None:
                        yield
                        return
                    if await self.loaded.use(adapter, found):
                        try:
                            del found  # the engine has its own
                            await fetched.aclose()
                            yield
                        finally:
                            self.loaded.leave(adapter)
                        return
            # it was evicted meanwhile

    @contextlib.asynccontextmanager
    async def _fetched(self, adapter: Adapter | None) -> AsyncIterator[Fetched | None]:
        """See `LoadedAdapters.fetched`; refuses where too many wait for theirs."""
        if adapter is None:
            yield None
            return
        most = self._limits.running_max + self._limits.waiting_max
        if self.fetching >= most and not self.loaded.has(adapter.key):
            raise full(self._limits.waiting_max, self.fetching)
        async with self.loaded.fetched(adapter) as found:
            yield found


class _Timing:
    """What the time of one request went into, as spans; nothing where there are none."""

    def __init__(self) -> None:
        self._since_ns = tracing.now_ns()
        self._begun_ns = self._first_ns = 0
        self._tokens = 0

    def begins(self) -> None:
        """It has its place."""
        if self._since_ns:
            self._begun_ns = tracing.now_ns()

    def made(self, tokens: int) -> None:
        """It made so many tokens more."""
        if self._since_ns and tokens:
            self._first_ns = self._first_ns or tracing.now_ns()
            self._tokens += tokens

    def ended(self, prompt_tokens: int) -> None:
        """It is over, or was cancelled."""
        begun_ns, first_ns = self._begun_ns, self._first_ns
        tracing.interval("wait", self._since_ns, end_ns=begun_ns)
        tracing.interval("prefill", begun_ns, end_ns=first_ns, tokens=prompt_tokens)
        tracing.interval("decode", first_ns, tokens=self._tokens)
