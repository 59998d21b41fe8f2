"""The Sampler's admission: fairness, bounds, cancelling, adapters. The engine is a recorder."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing

import numpy as np
import pytest

from tinsmithd.domain import (
    DEFAULT_OWNER,
    BaseModelInfo,
    LoraConfig,
    ModelState,
    Output,
    SampledTokens,
    SampleRequest,
    SamplingParams,
    StopReason,
)
from tinsmithd.errors import FailedPrecondition, NotFound, Reason, ResourceExhausted
from tinsmithd.sampler.admission import Admission
from tinsmithd.sampler.engines.interface import EngineStats, EngineTraits
from tinsmithd.sampler.loaded_adapters import Adapter
from tinsmithd.sampler.places import PlaceLimits

ADAPTER_BYTES = 4000
STATE = ModelState(LoraConfig(), {"w": np.zeros(ADAPTER_BYTES // 4, np.float32)}, {}, 0, {})


class Recorder:
    """An engine that writes down what it is asked; a request's name is its seed."""

    info = BaseModelInfo("tiny", "x", 8, 64, "float32", 1, 1)
    traits = EngineTraits("recorder", batch_invariant=True)

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.started: list[int] = []
        self.closed: list[int] = []
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.held: set[str] = set()
        self.used: Counter[str] = Counter()
        self.may_step = asyncio.Event()
        self.may_step.set()
        self.may_load = asyncio.Event()
        self.may_load.set()

    async def tokenizer_files(self) -> dict[str, bytes]:
        return {"a": b"b"}

    async def load_adapter(self, key: str, state: ModelState) -> None:
        self.loads.append(key)
        await self.may_load.wait()
        self.held.add(key)

    async def unload_adapter(self, key: str) -> None:
        assert not self.used[key], "it is in use"
        self.unloads.append(key)
        await asyncio.sleep(0)
        self.held.discard(key)

    async def generate(self, request: SampleRequest, adapter: str | None) -> AsyncIterator[Output]:
        """One token per step until `max_tokens`."""
        name = request.params.seed
        assert name is not None
        self.started.append(name)
        if adapter is not None:
            self.used[adapter] += 1
        try:
            for left in reversed(range(request.params.max_tokens)):
                await self.may_step.wait()
                await asyncio.sleep(0)
                assert adapter is None or adapter in self.held
                self.steps.append(name)
                reason = None if left else StopReason.LENGTH
                yield Output(tokens=[SampledTokens(0, [1], [0.0], reason)])
        finally:
            if adapter is not None:
                self.used[adapter] -= 1
            self.closed.append(name)

    def stats(self) -> EngineStats:
        return EngineStats()

    async def failed(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.may_step.set()


def new_admission(
    engine: Recorder,
    running: int,
    waiting: int,
    adapters: int,
    *,
    fetches_max: int = 16,
    rows: int = 1000,
    tokens_max: int = 0,
    counted: bool = False,
) -> Admission:
    return Admission(
        engine,
        PlaceLimits(running, waiting, rows, tokens_max),
        adapters_max=adapters if counted else 1000,
        adapters_bytes_max=1 << 40 if counted else adapters * ADAPTER_BYTES,
        fetches_max=fetches_max,
    )


@pytest.fixture
async def engine() -> Recorder:
    """A fresh engine."""
    return Recorder()


@pytest.fixture
async def admission(engine: Recorder) -> AsyncIterator[Admission]:
    """Two run, one waits, two adapters."""
    admission = new_admission(engine, 2, 1, 2)
    yield admission
    await admission.close()


def request(name: int, max_tokens: int, samples: int = 1) -> SampleRequest:
    return SampleRequest(np.array([1]), samples, SamplingParams(max_tokens, seed=name))


async def drain(
    admission: Admission,
    name: int,
    max_tokens: int,
    adapter: Adapter | None = None,
    *,
    owner: str = DEFAULT_OWNER,
    samples: int = 1,
) -> int:
    """Number of tokens that arrived."""
    asked = request(name, max_tokens, samples)
    async with aclosing(admission.run(asked, adapter, owner)) as outputs:  # type: ignore[type-var]
        return sum([len(made.tokens) async for output in outputs for made in output.tokens])


async def until(condition: object) -> None:
    """Let everything else run until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.001)


def adapter(
    key: str, fetched: list[str] | None = None, gate: asyncio.Event | None = None
) -> Adapter:
    async def fetch() -> ModelState:
        if fetched is not None:
            fetched.append(key)
        if gate is not None:
            await gate.wait()
        return STATE

    return Adapter(key, fetch)


async def test_too_many_waiting_are_refused_and_nothing_is_lost(
    admission: Admission, engine: Recorder
) -> None:
    """Two run, one waits, the fourth hears QUEUE_FULL; the others are served, then it can be."""
    engine.may_step.clear()
    tasks = [asyncio.create_task(drain(admission, name, 2)) for name in (1, 2, 3)]
    await until(lambda: admission.waiting == 1)
    with pytest.raises(ResourceExhausted) as refused:
        await drain(admission, 4, 2)
    assert refused.value.reason is Reason.QUEUE_FULL
    assert refused.value.retry_after_s
    engine.may_step.set()
    assert await asyncio.gather(*tasks) == [2, 2, 2]
    assert await drain(admission, 4, 2) == 2


async def test_a_waiting_request_that_is_cancelled_leaves_its_place(
    admission: Admission, engine: Recorder
) -> None:
    """Its place in the queue is free at once, and it never starts."""
    engine.may_step.clear()
    running = [asyncio.create_task(drain(admission, name, 2)) for name in (1, 2)]
    gone = asyncio.create_task(drain(admission, 3, 2))
    await until(lambda: admission.waiting == 1)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    later = asyncio.create_task(drain(admission, 4, 2))
    await until(lambda: admission.waiting == 1)
    engine.may_step.set()
    await asyncio.gather(*running, later)
    assert 3 not in engine.steps


async def test_a_cancelled_request_ends_with_the_step_it_is_in(
    admission: Admission, engine: Recorder
) -> None:
    """At most one more step, its caches are freed, and its slot serves another."""
    task = asyncio.create_task(drain(admission, 1, 1_000_000))
    await until(lambda: len(engine.steps) > 3)
    engine.may_step.clear()
    await asyncio.sleep(0.01)
    before = len(engine.steps)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    engine.may_step.set()
    await until(lambda: engine.closed == [1])
    assert len(engine.steps) <= before + 1
    assert await asyncio.gather(drain(admission, 2, 2), drain(admission, 3, 2)) == [2, 2]


async def test_a_compute_slot_is_never_held_while_waiting_for_a_reader(
    admission: Admission, engine: Recorder
) -> None:
    """Both slots are taken by requests whose readers take one token and no more: they are computed
    to their end, others are served, and a reader that comes late still gets everything."""
    late = [admission.run(request(name, 50), None) for name in (1, 2)]
    firsts = [await anext(outputs) for outputs in late]
    await until(lambda: admission.running == 0)
    assert sorted(engine.closed) == [1, 2]
    assert await asyncio.gather(*(drain(admission, name, 2) for name in (3, 4))) == [2, 2]
    for first, outputs in zip(firsts, late, strict=True):
        made = [*first.tokens, *[some async for output in outputs for some in output.tokens]]
        assert sum(len(some.tokens) for some in made) == 50
        assert [some.stop_reason for some in made][-1] is StopReason.LENGTH
        assert [some.stop_reason for some in made][:-1] == [None] * (len(made) - 1)


async def test_one_load_serves_all_who_want_an_adapter(
    admission: Admission, engine: Recorder
) -> None:
    """Two at once and one later fetch and load it once, even when the first goes away."""
    fetched: list[str] = []
    gate = asyncio.Event()
    wanted = adapter("a", fetched, gate)
    first = asyncio.create_task(drain(admission, 1, 2, wanted))
    second = asyncio.create_task(drain(admission, 2, 2, wanted))
    await until(lambda: fetched)
    first.cancel()
    gate.set()
    assert await second == 2
    assert await drain(admission, 3, 2, wanted) == 2
    assert fetched == engine.loads == ["a"]


@pytest.mark.parametrize("counted", [False, True])
async def test_the_adapter_unused_longest_makes_room(engine: Recorder, counted: bool) -> None:
    """Two fit, by bytes or by number; using one keeps it."""
    admission = new_admission(engine, 2, 1, 2, counted=counted)
    for key in ("a", "b", "a", "c"):
        await drain(admission, 1, 1, adapter(key))
    assert engine.unloads == ["b"]
    assert engine.held == {"a", "c"}


async def test_loads_at_the_same_moment_evict_only_what_is_idle(engine: Recorder) -> None:
    """Many requests over more adapters than fit: none loses the one that it samples with."""
    admission = new_admission(engine, 4, 1000, 4)
    rng = np.random.default_rng(0)
    wanted = [adapter(f"a{key}") for key in rng.integers(0, 9, 400)]
    done = await asyncio.gather(*(drain(admission, i, 2, a) for i, a in enumerate(wanted)))
    assert done == [2] * len(wanted)
    assert len(engine.held) <= 4
    assert engine.held == set(admission.loaded._loaded)
    await admission.close()


async def test_loads_that_end_together_do_not_evict_the_same_adapter(engine: Recorder) -> None:
    """Two fetches that end at once each drop another idle adapter."""
    admission = new_admission(engine, 2, 8, 2)
    for key in ("a", "b"):
        await drain(admission, 1, 1, adapter(key))
    gate = asyncio.Event()
    tasks = [
        asyncio.create_task(drain(admission, 2, 1, adapter(key, None, gate))) for key in ("c", "d")
    ]
    await until(lambda: admission.adapters == 4)
    gate.set()
    assert await asyncio.gather(*tasks) == [1, 1]
    assert engine.held == {"c", "d"}
    assert sorted(engine.unloads) == ["a", "b"]
    await admission.close()


async def test_a_load_that_failed_is_tried_again(admission: Admission, engine: Recorder) -> None:
    """Also when everyone who waited for it had gone before it failed."""
    gate = asyncio.Event()

    async def fail() -> ModelState:
        await gate.wait()
        raise NotFound("no such checkpoint", Reason.CHECKPOINT_NOT_FOUND)

    bad = Adapter("a", fail)
    gone = asyncio.create_task(drain(admission, 1, 1, bad))
    await until(lambda: admission.adapters == 1)
    gone.cancel()
    await asyncio.sleep(0)
    gate.set()
    await until(gone.done)
    await asyncio.sleep(0.01)
    assert await drain(admission, 2, 1, adapter("a")) == 1
    with pytest.raises(NotFound):
        await drain(admission, 3, 1, Adapter("b", fail))
    assert await drain(admission, 4, 1, adapter("b")) == 1


async def test_no_slot_is_held_while_an_adapter_is_fetched(engine: Recorder) -> None:
    """With one slot: two adapters come at the same time, and others are served meanwhile."""
    admission = new_admission(engine, 1, 8, 2)
    await drain(admission, 1, 1, adapter("here"))
    fetched: list[str] = []
    gate = asyncio.Event()
    waiting = [
        asyncio.create_task(drain(admission, 2, 1, adapter(key, fetched, gate)))
        for key in ("a", "b")
    ]
    await until(lambda: len(fetched) == 2)
    assert await drain(admission, 3, 2) == 2
    assert await drain(admission, 4, 2, adapter("here")) == 2
    assert (admission.running, admission.waiting, admission.fetching) == (0, 0, 2)
    gate.set()
    assert await asyncio.gather(*waiting) == [1, 1]
    assert admission.fetching == 0
    await admission.close()


async def test_few_adapters_are_fetched_at_once(engine: Recorder) -> None:
    """A place is free again when its adapter is loaded, or when nobody wants it any more."""
    admission = new_admission(engine, 1, 8, 4, fetches_max=1)
    fetched: list[str] = []
    gate = asyncio.Event()
    gone = asyncio.create_task(drain(admission, 1, 1, adapter("a", fetched, gate)))
    later = asyncio.create_task(drain(admission, 2, 1, adapter("b", fetched, gate)))
    await until(lambda: admission.fetching == 2 and fetched)
    assert fetched == ["a"]
    gone.cancel()
    await until(lambda: fetched == ["a", "b"])
    gate.set()
    assert await later == 1
    assert await drain(admission, 3, 1, adapter("c", fetched)) == 1
    assert engine.loads == ["b", "c"]
    await admission.close()


async def test_a_call_whose_adapter_finds_no_room_waits_until_another_is_idle(
    engine: Recorder,
) -> None:
    """Room for one adapter, two in use one after the other; a third that is larger is refused."""
    admission = new_admission(engine, 8, 8, 1)
    engine.may_step.clear()
    first = asyncio.create_task(drain(admission, 1, 2, adapter("a")))
    await until(lambda: engine.started == [1])
    second = asyncio.create_task(drain(admission, 2, 2, adapter("b")))
    beside = asyncio.create_task(drain(admission, 3, 2, adapter("a")))
    await until(lambda: engine.started == [1, 3])
    await asyncio.sleep(0.01)
    assert (engine.loads, engine.unloads, admission.running) == (["a"], [], 3)
    engine.may_step.set()
    assert await asyncio.gather(first, second, beside) == [2, 2, 2]
    assert (engine.loads, engine.unloads) == (["a", "b"], ["a"])
    assert admission.loaded.nbytes == ADAPTER_BYTES
    large = ModelState(LoraConfig(), {"w": np.zeros(ADAPTER_BYTES, np.float32)}, {}, 0, {})

    async def fetch() -> ModelState:
        return large

    with pytest.raises(FailedPrecondition, match="adapters_bytes_max"):
        await drain(admission, 4, 2, Adapter("large", fetch))
    assert await drain(admission, 5, 2, adapter("b")) == 2
    await admission.close()


async def test_loading_an_adapter_stops_nobody(admission: Admission, engine: Recorder) -> None:
    """While one is loaded others are served."""
    engine.may_load.clear()
    loading = asyncio.create_task(drain(admission, 1, 2, adapter("a")))
    await until(lambda: engine.loads == ["a"])
    assert await drain(admission, 2, 20) == 20
    assert engine.started == [2]
    engine.may_load.set()
    assert await loading == 2


# --- owners ---------------------------------------------------------------------------------------


async def test_owners_get_places_for_the_same_tokens_however_they_cut_their_work(
    engine: Recorder,
) -> None:
    """One place: "a" asks with many calls of 8 tokens and one of 32, "b" with few of 32."""
    admission = new_admission(engine, 1, 1000, 1)
    engine.may_step.clear()
    blocker = asyncio.create_task(drain(admission, 0, 1))
    await until(lambda: admission.running == 1)
    sizes = dict.fromkeys(range(1, 81), 7) | dict.fromkeys(range(101, 121), 31)
    tasks = [
        asyncio.create_task(drain(admission, name, size, owner="a" if name < 100 else "b"))
        for name, size in sizes.items()
    ]
    await until(lambda: admission.waiting == len(tasks))
    engine.may_step.set()
    await asyncio.gather(blocker, *tasks)
    got = Counter[str]()
    for name in engine.started[1:-1]:
        got["a" if name < 100 else "b"] += sizes[name] + 1
        assert abs(got["a"] - got["b"]) <= 8 + 32
    await admission.close()


async def test_a_new_owner_need_not_wait_for_the_queue_of_another(engine: Recorder) -> None:
    """It is next but one, and is let in when the other one has filled the queue."""
    admission = new_admission(engine, 1, 4, 1)
    engine.may_step.clear()
    tasks = [asyncio.create_task(drain(admission, name, 5, owner="a")) for name in range(5)]
    await until(lambda: admission.waiting == 4)
    with pytest.raises(ResourceExhausted):
        await drain(admission, 9, 5, owner="a")
    tasks.append(asyncio.create_task(drain(admission, 10, 5, owner="b")))
    await until(lambda: admission.waiting == 5)
    engine.may_step.set()
    await asyncio.gather(*tasks)
    assert engine.started.index(10) <= 2
    await admission.close()


async def test_places_are_bounded_in_sequences_and_tokens_and_large_calls_get_theirs(
    engine: Recorder,
) -> None:
    """A call that is next waits for room, nobody overtakes it; alone, each has room."""
    for bounds in ({"rows": 6}, {"tokens_max": 25}):
        engine.started.clear()
        admission = new_admission(engine, 8, 8, 1, **bounds)
        engine.may_step.clear()
        calls = [(1, 2), (2, 2), (3, 9), (4, 2), (5, 2)]
        tasks = [
            asyncio.create_task(drain(admission, name, 4, samples=samples))
            for name, samples in calls
        ]
        await until(lambda: len(engine.started) == 2)
        await asyncio.sleep(0.01)
        assert (engine.started, admission.waiting) == ([1, 2], 3), bounds
        engine.may_step.set()
        assert await asyncio.gather(*tasks) == [4] * 5
        assert engine.started == [1, 2, 3, 4, 5]
        assert (admission.running, admission.waiting) == (0, 0)


async def test_cancelling_everywhere_loses_no_place(engine: Recorder) -> None:
    """Calls of two owners that come and go at random: all places are free in the end."""
    rng = np.random.default_rng(0)
    admission = new_admission(engine, 3, 1000, 2, rows=5, tokens_max=60)
    tasks = []
    for name in range(400):
        key = rng.integers(0, 4)
        wanted = None if key == 0 else adapter(f"a{key}")
        owner, samples = f"o{rng.integers(0, 2)}", int(rng.integers(1, 4))
        tasks.append(
            asyncio.create_task(drain(admission, name, 3, wanted, owner=owner, samples=samples))
        )
        for _ in range(int(rng.integers(0, 6))):
            await asyncio.sleep(0)
        if rng.random() < 0.5:
            tasks[int(rng.integers(0, len(tasks)))].cancel()
    made = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(each == 3 or isinstance(each, asyncio.CancelledError) for each in made)
    assert 3 in made
    assert (admission.running, admission.waiting, admission.fetching) == (0, 0, 0)
    assert (admission._places.sequences, admission._places.tokens) == (0, 0)
    assert sorted(engine.closed) == sorted(engine.started)
    assert await drain(admission, 1000, 3) == 3
    await admission.close()
