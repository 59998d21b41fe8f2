"""What a Sampler refuses of requests: the reason and the field of each refusal."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from sampler_server import CONTEXT, Served, prompt, refusal, sample_request, serving
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmith.v1 import types_pb2
from wire import reason_and_field


@pytest.fixture
async def served(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Served]:
    """Both servers on free ports, the base model loaded."""
    async with serving(tiny_model, tmp_path, threads=1) as running:
        yield running


@pytest.mark.parametrize("said", ["", "-1", "61", "nan", "soon"])
async def test_what_is_no_time_to_gather_is_refused(served: Served, said: str) -> None:
    error = await refusal(
        served.stub.Sample(sample_request(), metadata=(("tinsmith-gather-s", said),))
    )
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_and_field(error) == ("INVALID_FIELD", "metadata['tinsmith-gather-s']")


def _sampling(**values: object) -> Callable[[], pb.SampleRequest]:
    return lambda: sample_request(params=values)


BAD: list[tuple[str, Callable[[], pb.SampleRequest], str, str]] = [
    ("no prompt", lambda: pb.SampleRequest(), "MISSING_FIELD", "prompt.chunks"),
    (
        "no token",
        lambda: sample_request(prompt=types_pb2.ModelInput(chunks=[types_pb2.ModelInputChunk()])),
        "MISSING_FIELD",
        "prompt.chunks[0]",
    ),
    ("token", lambda: sample_request(prompt=prompt([1, 320])), "TOKEN_OUT_OF_RANGE", "prompt"),
    ("below", lambda: sample_request(prompt=prompt([-1])), "TOKEN_OUT_OF_RANGE", "prompt"),
    ("full", lambda: sample_request(prompt=prompt([1] * CONTEXT)), "LIMIT_EXCEEDED", "prompt"),
    ("long", lambda: sample_request(prompt=prompt([1] * 513)), "LIMIT_EXCEEDED", "prompt"),
    ("room", _sampling(max_tokens=509), "LIMIT_EXCEEDED", "sampling_params.max_tokens"),
    ("no tokens", _sampling(max_tokens=0), "INVALID_FIELD", "sampling_params.max_tokens"),
    ("cold", _sampling(temperature=-1.0), "INVALID_FIELD", "sampling_params.temperature"),
    ("nan", _sampling(temperature=float("nan")), "NON_FINITE", "sampling_params.temperature"),
    ("inf", _sampling(temperature=float("inf")), "NON_FINITE", "sampling_params.temperature"),
    ("top_p 0", _sampling(top_p=0.0), "INVALID_FIELD", "sampling_params.top_p"),
    ("top_p 2", _sampling(top_p=1.5), "INVALID_FIELD", "sampling_params.top_p"),
    ("top_p nan", _sampling(top_p=float("nan")), "NON_FINITE", "sampling_params.top_p"),
    ("top_k", _sampling(top_k=-2), "INVALID_FIELD", "sampling_params.top_k"),
    (
        "stop token",
        _sampling(stop=pb.StopCondition(tokens=[1, 320])),
        "TOKEN_OUT_OF_RANGE",
        "sampling_params.stop.tokens[1]",
    ),
    (
        "empty stop",
        _sampling(stop=pb.StopCondition(strings=["a", ""])),
        "INVALID_FIELD",
        "sampling_params.stop.strings[1]",
    ),
    (
        "stops",
        _sampling(stop=pb.StopCondition(strings=["a"] * 65)),
        "LIMIT_EXCEEDED",
        "sampling_params.stop.strings",
    ),
    ("samples", lambda: sample_request(num_samples=257), "LIMIT_EXCEEDED", "num_samples"),
    ("minus", lambda: sample_request(num_samples=-1), "INVALID_FIELD", "num_samples"),
    (
        "topk",
        lambda: sample_request(topk_prompt_logprobs=65),
        "LIMIT_EXCEEDED",
        "topk_prompt_logprobs",
    ),
    ("path", lambda: sample_request(checkpoint_path="x"), "INVALID_NAME", "checkpoint_path"),
]


async def test_bad_input_names_its_field(served: Served) -> None:
    """Every way to get it wrong is INVALID_ARGUMENT with the reason and the field."""
    for name, make, reason, field in BAD:
        error = await refusal(served.stub.Sample(make()))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, name
        assert reason_and_field(error) == (reason, field), name


async def test_an_unknown_base_model_is_not_found(served: Served) -> None:
    """The right name and none are both fine."""
    error = await refusal(served.stub.Sample(sample_request(base_model="other")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert reason_and_field(error)[0] == "BASE_MODEL_NOT_FOUND"
    assert await served.sample(base_model="tiny-llama") == await served.sample()
