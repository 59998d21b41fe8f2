"""The Sampler's admission: fairness, bounds, cancelling, adapters. The engine is a recorder."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import numpy as np
import pytest

from tinsmithd.domain import (
    BaseModelInfo,
    LoraConfig,
    ModelState,
    PromptScores,
    SampledTokens,
    SampleRequest,
    SamplingParams,
    StopReason,
)
from tinsmithd.errors import NotFound, Reason, ResourceExhausted
from tinsmithd.sampler.admission import Admission, AdmissionLimits
from tinsmithd.sampler.loaded_adapters import Adapter

STATE = ModelState(LoraConfig(), {}, {}, 0, {})


class Recorder:
    """An engine that writes down what it is asked; a request's name is its seed."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed: list[int] = []
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.held: set[str] = set()
        self.threads: set[int] = set()
        self.may_step = threading.Event()
        self.may_step.set()

    info = BaseModelInfo("tiny", "x", 8, 64, "float32", 1, 1)

    def tokenizer_files(self) -> dict[str, bytes]:
        return {"a": b"b"}

    def load_adapter(self, key: str, state: ModelState) -> None:
        self.loads.append(key)
        self.held.add(key)

    def unload_adapter(self, key: str) -> None:
        self.unloads.append(key)
        self.held.discard(key)

    def start(self, request: SampleRequest, adapter: str | None) -> "Recording":
        return Recording(self, request, adapter)


class Recording:
    """A request on its way: one token per step until `max_tokens`."""

    def __init__(self, engine: Recorder, request: SampleRequest, adapter: str | None) -> None:
        assert request.params.seed is not None
        self.engine, self.adapter = engine, adapter
        self.name, self.left = request.params.seed, request.params.max_tokens

    prompt_scores: PromptScores | None = None

    @property
    def finished(self) -> bool:
        return self.left == 0

    def step(self) -> Sequence[SampledTokens]:
        assert self.engine.may_step.wait(30)
        assert self.adapter is None or self.adapter in self.engine.held
        self.engine.threads.add(threading.get_ident())
        self.engine.steps.append(self.name)
        self.left -= 1
        reason = None if self.left else StopReason.LENGTH
        return [SampledTokens(0, [1], [0.0], reason)]

    def close(self) -> None:
        self.engine.closed.append(self.name)


@pytest.fixture
async def engine() -> Recorder:
    """A fresh engine."""
    return Recorder()


@pytest.fixture
async def admission(engine: Recorder) -> AsyncIterator[Admission]:
    """Two run, one waits, two adapters."""
    admission = Admission(engine, AdmissionLimits(2, 1, 2))
    yield admission
    engine.may_step.set()
    admission.close()


def request(name: int, max_tokens: int) -> SampleRequest:
    return SampleRequest(np.array([1]), 1, SamplingParams(max_tokens, seed=name))


async def drain(
    admission: Admission, name: int, max_tokens: int, adapter: Adapter | None = None
) -> int:
    """Number of tokens that arrived."""
    async with aclosing(admission.run(request(name, max_tokens), adapter)) as outputs:  # type: ignore[type-var]
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


async def test_running_requests_advance_at_the_same_pace(
    admission: Admission, engine: Recorder
) -> None:
    """A short request beside a long one is done long before it; one thread computes."""
    engine.may_step.clear()
    tasks = [asyncio.create_task(drain(admission, name, n)) for name, n in ((1, 50), (2, 5))]
    await asyncio.sleep(0.05)
    engine.may_step.set()
    assert await asyncio.gather(*tasks) == [50, 5]
    last_short = max(i for i, name in enumerate(engine.steps) if name == 2)
    assert engine.steps[: last_short + 1].count(1) <= 7
    assert len(engine.threads) == 1
    await until(lambda: sorted(engine.closed) == [1, 2])


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


async def test_the_adapter_unused_longest_makes_room(
    admission: Admission, engine: Recorder
) -> None:
    """Two fit; using one keeps it."""
    for key in ("a", "b", "a", "c"):
        await drain(admission, 1, 1, adapter(key))
    assert engine.unloads == ["b"]
    assert engine.held == {"a", "c"}


async def test_loads_at_the_same_moment_evict_only_what_is_idle(engine: Recorder) -> None:
    """Many requests over more adapters than fit: none loses the one that it samples with."""
    admission = Admission(engine, AdmissionLimits(4, 1000, 4))
    rng = np.random.default_rng(0)
    wanted = [adapter(f"a{key}") for key in rng.integers(0, 9, 400)]
    done = await asyncio.gather(*(drain(admission, i, 2, a) for i, a in enumerate(wanted)))
    assert done == [2] * len(wanted)
    assert len(engine.held) <= 4
    assert engine.held == set(admission._loaded._loaded)
    admission.close()


async def test_loads_that_end_together_do_not_evict_the_same_adapter(engine: Recorder) -> None:
    """Two fetches that end at once each drop another idle adapter."""
    admission = Admission(engine, AdmissionLimits(2, 8, 2))
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
    admission.close()


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
    admission = Admission(engine, AdmissionLimits(1, 8, 2))
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
    admission.close()


async def test_few_adapters_are_fetched_at_once(engine: Recorder) -> None:
    """A place is free again when its adapter is loaded, or when nobody wants it any more."""
    admission = Admission(engine, AdmissionLimits(1, 8, 4, 1))
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
    admission.close()
