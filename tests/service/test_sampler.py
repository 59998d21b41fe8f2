"""The Sampler through the wire: streaming, repeats, bad input, cancelling, checkpoints."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from data import make_data
from sampler_server import (
    CONTEXT,
    PATH,
    PROMPT,
    Served,
    held_at,
    prompt,
    refusal,
    sample_request,
    serving,
)
from tinsmith.tensors import decode
from tinsmith.v1 import checkpoint_service_pb2 as checkpoint_pb
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmithd.config import SamplerConfig
from tinsmithd.domain import AdamParams, CrossEntropy, LoraConfig, ModelState
from tinsmithd.modeling.base import load_base
from tinsmithd.sampler import server as server_module
from tinsmithd.sampler.engines.interface import SamplingEngine
from tinsmithd.sampler.engines.transformers.kv import KvCache
from tinsmithd.sampler.server import SamplerServer, load_engine
from tinsmithd.trainer.engines.interface import Batch
from tinsmithd.trainer.engines.reference import ReferenceEngine
from waiting import until
from wire import reason_and_field, unlimited


@pytest.fixture
async def served(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Served]:
    """Both servers on free ports, the base model loaded."""
    async with serving(tiny_model, tmp_path, checkpoint_recheck_s=0, threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def states(tiny_model: Path) -> list[ModelState]:
    """Two differently trained adapters."""
    trainer = ReferenceEngine(load_base(str(tiny_model), dtype="float32", on_progress=print))
    trainer.create_model("m", LoraConfig(rank=4, seed=3))
    found = []
    for seed in range(2):
        data = make_data(seed, 2)
        trainer.forward(Batch("m", data, CrossEntropy(), backward=True), lambda *_: None)
        trainer.optim_step("m", AdamParams(learning_rate=3e-2))
        found.append(trainer.export_state("m", optimizer=False))
    return found


async def test_tokens_stream_and_every_sequence_ends(served: Served) -> None:
    """Tokens come while the next ones are not made yet; 8 each, LENGTH; prompt scores in the first
    message only."""
    request = sample_request(num_samples=3, include_prompt_logprobs=True, topk_prompt_logprobs=2)
    responses = []
    with held_at(4) as go:
        async for response in served.stub.Sample(request):
            responses.append(response)
            if response.deltas:
                go.set()
    assert [r.HasField("prompt_logprobs") for r in responses] == [True] + [False] * (
        len(responses) - 1
    )
    first = next(r for r in responses if r.deltas)
    assert not any(delta.stop_reason for delta in first.deltas)
    scores = responses[0].prompt_logprobs
    assert decode(scores.topk_token_ids).shape == (len(PROMPT), 2)
    made = await served.sample(num_samples=3)
    assert [(len(t), len(x), r) for t, x, r in made] == [(8, 8, pb.STOP_REASON_LENGTH)] * 3
    computed = await served.stub.ComputeLogprobs(
        pb.ComputeLogprobsRequest(prompt=prompt(PROMPT), topk_prompt_logprobs=2)
    )
    assert computed.prompt_logprobs == scores


async def test_tokens_gather_for_whom_it_is_all_the_same(served: Served) -> None:
    """One message for each part of the whole answer, the same as what streams."""
    request = sample_request(num_samples=2, include_prompt_logprobs=True, params={"max_tokens": 40})
    call = served.stub.Sample(request, metadata=(("tinsmith-gather-s", "60"),))
    gathered = [response async for response in call]
    assert [len(response.deltas) for response in gathered] == [0, 2]
    streamed: dict[int, list[int]] = {}
    async for response in served.stub.Sample(request):
        for delta in response.deltas:
            streamed.setdefault(delta.sequence_index, []).extend(decode(delta.tokens).tolist())
    assert streamed == {d.sequence_index: decode(d.tokens).tolist() for d in gathered[1].deltas}


async def test_a_seed_gives_the_same_samples_whatever_else_runs(served: Served) -> None:
    """Bit for bit, alone and in a crowd; without a seed they differ."""
    alone = await served.sample(num_samples=2)
    crowd = [served.sample(num_samples=n, params={"seed": n}) for n in range(1, 5)]
    together = await asyncio.gather(served.sample(num_samples=2), *crowd)
    assert together[0] == alone
    unset = [
        [s async for s in served.stub.Sample(r)]
        for r in (sample_request(), sample_request())
        if r.sampling_params.ClearField("seed") is None
    ]
    assert unset[0] != unset[1]


async def test_an_unset_max_tokens_fills_the_context(served: Served) -> None:
    """As many tokens as there is room for, then LENGTH."""
    request = sample_request(prompt=prompt([1] * (CONTEXT - 6)))
    request.sampling_params.ClearField("max_tokens")
    deltas = [d async for response in served.stub.Sample(request) for d in response.deltas]
    assert sum(len(decode(d.tokens)) for d in deltas) == 6
    assert deltas[-1].stop_reason == pb.STOP_REASON_LENGTH


async def test_a_prompt_that_fills_the_context_can_be_scored(served: Served) -> None:
    """Scoring needs no room for new tokens."""
    request = pb.ComputeLogprobsRequest(prompt=prompt([1] * CONTEXT))
    scores = (await served.stub.ComputeLogprobs(request)).prompt_logprobs
    assert np.isfinite(decode(scores.logprobs)[1:]).all()


async def test_a_stop_token_is_returned_and_ends(served: Served) -> None:
    """STOP, and the tokens up to it are those without the stop."""
    ((free, _, _),) = await served.sample()
    wanted = pb.StopCondition(tokens=[free[3]])
    ((tokens, _, reason),) = await served.sample(params={"stop": wanted})
    assert tokens == free[: free.index(free[3]) + 1]
    assert reason == pb.STOP_REASON_STOP


async def test_cancelling_stops_the_work(served: Served) -> None:
    """A call that is cancelled, or whose deadline passes, makes no token after the step that it is
    in; others are served, and what waited for its turn is gone."""
    admission = served.server._servicer.admission
    assert admission is not None
    for timeout_s in (None, 0.5):
        request = sample_request(num_samples=64, params={"max_tokens": 500})
        with held_at(3) as go:
            call = served.stub.Sample(request, timeout=timeout_s)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in call:
                    if timeout_s is None:
                        call.cancel()
                        break
            await until(lambda: admission.idle)
            made = admission.stats().sampled_tokens
            go.set()
            await until(lambda: not admission.stats().sequences)
        assert admission.stats().sampled_tokens <= made + 64
        made = admission.stats().sampled_tokens
        assert len(await asyncio.gather(*(served.sample() for _ in range(8)))) == 8
        assert admission.stats().sampled_tokens == made + 8 * 8


async def test_a_step_that_fails_ends_the_server(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls under way hear UNAVAILABLE, and the process ends with what happened."""
    running = asyncio.create_task(served.server.run())
    await served.sample()

    def fail(*_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(KvCache, "batch", fail)
    error = await refusal(served.stub.Sample(sample_request()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_and_field(error)[0] == "SAMPLER_UNAVAILABLE"
    with pytest.raises(RuntimeError, match="out of order"):
        await running


async def test_the_tokenizer_arrives_whole(
    served: Served, tiny_model: Path, tmp_path: Path
) -> None:
    """Its files load as the same tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    async for piece in served.stub.GetTokenizer(pb.GetTokenizerRequest()):
        assert Path(piece.file_name).name == piece.file_name
        assert len(piece.data) <= 1 << 20
        with (folder / piece.file_name).open("ab") as file:
            file.write(piece.data)
    text = "tin smith ö!"
    expected = AutoTokenizer.from_pretrained(tiny_model)
    found = AutoTokenizer.from_pretrained(folder)
    assert found.encode(text) == expected.encode(text)
    assert found.chat_template == expected.chat_template


async def test_capabilities_tell_the_enforced_limits(served: Served) -> None:
    """Every limit is set, and the base model is named."""
    found = await served.stub.GetCapabilities(pb.SamplerServiceGetCapabilitiesRequest())
    assert [model.name for model in found.base_models] == ["tiny-llama"]
    assert found.base_models[0].context_length == CONTEXT
    assert found.engine == types_pb2.ENGINE_TRANSFORMERS
    assert not unlimited(found.limits)


# --- checkpoints ------------------------------------------------------------------------------


async def test_a_checkpoint_changes_the_samples_and_a_replaced_one_again(
    served: Served, states: list[ModelState]
) -> None:
    """A name that was overwritten is never served from memory; a deleted one is NOT_FOUND."""
    base = await served.sample()
    made = []
    for state in states:
        await served.write(state)
        made.append(await served.sample(checkpoint_path=PATH))
        assert (
            await served.sample(checkpoint_path=PATH.replace("tinsmith", "tinker", 1)) == made[-1]
        )
    assert base != made[0] != made[1] != base
    assert await served.sample() == base
    await served.checkpoints.DeleteCheckpoint(
        checkpoint_pb.DeleteCheckpointRequest(checkpoint_path=PATH)
    )
    error = await refusal(served.stub.Sample(sample_request(checkpoint_path=PATH)))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert reason_and_field(error)[0] == "CHECKPOINT_NOT_FOUND"


async def test_a_pinned_checkpoint_is_served_as_it_was_or_refused(
    served: Served, states: list[ModelState]
) -> None:
    """From memory while it is there, also once its name means something else; never what that is.
    A deleted one is NOT_FOUND soon, as before."""

    async def write(state: ModelState) -> bytes:
        await served.write(state)
        request = checkpoint_pb.GetCheckpointRequest(checkpoint_path=PATH)
        return (await served.checkpoints.GetCheckpoint(request)).checkpoint.digest

    async def reason(digest: bytes, **fields: object) -> tuple[str, str]:
        pinned = sample_request(**{"checkpoint_path": PATH, **fields}, checkpoint_digest=digest)
        return reason_and_field(await refusal(served.stub.Sample(pinned)))

    old = await write(states[0])
    first = await served.sample(checkpoint_path=PATH, checkpoint_digest=old)
    new = await write(states[1])
    assert len({old, new, b"\0" * 32}) == 3
    assert await served.sample(checkpoint_path=PATH, checkpoint_digest=old) == first
    second = await served.sample(checkpoint_path=PATH, checkpoint_digest=new)
    assert second == await served.sample(checkpoint_path=PATH) != first
    assert await reason(b"\0" * 32) == ("CHECKPOINT_REPLACED", "")
    assert await write(states[0]) == old
    await served.checkpoints.DeleteCheckpoint(
        checkpoint_pb.DeleteCheckpointRequest(checkpoint_path=PATH)
    )
    gone: grpc.aio.AioRpcError | None = None
    while gone is None:  # whether it is still there is asked beside the samples
        try:
            assert await served.sample(checkpoint_path=PATH, checkpoint_digest=new) == second
        except grpc.aio.AioRpcError as error:
            gone = error
    assert reason_and_field(gone)[0] == "CHECKPOINT_NOT_FOUND"
    assert await reason(b"\0" * 31) == ("INVALID_FIELD", "checkpoint_digest")
    assert await reason(old, checkpoint_path="") == ("MISSING_FIELD", "checkpoint_path")


async def test_checkpoints_that_do_not_fit_are_refused(
    served: Served, states: list[ModelState]
) -> None:
    """Of another kind, of another base model, with weights missing."""
    path = "tinsmith://run/weights/one"
    error = await refusal(served.stub.Sample(sample_request(checkpoint_path=path)))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_and_field(error)[0] == "WRONG_CHECKPOINT_KIND"
    weights = dict(list(states[0].weights.items())[2:])  # A and B of one module
    part = ModelState(states[0].tuning, weights, {}, 0, states[0].config)
    for state, base_model in ((states[0], "other"), (part, "tiny-llama")):
        await served.write(state, base_model=base_model)
        error = await refusal(served.stub.Sample(sample_request(checkpoint_path=PATH)))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION, base_model
        assert reason_and_field(error)[0] == "INCOMPATIBLE_CHECKPOINT"


async def test_a_damaged_checkpoint_is_data_loss(served: Served, states: list[ModelState]) -> None:
    """A flipped bit on the disk is never sampled with."""
    await served.write(states[0])
    blobs = [path for path in (served.folder / "blobs").rglob("*") if path.is_file()]
    largest = max(blobs, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-5] ^= 1
    largest.chmod(0o600)
    largest.write_bytes(data)
    error = await refusal(served.stub.Sample(sample_request(checkpoint_path=PATH)))
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert reason_and_field(error)[0] == "CHECKPOINT_CORRUPT"
    assert await served.sample()


async def test_a_checkpoint_server_that_is_away_is_unavailable(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model is still sampled from."""
    asked = threading.Event()

    def load(config: SamplerConfig) -> SamplingEngine:
        assert asked.wait(60)
        return load_engine(config)

    monkeypatch.setattr(server_module, "load_engine", load)
    config = SamplerConfig(
        listen_address="127.0.0.1:0",
        base_model=str(tiny_model),
        checkpoint_target="127.0.0.1:1",
        stop_grace_s=1,
    )
    server = SamplerServer(config)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = SamplerServiceStub(channel)
            # Until the model is loaded, calls are told to come back.
            error = await refusal(stub.Sample(sample_request()))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert reason_and_field(error)[0] == "SAMPLER_UNAVAILABLE"
            asked.set()
            await server.loaded()
            assert [r async for r in stub.Sample(sample_request())]
            error = await refusal(stub.Sample(sample_request(checkpoint_path=PATH)))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert reason_and_field(error)[0] == "CHECKPOINT_UNAVAILABLE"
    finally:
        asked.set()
        await server.stop()
