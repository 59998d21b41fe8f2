"""The Sampler's admission: fairness, bounds, cancelling. The engine is a recorder."""

import asyncio
from collections import Counter

import numpy as np
import pytest

from sampler_recorder import Recorder, adapter, drain, new_admission, request
from tinsmithd.domain import StopReason
from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.sampler.admission import Admission
from waiting import until


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
