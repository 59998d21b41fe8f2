"""What is the engine's own over vLLM: seeds, refusals, adapters on disk, ends."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="make test-vllm")

from sampling_engines import HEAD_DIM, VLLM_START_S_MAX, Driven, opened, outputs_of
from tinsmithd.domain import LoraConfig, SampleRequest, SamplingParams
from tinsmithd.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from tinsmithd.modeling.base import load_base
from tinsmithd.sampler.engines.vllm.engine import VllmEngine
from tinsmithd.sampler.engines.vllm.params import sequence_seed
from tinsmithd.trainer.engines.reference import ReferenceEngine
from tiny_models import write_tiny_model

PROMPT = np.array([10, 20, 30, 40])

pytestmark = pytest.mark.timeout(VLLM_START_S_MAX)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("vllm") / "tiny-llama", head_dim=HEAD_DIM)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Driven]:
    engine = opened("vllm", folder)
    yield engine
    engine.close()


def new_state(folder: Path, **lora: object):
    """A new adapter, which does nothing yet."""
    trainer = ReferenceEngine(load_base(str(folder), dtype="float32", on_progress=lambda _: None))
    trainer.create_model("m", LoraConfig(**lora))  # type: ignore[arg-type]
    return trainer.export_state("m", optimizer=False)


def request(num_samples: int = 1, *, prompt: np.ndarray = PROMPT, **params: object):
    values = {"max_tokens": 12, "seed": 5, "stop_at_eos": False, **params}
    return SampleRequest(prompt, num_samples, SamplingParams(**values))  # type: ignore[arg-type]


def test_seeds_of_sequences_do_not_meet() -> None:
    """Not even where one seed is the next one of another; all fit into vLLM's signed integers."""
    seeds = {sequence_seed(seed, index) for seed in range(50) for index in range(50)}
    seeds |= {sequence_seed(seed, 0) for seed in (-1, (1 << 64) - 2, 1 << 63)}
    assert len(seeds) == 2503
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_samples_are_drawn_from_what_is_said(engine: Driven) -> None:
    """First tokens of 2,000 samples: the share of each is what its logprob says, and no two
    sequences of a request draw alike."""
    made = engine.sequences(request(2000, max_tokens=1, top_k=5))
    said = {s.tokens[0]: np.exp(s.logprobs[0]) for s in made}
    assert len(said) == 5
    np.testing.assert_allclose(sum(said.values()), 1, atol=1e-5)
    for token, share in said.items():
        drawn = sum(s.tokens[0] == token for s in made) / len(made)
        assert abs(drawn - share) < 4 * np.sqrt(share * (1 - share) / len(made)), token
    assert [s.tokens for s in engine.sequences(request(2000, max_tokens=1, top_k=5))] == [
        s.tokens for s in made
    ]


@pytest.mark.parametrize("temperature", [1e-6, 0.009, 2.5])
def test_what_vllm_would_answer_otherwise_is_refused(engine: Driven, temperature: float) -> None:
    """It takes 0.009 for 0.01 and 1e-6 for 0; the refusal names the field."""
    with pytest.raises(InvalidArgument, match=r"0\.01, 2") as refused:
        engine.sequences(request(temperature=temperature))
    assert refused.value.field == "sampling_params.temperature"


def test_what_it_does_not_compute_is_refused(engine: Driven) -> None:
    for field, value in (
        ("target_prompt_logprobs", np.zeros((3, 1), np.int64)),
        ("prompt_alt_tokens_k", 2),
    ):
        asked = SampleRequest(PROMPT, 1, SamplingParams(max_tokens=1, seed=0), **{field: value})
        with pytest.raises(InvalidArgument) as refused:
            engine.sequences(asked)
        assert refused.value.field == field


def test_a_model_with_experts_is_refused_on_a_cpu(tmp_path: Path) -> None:
    """vLLM would start, and die of the first request."""
    with pytest.raises(NotFound, match="experts beside adapters on GPUs alone"):
        opened("vllm", write_tiny_model(tmp_path / "moe", "qwen3_moe", head_dim=HEAD_DIM))


def test_more_adapters_than_slots_take_turns(engine: Driven, folder: Path) -> None:
    """Those that vLLM drops it reads again; what is unloaded leaves nothing on the disk."""
    vllm = engine.engine
    assert isinstance(vllm, VllmEngine)
    root = Path(vllm._folders._root.name)
    assert root.stat().st_mode & 0o077 == 0
    before = engine.sequences(request())
    state = new_state(folder, rank=2)
    keys = [f"adapter {index}" for index in range(12)]
    for key in keys:
        engine.load_adapter(key, state)
    assert len(list(root.iterdir())) == 12
    for made in engine.together([(request(), key) for key in keys]):
        assert made.sequences[0].tokens == before[0].tokens
    for key in keys:
        engine.unload_adapter(key)
    assert not list(root.iterdir())
    assert engine.engine.stats().adapter_bytes == 0


def test_a_rank_without_room_is_refused(engine: Driven, folder: Path) -> None:
    with pytest.raises(FailedPrecondition, match="vllm_rank_max is 32"):
        engine.load_adapter("large", new_state(folder, rank=64))
    with pytest.raises(KeyError):
        engine.sequences(request(), "large")


def test_a_second_call_reads_less(engine: Driven) -> None:
    """vLLM keeps what it read, by blocks of 128 tokens."""
    prompt = np.arange(300) % 250
    first = engine.drain(request(prompt=prompt, max_tokens=2))
    again = engine.drain(request(2, prompt=prompt, max_tokens=2))
    assert (first.cached, again.cached) == (0, 256)


def test_a_closed_iterator_stops_the_work(engine: Driven) -> None:
    """No token is made any more once the abort is through."""

    async def begin() -> None:
        async with aclosing(outputs_of(engine.engine, request(4, max_tokens=500))) as outputs:
            async for _ in outputs:
                break

    async def sampled_later() -> tuple[int, int]:
        before = engine.engine.stats().sampled_tokens
        await asyncio.sleep(0.5)
        return before, engine.engine.stats().sampled_tokens

    start = engine.engine.stats().sampled_tokens
    engine.run(begin())
    engine.sequences(request(max_tokens=1))  # the abort was before this
    before, after = engine.run(sampled_later())
    assert before == after
    assert before - start < 4 * 250


def test_a_closed_engine_says_so(folder: Path) -> None:
    """Also to whom it is computing for; nothing of it stays."""
    driven = opened("vllm", folder)
    vllm = driven.engine
    assert isinstance(vllm, VllmEngine)
    root = Path(vllm._folders._root.name)

    async def begin_and_close() -> None:
        outputs = outputs_of(vllm, request(2, max_tokens=500))
        async with aclosing(outputs):
            await anext(outputs)
            await vllm.close()
            with pytest.raises(Unavailable):
                [each async for each in outputs]

    driven.run(begin_and_close())
    driven.run(vllm.failed())
    with pytest.raises(Unavailable):
        driven.sequences(request())
    driven.close()
    gc.collect()
    assert not root.exists()
