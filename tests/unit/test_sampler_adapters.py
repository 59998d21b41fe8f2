"""The adapters that a Sampler has in memory: loads, budgets, waits. The engine is a recorder."""

import asyncio

import numpy as np
import pytest

from sampler_recorder import ADAPTER_BYTES, STATE, Recorder, adapter, drain, new_admission
from tinsmithd.domain import LoraConfig, ModelState
from tinsmithd.errors import FailedPrecondition, NotFound, Reason, Unavailable
from tinsmithd.sampler.admission import Admission
from tinsmithd.sampler.loaded_adapters import Adapter, Fetched
from waiting import until


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

    async def fail() -> Fetched:
        await gate.wait()
        raise NotFound("no such checkpoint", Reason.CHECKPOINT_NOT_FOUND)

    bad = Adapter("a", fail)
    gone = asyncio.create_task(drain(admission, 1, 1, bad))
    await until(lambda: admission.adapters == 1)
    gone.cancel()
    await asyncio.sleep(0)
    gate.set()
    await until(gone.done)
    await until(lambda: admission.adapters == 0)
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

    async def fetch() -> Fetched:
        return Fetched(large)

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


# --- adapters whose files are not proven yet ------------------------------------------------------


def unproven(key: str) -> tuple[Adapter, "asyncio.Future[None]"]:
    """One whose files are verified while it is loaded."""
    proven = asyncio.get_running_loop().create_future()

    async def fetch() -> Fetched:
        return Fetched(STATE, proven)

    return Adapter(key, fetch), proven


def damaged() -> Unavailable:
    return Unavailable("other files", Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=0.1)


@pytest.mark.parametrize("ahead", [False, True])
async def test_nobody_samples_with_an_adapter_before_its_files_are_proven(
    engine: Recorder, ahead: bool
) -> None:
    admission = new_admission(engine, 8, 8, 8)
    wanted, proven = unproven("a")
    bringing = asyncio.create_task(admission.loaded.bring_ahead(wanted)) if ahead else None
    await asyncio.sleep(0.01)
    first = asyncio.create_task(drain(admission, 1, 2, wanted))
    await until(lambda: engine.held == {"a"})
    await asyncio.sleep(0.01)
    assert engine.started == []
    proven.set_result(None)
    assert await first == 2
    assert bringing is None or await bringing
    await admission.close()


@pytest.mark.parametrize("ahead", [False, True])
async def test_files_that_are_others_are_as_if_nobody_had_them(
    engine: Recorder, ahead: bool
) -> None:
    """Whoever waits is told to ask again, and nothing is left of them."""
    admission = new_admission(engine, 8, 8, 8)
    wanted, proven = unproven("a")
    bringing = asyncio.create_task(admission.loaded.bring_ahead(wanted)) if ahead else None
    await asyncio.sleep(0.01)
    first = asyncio.create_task(drain(admission, 1, 2, wanted))
    await until(lambda: engine.held == {"a"})
    proven.set_exception(damaged())
    for waiting in (first, bringing):
        if waiting is not None:
            with pytest.raises(Unavailable):
                await waiting
    assert engine.started == []
    assert engine.held == set()
    assert admission.loaded.nbytes == admission.loaded.count == 0
    assert await drain(admission, 2, 2, adapter("a")) == 2
    await admission.close()


async def test_what_cannot_be_loaded_of_files_that_are_others_is_no_fault_of_the_adapter(
    admission: Admission, engine: Recorder
) -> None:
    """Its own fault is what the engine says of files that are proven."""
    engine.misfits.add("bad")
    for proof, expected in ((damaged(), Unavailable), (None, FailedPrecondition)):
        wanted, proven = unproven("bad")
        waiting = asyncio.create_task(drain(admission, 1, 2, wanted))
        await until(lambda: "bad" in engine.loads)
        await asyncio.sleep(0.01)
        if proof is None:
            proven.set_result(None)
        else:
            proven.set_exception(proof)
        with pytest.raises(expected):
            await waiting
        engine.loads.clear()


# --- adapters that nobody has asked for yet -------------------------------------------------------


async def test_an_adapter_that_was_brought_ahead_is_there_when_a_call_comes(
    engine: Recorder,
) -> None:
    """A call that comes while it is fetched or loaded waits for that, and does neither again."""
    admission = new_admission(engine, 8, 8, 8)
    fetched: list[str] = []
    gate = asyncio.Event()
    engine.may_load.clear()
    wanted = adapter("a", fetched, gate)
    ahead = asyncio.create_task(admission.loaded.bring_ahead(wanted))
    await until(lambda: fetched == ["a"])
    early = asyncio.create_task(drain(admission, 1, 2, wanted))
    gate.set()
    await until(lambda: engine.loads == ["a"])
    late = asyncio.create_task(drain(admission, 2, 2, wanted))
    await asyncio.sleep(0.01)
    engine.may_load.set()
    assert await asyncio.gather(early, late) == [2, 2]
    await ahead
    assert (fetched, engine.loads) == (["a"], ["a"])
    assert await admission.loaded.bring_ahead(adapter("b", fetched))
    assert not await admission.loaded.bring_ahead(adapter("b", fetched))
    assert await drain(admission, 3, 2, adapter("b", fetched)) == 2
    assert (fetched, engine.loads) == (["a", "b"], ["a", "b"])
    assert admission.loaded.ahead_used >= 1
    await admission.close()


@pytest.mark.parametrize("counted", [False, True])
async def test_whoever_saves_and_never_samples_moves_a_quarter_at_most(
    engine: Recorder, counted: bool
) -> None:
    """Of what others have idle in memory; what came ahead leaves for what comes ahead."""
    admission = new_admission(engine, 8, 8, 8, counted=counted)
    for name in range(8):
        await drain(admission, name, 1, adapter(f"used-{name}"))
    for number in range(20):
        assert await admission.loaded.bring_ahead(adapter(f"ahead-{number}"))
    assert engine.held == {f"used-{n}" for n in range(2, 8)} | {"ahead-18", "ahead-19"}
    # One of those that a call asks for counts as asked for from then on.
    await drain(admission, 9, 1, adapter("ahead-19"))
    assert await admission.loaded.bring_ahead(adapter("ahead-20"))
    assert "ahead-18" in engine.held
    await admission.close()


async def test_nothing_that_is_in_use_or_waited_for_gives_way_to_what_comes_ahead(
    engine: Recorder,
) -> None:
    """It finds no room, and neither waits for some nor takes it from a call that does."""
    admission = new_admission(engine, 8, 8, 4)
    engine.may_step.clear()
    using = [asyncio.create_task(drain(admission, n, 2, adapter(f"used-{n}"))) for n in range(4)]
    await until(lambda: len(engine.started) == 4)
    assert not await admission.loaded.bring_ahead(adapter("ahead"))
    waiting = asyncio.create_task(drain(admission, 9, 2, adapter("wanted")))
    await asyncio.sleep(0.01)
    assert not await admission.loaded.bring_ahead(adapter("ahead"))
    assert engine.unloads == []
    engine.may_step.set()
    assert await asyncio.gather(*using, waiting) == [2] * 5
    assert "ahead" not in engine.loads
    large = ModelState(LoraConfig(), {"w": np.zeros(ADAPTER_BYTES, np.float32)}, {}, 0, {})

    async def fetch() -> Fetched:
        return Fetched(large)

    assert not await admission.loaded.bring_ahead(Adapter("large", fetch))
    await admission.close()


async def test_what_cannot_be_brought_ahead_is_fetched_when_a_call_asks(engine: Recorder) -> None:
    admission = new_admission(engine, 8, 8, 8)

    async def gone() -> Fetched:
        raise NotFound("gone", Reason.CHECKPOINT_NOT_FOUND)

    with pytest.raises(NotFound):
        await admission.loaded.bring_ahead(Adapter("a", gone))
    assert await drain(admission, 1, 2, adapter("a")) == 2
    assert len(admission.loaded) == 1
    await admission.close()
