"""What the embedded engine does beside its numbers: order, room, cancelling, failures, caches."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
import torch

from sampling_engines import drained, outputs_of
from tinsmithd.domain import LoraConfig, ModelState, Output, SampleRequest, SamplingParams
from tinsmithd.errors import (
    FailedPrecondition,
    InvalidArgument,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from tinsmithd.modeling.base import load_base
from tinsmithd.sampler.engines.stopping import StopCheck
from tinsmithd.sampler.engines.transformers.engine import (
    TOLD_AT_ONCE,
    WOKEN_AT_ONCE,
    EngineLimits,
    TransformersEngine,
    _Bell,
    _Stream,
)
from tinsmithd.sampler.engines.transformers.jobs import Job, Made
from tinsmithd.sampler.engines.transformers.kv import KvCache
from tinsmithd.trainer.engines.reference import ReferenceEngine
from waiting import until

torch.set_num_threads(1)
PROMPT = np.arange(10, 18)


@pytest.fixture(scope="module")
def state(tiny_model: Path) -> ModelState:
    """An adapter that changes nothing yet."""
    trainer = ReferenceEngine(load_base(str(tiny_model), dtype="float32", on_progress=print))
    trainer.create_model("m", LoraConfig(rank=4, seed=3))
    return trainer.export_state("m", optimizer=False)


def new_engine(folder: Path, **limits: int) -> TransformersEngine:
    base = load_base(str(folder), dtype="float32", on_progress=lambda _: None)
    return TransformersEngine(base, EngineLimits(**limits))


@pytest.fixture
async def engine(tiny_model: Path) -> AsyncIterator[TransformersEngine]:
    """A fresh one."""
    engine = new_engine(tiny_model)
    yield engine
    await engine.close()


def request(
    max_tokens: int = 8, samples: int = 1, prompt: np.ndarray = PROMPT, **how: object
) -> SampleRequest:
    params = SamplingParams(max_tokens, **{"seed": 5, "stop_at_eos": False, **how})  # type: ignore[arg-type]
    return SampleRequest(prompt, samples, params)


async def settled(engine: TransformersEngine) -> None:
    """Wait until it has nothing to do, and has taken note of what the cache holds."""

    def rests() -> bool:
        return not engine._commands and engine._scheduler.idle

    await until(rests)
    engine._wake.set()  # its thread sees this when it is done with the last step, notes and all
    await until(lambda: not engine._wake.is_set() and rests())


class Steps:
    """Lets an engine make so many steps and no more until it is told to, however quick it is."""

    def __init__(self, engine: TransformersEngine, count: int) -> None:
        self._allowed = threading.Semaphore(count)
        self._step = engine._scheduler.step
        engine._scheduler.step = self._held  # type: ignore[method-assign]

    def _held(self) -> list[Made]:
        assert self._allowed.acquire(timeout=60)
        return self._step()

    def go_on(self, count: int = 10_000) -> None:
        """Allow more."""
        self._allowed.release(count)


async def test_a_request_that_is_closed_computes_nothing_more(engine: TransformersEngine) -> None:
    """At most the step under way; its room is free, also where it waited or was being read."""
    steps = Steps(engine, 3)
    async with aclosing(outputs_of(engine, request(400, samples=8))) as reading:
        for _ in range(3):
            await anext(reading)
    steps.go_on()
    await settled(engine)
    made = engine.stats().sampled_tokens
    assert 8 * 3 <= made <= 8 * 4
    await asyncio.sleep(0.3)
    assert (engine.stats().sampled_tokens, engine.stats().kv_tokens) == (made, 0)
    tasks = [asyncio.create_task(drained(engine, request(400), None)) for _ in range(20)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await settled(engine)
    assert engine.stats().kv_tokens == 0
    assert len((await drained(engine, request(), None)).sequences[0].tokens) == 8


async def test_what_steps_made_is_told_in_their_order() -> None:
    """To more callers than are told at once, while the next step's is there already."""
    bell = _Bell(asyncio.get_running_loop())
    job = Job(request(), None, StopCheck)  # type: ignore[arg-type]
    told: list[list[Output]] = [[] for _ in range(2 * TOLD_AT_ONCE + 1)]
    streams = [_Stream(bell, each.append) for each in told]
    steps = [Made(job, Output(), ended=step == 2) for step in range(3)]
    for made in steps:
        bell.take([(stream, made) for stream in streams])
    await asyncio.gather(*(stream.ended for stream in streams))
    for each in told:
        assert [id(output) for output in each] == [id(made.output) for made in steps]


async def test_few_callers_are_woken_at_once() -> None:
    """Whoever else needs the event loop has it in between."""
    bell = _Bell(asyncio.get_running_loop())
    job = Job(request(), None, StopCheck)  # type: ignore[arg-type]
    streams = [_Stream(bell, lambda _: None) for _ in range(3 * WOKEN_AT_ONCE)]
    bell.take([(stream, Made(job, Output(), ended=True)) for stream in streams])
    ended = [0]
    while ended[-1] < len(streams):
        await asyncio.sleep(0)
        ended.append(sum(stream.ended.done() for stream in streams))
    assert max(np.diff(ended)) == WOKEN_AT_ONCE


async def test_nothing_is_given_out_to_whom_has_given_up() -> None:
    """What the step under way made of it comes to nobody."""
    bell = _Bell(asyncio.get_running_loop())
    told: list[Output] = []
    stream = _Stream(bell, told.append)
    stream.ended.cancel()
    bell.take([(stream, Made(Job(request(), None, StopCheck), Output(), ended=True))])  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    assert not told


async def test_a_long_prompt_does_not_stop_the_others(tiny_model: Path) -> None:
    """While it is read in pieces, a sequence under way gets a token with each of them."""
    engine = new_engine(tiny_model, prefill_tokens_per_step_max=1)
    long = np.random.default_rng(0).integers(0, 256, 500)
    times: list[str] = []

    async def follow(name: str, asked: SampleRequest) -> None:
        async with aclosing(outputs_of(engine, asked)) as outputs:
            async for _ in outputs:
                times.append(name)

    short = asyncio.create_task(follow("short", request(200)))
    while len(times) < 5:
        await asyncio.sleep(0)
    steps = engine._scheduler._steps
    await follow("long", request(2, prompt=long))
    pieces = -(-len(long) // 256)
    first = times.index("long")
    assert engine._scheduler._steps > steps + pieces
    assert times[:first].count("short") >= 5 + pieces - 1
    await short
    await engine.close()


async def test_a_prompt_is_read_once_for_a_group_and_kept_for_later_calls(
    engine: TransformersEngine,
) -> None:
    """And the bits of what follows are those of a fresh engine's."""
    prompt = np.random.default_rng(1).integers(0, 256, 400)
    first = await drained(engine, request(4, samples=6, prompt=prompt), None)
    await settled(engine)
    assert engine.stats().prompt_tokens_computed == 400
    assert first.cached == 0
    again = await drained(engine, request(4, samples=6, prompt=prompt), None)
    longer = await drained(engine, request(4, prompt=np.append(prompt, [1, 2])), None)
    await settled(engine)
    assert again.sequences == first.sequences
    assert again.cached == 400
    assert longer.cached >= 256
    assert engine.stats().prompt_tokens_computed <= 400 + (402 - 256)


@pytest.mark.parametrize("neighbours", [3, 31])
async def test_neighbours_change_no_bit(engine: TransformersEngine, neighbours: int) -> None:
    """Of tokens and logprobs, whenever they come and go, whatever they ask."""
    rng = np.random.default_rng(neighbours)
    asked = [request(40, samples=2), request(30, temperature=0.7, top_p=0.9), request(20, top_k=9)]
    alone = [await drained(engine, each, None) for each in asked]

    async def neighbour(seed: int) -> None:
        prompt = rng.integers(0, 256, int(rng.integers(1, 300)))
        await asyncio.sleep(rng.random() / 20)
        samples = int(rng.integers(1, 4))
        await drained(engine, request(int(rng.integers(1, 40)), samples, prompt, seed=seed), None)

    beside = [asyncio.create_task(neighbour(seed)) for seed in range(neighbours)]
    together = await asyncio.gather(*(drained(engine, each, None) for each in asked))
    await asyncio.gather(*beside)
    assert [each.sequences for each in together] == [each.sequences for each in alone]


async def test_requests_wait_for_room_and_what_never_has_any_is_refused(tiny_model: Path) -> None:
    """In their order; the refusal names the limit."""
    engine = new_engine(tiny_model, kv_cache_bytes_max=1 << 18, prefix_cache_bytes_max=0)
    room = engine.stats().kv_tokens_max
    asked = request(64)
    made = await asyncio.gather(*(drained(engine, asked, None) for _ in range(3 * room // 72)))
    assert all(each.sequences == made[0].sequences for each in made)
    with pytest.raises(InvalidArgument) as refused:
        await drained(engine, request(200, samples=1 + room // 100), None)
    assert refused.value.reason is Reason.LIMIT_EXCEEDED
    assert refused.value.metadata["limit"] == "kv_cache_bytes_max"
    assert (await drained(engine, asked, None)).sequences == made[0].sequences
    await engine.close()


async def test_what_fails_one_request_ends_that_alone(
    engine: TransformersEngine, state: ModelState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter whose logits are not finite; a tokenizer that stumbles over a stop string."""
    bad = {name: np.full_like(array, np.nan) for name, array in state.weights.items()}
    await engine.load_adapter("bad", ModelState(state.tuning, bad, {}, 0, state.config))
    others = [asyncio.create_task(drained(engine, request(60), None)) for _ in range(2)]
    with pytest.raises(FailedPrecondition, match="not finite"):
        await drained(engine, request(20, samples=3), "bad")

    def stumble(_: object) -> str:
        raise ValueError("no such token")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_decode", stumble)
        with pytest.raises(ValueError, match="no such token"):
            await drained(engine, request(20, samples=2, stop_strings=("x",)), None)
    first, second = await asyncio.gather(*others)
    assert first.sequences == second.sequences
    await settled(engine)
    assert engine.stats().kv_tokens == 0


async def test_a_step_that_fails_ends_the_engine_and_tells_everybody(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those under way and those that come later; `failed` raises what it was."""
    engine = new_engine(tiny_model)
    steps = Steps(engine, 3)
    watching = asyncio.create_task(engine.failed())
    calls = [asyncio.create_task(drained(engine, request(400), None)) for _ in range(3)]
    await until(lambda: engine._scheduler._sampled_tokens)

    def fail(*_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(KvCache, "batch", fail)
    steps.go_on()
    for call in calls:
        with pytest.raises(Unavailable) as ended:
            await call
        assert ended.value.reason is Reason.SAMPLER_UNAVAILABLE
        assert ended.value.retry_after_s
    with pytest.raises(RuntimeError, match="out of order"):
        await watching
    with pytest.raises(Unavailable):
        await drained(engine, request(), None)
    await engine.close()


async def test_a_step_that_lacks_memory_ends_the_largest_request_and_the_engine_goes_on(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those beside it are told to ask again, and get what they would have got."""
    alone = (await drained(engine, request(400), None)).sequences
    steps = Steps(engine, 0)
    small = [asyncio.create_task(drained(engine, request(400), None)) for _ in range(2)]
    large = asyncio.create_task(drained(engine, request(300, samples=2), None))
    await until(lambda: len(engine._streams) == 3)
    steps.go_on(2)  # in the first it may not know of all of them
    await until(lambda: engine.stats().sequences == 4)

    def fail(*_: object) -> None:
        monkeypatch.undo()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(KvCache, "batch", fail)
    steps.go_on()
    with pytest.raises(ResourceExhausted, match="a request of 608 tokens") as refused:
        await large
    assert refused.value.reason is Reason.OUT_OF_MEMORY
    for call in small:
        with pytest.raises(Unavailable) as ended:
            await call
        assert ended.value.retry_after_s
    assert (await drained(engine, request(400), None)).sequences == alone
    await settled(engine)
    assert engine.stats().kv_tokens == 0


@pytest.mark.parametrize("lost", [True, False])
async def test_an_adapter_that_does_not_fit_is_refused_and_a_lost_device_ends_the_engine(
    tiny_model: Path, state: ModelState, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Whatever else is asked of it later."""
    engine = new_engine(tiny_model)
    text = "unspecified launch failure" if lost else "out of memory"

    def fail(*_: object) -> None:
        raise torch.AcceleratorError(f"CUDA error: {text}")

    monkeypatch.setattr(engine._pool, "load", fail)
    with pytest.raises(Unavailable if lost else ResourceExhausted):
        await engine.load_adapter("a", state)
    if lost:
        with pytest.raises(torch.AcceleratorError):
            await engine.failed()
    else:
        assert len((await drained(engine, request(), None)).sequences[0].tokens) == 8
    await engine.close()


async def test_closing_ends_what_is_under_way(tiny_model: Path) -> None:
    """UNAVAILABLE, and `failed` returns; a second time does nothing."""
    engine = new_engine(tiny_model)
    steps = Steps(engine, 3)
    call = asyncio.create_task(drained(engine, request(400), None))
    await until(lambda: engine._scheduler._sampled_tokens)
    closing = asyncio.create_task(engine.close())
    await until(lambda: engine._closing)
    steps.go_on()
    await closing
    with pytest.raises(Unavailable):
        await call
    await engine.failed()
    await engine.close()


async def test_sampling_goes_on_while_an_adapter_is_loaded(
    engine: TransformersEngine, state: ModelState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that takes for ever delays nobody."""
    may_end = threading.Event()
    load = engine._pool.load

    def slow(key: str, state: ModelState) -> int:
        assert may_end.wait(30)
        return load(key, state)

    monkeypatch.setattr(engine._pool, "load", slow)
    loading = asyncio.create_task(engine.load_adapter("a", state))
    base = await drained(engine, request(50), None)
    assert not loading.done()
    with pytest.raises(KeyError):
        await drained(engine, request(), "a")
    may_end.set()
    await loading
    assert engine.stats().adapter_bytes > 0
    same = await drained(engine, request(50), "a")  # its B is 0
    assert [s.tokens for s in same.sequences] == [s.tokens for s in base.sequences]
    await engine.unload_adapter("a")
    assert engine.stats().adapter_bytes == 0
