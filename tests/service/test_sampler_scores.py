"""What a Sampler gives beside tokens, through the wire: against a plain forward in float64."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from sampler_server import CONTEXT, PROMPT, prompt, sample_request
from tinsmith import tensors
from tinsmith.tensors import decode
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmithd.config import SamplerConfig
from tinsmithd.sampler.server import SamplerServer
from wire import limit_values, reason_and_field

pytestmark = pytest.mark.asyncio(loop_scope="module")
TARGETS = np.array([[5, -1, 319], [-1, -1, -1], [40, 0, 7]])
LONG = [1 + (7 * i) % 300 for i in range(CONTEXT - 100)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stub(tiny_model: Path) -> AsyncIterator[SamplerServiceStub]:
    """A Sampler that serves a base model alone."""
    server = SamplerServer(
        SamplerConfig(
            listen_address="127.0.0.1:0",
            base_model=str(tiny_model),
            checkpoint_target="127.0.0.1:1",
            stop_grace_s=1,
            threads=1,
            dtype="float32",
            alternatives_max=20_000,
        )
    )
    await server.start()
    await server.loaded()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield SamplerServiceStub(channel)
    await server.stop()


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> torch.nn.Module:
    """The same model in float64."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)


def logits(plain: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """After each token, `(N, V)`."""
    with torch.no_grad():
        found: np.ndarray = plain(torch.tensor([tokens])).logits[0].numpy()
    return found


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return torch.tensor(scores).log_softmax(-1).numpy()


async def ask(stub: SamplerServiceStub, **fields: Any) -> list[pb.SampleResponse]:
    """All messages; targets are packed here."""
    targets = fields.pop("targets", None)
    request = sample_request(**fields)
    if targets is not None:
        tensors.write(request.target_prompt_logprobs, targets)
    return [response async for response in stub.Sample(request)]


async def refused(stub: SamplerServiceStub, **fields: Any) -> tuple[str, str]:
    """Reason and field."""
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await ask(stub, **fields)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return reason_and_field(refusal.value)


def table(responses: list[pb.SampleResponse], index: int = 0) -> dict[str, np.ndarray]:
    """Tokens, logprobs and top-k of a sequence."""
    deltas = [d for r in responses for d in r.deltas if d.sequence_index == index]
    names = ("tokens", "logprobs", "topk_token_ids", "topk_logprobs")
    return {n: np.concatenate([decode(getattr(d, n)) for d in deltas]) for n in names}


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"temperature": 0.7}, 320),
        ({"temperature": 0.7, "top_k": 3}, 3),
        ({"temperature": 0.0, "top_k": 3}, 320),
    ],
)
async def test_topk_of_samples_is_of_the_distribution_drawn_from(
    stub: SamplerServiceStub, plain: torch.nn.Module, params: dict[str, Any], kept: int
) -> None:
    """To 1e-5, in both sequences; the sampled token's own logprob among them; empty cells where
    fewer can be drawn. It changes nothing that is sampled."""
    responses = await ask(stub, num_samples=2, topk_sample_logprobs=5, params=params)
    for index in range(2):
        found = table(responses, index)
        rows = logits(plain, [*PROMPT, *found["tokens"].tolist()])[len(PROMPT) - 1 : -1]
        scaled = rows / (params["temperature"] or 1.0)
        for row, scores in enumerate(scaled):
            best = np.argsort(-scores, kind="stable")[: min(kept, 5)]
            expected = log_softmax(scores[np.argsort(-scores, kind="stable")[:kept]])[: len(best)]
            ids, values = found["topk_token_ids"][row], found["topk_logprobs"][row]
            np.testing.assert_array_equal(ids[: len(best)], best)
            np.testing.assert_allclose(values[: len(best)], expected, atol=1e-5)
            assert not ids[len(best) :].any()
            assert np.isnan(values[len(best) :]).all()
            assert np.isfinite(values[: len(best)]).all()
            own = values[ids == found["tokens"][row]]
            np.testing.assert_allclose(own, [found["logprobs"][row]] * len(own), atol=1e-6)
        assert len(found["topk_token_ids"]) == len(found["tokens"]) == 8
        without = [d for r in await ask(stub, num_samples=2, params=params) for d in r.deltas]
        tokens = [decode(d.tokens) for d in without if d.sequence_index == index]
        assert np.concatenate(tokens).tolist() == found["tokens"].tolist()
        assert not any(d.HasField("topk_token_ids") for d in without)


async def test_scores_of_a_prompt_are_those_of_a_plain_forward(
    stub: SamplerServiceStub, plain: torch.nn.Module
) -> None:
    """Targets at temperature 1, alternatives at the request's, in the first message only."""
    responses = await ask(
        stub,
        targets=TARGETS,
        prompt_alt_tokens_k=16,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        prompt_logprobs_last_n=2,
        params={"temperature": 0.5, "top_k": 1},
    )
    assert [r.HasField("prompt_logprobs") for r in responses[:2]] == [True, False]
    scores = responses[0].prompt_logprobs
    rows = logits(plain, PROMPT)[:-1]
    at_1 = log_softmax(rows)
    wanted = np.where(TARGETS < 0, 0.0, np.take_along_axis(at_1, TARGETS.clip(0), 1))
    np.testing.assert_allclose(decode(scores.target_logprobs), wanted, atol=1e-5)
    ids = decode(scores.alt_token_ids)
    assert ids.shape == (3, 16)
    assert len(set(ids.ravel().tolist())) > 3, "top_k does not count"
    drawn_from = log_softmax(rows / 0.5)
    np.testing.assert_allclose(
        decode(scores.alt_logprobs), np.take_along_axis(drawn_from, ids.astype(int), 1), atol=1e-5
    )
    logprobs = decode(scores.logprobs)
    assert np.isnan(logprobs[:2]).all()
    np.testing.assert_allclose(logprobs[2:], at_1[[1, 2], PROMPT[2:]], atol=1e-5)
    topk = decode(scores.topk_logprobs)
    assert np.isnan(topk[:2]).all()
    np.testing.assert_allclose(topk[2:], -np.sort(-at_1[1:], axis=1)[:, :2], atol=1e-5)


async def test_only_what_is_asked_for_comes(stub: SamplerServiceStub) -> None:
    """Targets and alternatives need no logprobs of the prompt."""
    names = {"logprobs", "topk_token_ids", "target_logprobs", "alt_token_ids"}
    for fields, there in (
        ({"targets": TARGETS}, {"target_logprobs"}),
        ({"prompt_alt_tokens_k": 2}, {"alt_token_ids"}),
        ({"include_prompt_logprobs": True}, {"logprobs"}),
        ({}, set()),
    ):
        scores = (await ask(stub, **fields))[0].prompt_logprobs
        assert {name for name in names if scores.HasField(name)} == there
    alone = await ask(
        stub, prompt=prompt([7]), targets=np.zeros((0, 2), np.int64), prompt_alt_tokens_k=3
    )
    shapes = alone[0].prompt_logprobs
    assert decode(shapes.target_logprobs).shape == (0, 2)
    assert decode(shapes.alt_token_ids).shape == (0, 3)


async def test_alternatives_repeat_with_their_seed_whatever_else_runs(
    stub: SamplerServiceStub,
) -> None:
    """Bit for bit, in a crowd, with the prompt in a cache or not, and beside other scores; another
    seed draws others; at temperature 0 all are the likeliest."""
    asked = {"prompt": prompt(LONG), "prompt_alt_tokens_k": 4}
    first = (await ask(stub, **asked))[0].prompt_logprobs
    crowd = [ask(stub, prompt=prompt(LONG[n:]), prompt_alt_tokens_k=n) for n in range(1, 5)]
    together, *_ = await asyncio.gather(ask(stub, **asked, include_prompt_logprobs=True), *crowd)
    again = together[0].prompt_logprobs
    assert (again.alt_token_ids, again.alt_logprobs) == (first.alt_token_ids, first.alt_logprobs)
    other = (await ask(stub, **asked, params={"seed": 6}))[0].prompt_logprobs
    assert (decode(other.alt_token_ids) != decode(first.alt_token_ids)).mean() > 0.5
    cold = (await ask(stub, **asked, topk_prompt_logprobs=1, params={"temperature": 0.0}))[0]
    best = decode(cold.prompt_logprobs.topk_token_ids)[1:]
    assert (decode(cold.prompt_logprobs.alt_token_ids) == best).all()


async def test_the_last_n_are_those_of_the_whole_and_may_come_from_the_cache(
    stub: SamplerServiceStub,
) -> None:
    """Bit for bit; the tokens that a cache had are said, in the first message alone."""
    tokens = [2, *LONG]
    whole = await stub.ComputeLogprobs(pb.ComputeLogprobsRequest(prompt=prompt(tokens)))
    assert whole.prompt_cache_hit_tokens == 0
    part = await stub.ComputeLogprobs(
        pb.ComputeLogprobsRequest(
            prompt=prompt(tokens), prompt_logprobs_last_n=5, topk_prompt_logprobs=2
        )
    )
    assert part.prompt_cache_hit_tokens >= len(tokens) // 2
    found = decode(part.prompt_logprobs.logprobs)
    assert np.isnan(found[:-5]).all()
    assert found[-5:].tolist() == decode(whole.prompt_logprobs.logprobs)[-5:].tolist()
    assert (
        np.isnan(decode(part.prompt_logprobs.topk_logprobs)).all(1).tolist()
        == [True] * (len(tokens) - 5) + [False] * 5
    )
    responses = await ask(stub, prompt=prompt(tokens))
    assert responses[0].prompt_cache_hit_tokens == len(tokens)
    assert [r.prompt_cache_hit_tokens for r in responses[1:]] == [0] * (len(responses) - 1)


async def test_numbers_can_be_plain(stub: SamplerServiceStub) -> None:
    """For a person with grpcurl: targets in, and all that comes back."""
    fields = {
        "prompt_alt_tokens_k": 2,
        "topk_sample_logprobs": 2,
        "target_prompt_logprobs": types_pb2.Tensor(
            ints=TARGETS.ravel().tolist(), shape=TARGETS.shape
        ),
    }
    packed = await ask(stub, **fields)
    plain = await ask(stub, **fields, tensor_format=types_pb2.TENSOR_FORMAT_PLAIN)
    for name in ("target_logprobs", "alt_token_ids", "alt_logprobs"):
        one, other = (getattr(r[0].prompt_logprobs, name) for r in (packed, plain))
        assert not other.data
        assert decode(one).tolist() == decode(other).tolist()
    for name, values in table(packed).items():
        assert values.tolist() == table(plain)[name].tolist()


async def test_bounds_are_said_and_kept(stub: SamplerServiceStub) -> None:
    """By the names of the fields and of the limits; what an engine promises is said, too."""
    said = await stub.GetCapabilities(pb.SamplerServiceGetCapabilitiesRequest())
    assert limit_values(said.limits)["alternatives_max"] == 20_000
    assert said.batch_invariant
    assert said.engine == types_pb2.ENGINE_TRANSFORMERS
    assert said.base_models[0].dtype == types_pb2.DTYPE_FLOAT32
    over = {"num_samples": 100, "topk_sample_logprobs": 51, "params": {"max_tokens": 4}}
    with pytest.raises(grpc.aio.AioRpcError, match="alternatives_max allows: 20000") as refusal:
        await ask(stub, **over)
    assert reason_and_field(refusal.value) == ("LIMIT_EXCEEDED", "topk_sample_logprobs")
    most = await ask(stub, **{**over, "topk_sample_logprobs": 50})
    assert sum(len(decode(d.topk_token_ids)) for r in most for d in r.deltas) == 400


HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    ("k", {"topk_sample_logprobs": 65}, "LIMIT_EXCEEDED"),
    ("k", {"topk_sample_logprobs": 2**31 - 1}, "LIMIT_EXCEEDED"),
    ("k", {"topk_sample_logprobs": -(2**31)}, "INVALID_FIELD"),
    ("alternatives", {"prompt_alt_tokens_k": 65}, "LIMIT_EXCEEDED"),
    ("alternatives", {"prompt_alt_tokens_k": -1}, "INVALID_FIELD"),
    ("last n", {"prompt_logprobs_last_n": 0, "include_prompt_logprobs": True}, "INVALID_FIELD"),
    ("last n", {"prompt_logprobs_last_n": 4, "include_prompt_logprobs": True}, "INVALID_FIELD"),
    ("last n", {"prompt_logprobs_last_n": -9, "include_prompt_logprobs": True}, "INVALID_FIELD"),
    ("rows", {"targets": np.zeros((4, 1), np.int64)}, "INVALID_SHAPE"),
    ("flat", {"targets": np.zeros(3, np.int64)}, "INVALID_SHAPE"),
    ("no columns", {"targets": np.zeros((3, 0), np.int64)}, "INVALID_SHAPE"),
    ("wide", {"targets": np.zeros((3, 300_000), np.int32)}, "LIMIT_EXCEEDED"),
    ("tall", {"targets": np.zeros((900_000, 1), np.int64)}, "INVALID_SHAPE"),
    ("floats", {"targets": np.zeros((3, 2), np.float32)}, "INVALID_DTYPE"),
    ("nan", {"targets": np.full((3, 2), np.nan, np.float32)}, "INVALID_DTYPE"),
    ("id", {"targets": np.full((3, 2), -2)}, "TOKEN_OUT_OF_RANGE"),
    ("id", {"targets": np.full((3, 2), 320)}, "TOKEN_OUT_OF_RANGE"),
    ("id", {"targets": np.full((3, 2), -(2**63))}, "TOKEN_OUT_OF_RANGE"),
    ("lie", {"target_prompt_logprobs": types_pb2.Tensor(shape=[3, 2**40])}, "INVALID_SHAPE"),
    ("lie", {"target_prompt_logprobs": types_pb2.Tensor(shape=[3, -1])}, "INVALID_SHAPE"),
    (
        "two ways",
        {
            "target_prompt_logprobs": types_pb2.Tensor(
                data=b"\0" * 48, ints=[0] * 6, dtype=types_pb2.DTYPE_INT64, shape=[3, 2]
            )
        },
        "INVALID_FIELD",
    ),
    (
        "half a number",
        {
            "target_prompt_logprobs": types_pb2.Tensor(
                data=b"\0" * 47, dtype=types_pb2.DTYPE_INT64, shape=[3, 2]
            )
        },
        "INVALID_SHAPE",
    ),
    (
        "bfloat16",
        {
            "target_prompt_logprobs": types_pb2.Tensor(
                data=b"\0" * 12, dtype=types_pb2.DTYPE_BFLOAT16, shape=[3, 2]
            )
        },
        "INVALID_DTYPE",
    ),
]


@pytest.mark.parametrize(("name", "fields", "reason"), HOSTILE)
async def test_what_makes_no_sense_is_refused_by_its_field(
    stub: SamplerServiceStub, name: str, fields: dict[str, Any], reason: str
) -> None:
    """At once, whatever it asks for; the server goes on."""
    (field,) = (n for n in fields if n != "include_prompt_logprobs")
    async with asyncio.timeout(60):
        found = await refused(stub, **fields)
    assert found == (reason, "target_prompt_logprobs" if field == "targets" else field), name
    assert await ask(stub)


async def test_last_n_needs_the_logprobs_of_which_it_takes_the_last(
    stub: SamplerServiceStub,
) -> None:
    """In `Sample`; `ComputeLogprobs` has them always, and the same bounds."""
    missing = await refused(stub, prompt_logprobs_last_n=1, topk_prompt_logprobs=1)
    assert missing == ("MISSING_FIELD", "include_prompt_logprobs")
    for last_n in (0, -1, len(PROMPT)):
        request = pb.ComputeLogprobsRequest(prompt=prompt(PROMPT), prompt_logprobs_last_n=last_n)
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.ComputeLogprobs(request)
        assert reason_and_field(refusal.value) == ("INVALID_FIELD", "prompt_logprobs_last_n")
