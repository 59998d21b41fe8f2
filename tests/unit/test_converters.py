"""What reads messages raises its own error only: the extremes of every field, without a server."""

import dataclasses
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message

from attack.mutate import mutate
from attack.requests import tokens_of, valid_requests
from tinsmith import SamplingParams, tensors
from tinsmith import v1 as pb
from tinsmith._convert import sampling_params_to_pb
from tinsmithd.config import SamplerConfig, TrainingConfig
from tinsmithd.convert import sampler as sampler_convert
from tinsmithd.convert import types as convert
from tinsmithd.convert.plain import PlainData
from tinsmithd.convert.times import ttl_from_pb
from tinsmithd.domain import LOSSES, BaseModelInfo, LoraConfig
from tinsmithd.errors import InvalidArgument
from tinsmithd.rpc.intake import Intake
from tinsmithd.rpc.paging import page_of
from tinsmithd.sampler.validate import RequestLimits, check_request
from tinsmithd.training import requests
from tinsmithd.training.call import ComputeWork, RefusedWork
from tinsmithd.training.requests import DataLimits

INFO = BaseModelInfo("tiny", "LlamaForCausalLM", 300, 512, "float32", 2, 1)
LIMITS = DataLimits(
    *(1024, 1 << 28, TrainingConfig().chunks_max, TrainingConfig().loss_fn_inputs_max, 64)
)
SAMPLING = RequestLimits(
    num_samples_max=64,
    stop_characters_max=SamplerConfig(base_model="any").stop_characters_max,
    topk_max=64,
    sample_tokens_max=131_072,
    alternatives_max=1 << 20,
)
MODEL_ID, PATH = "a" * 32, "tinsmith://a/weights/b"
MUTANTS = 400


async def only(message: Message) -> AsyncIterator[Any]:
    yield message


async def read_data(message: Any) -> None:
    """As Forward and ForwardBackward do; what is wrong must be a refusal that is not INTERNAL."""
    read = await requests.read_call(only(message), lambda _: INFO, LIMITS)
    if isinstance(read.call.work, RefusedWork):
        raise read.call.work.error


def read_sampling(message: Any) -> None:
    """As Sample does."""
    asked = sampler_convert.sample_request_from_pb(message, chunks_max=1024, stops_max=64)
    check_request(asked, INFO, SAMPLING)


def read_scoring(message: Any) -> None:
    """As ComputeLogprobs does."""
    asked = sampler_convert.compute_request_from_pb(message, chunks_max=1024)
    check_request(asked, INFO, SAMPLING)


def read_save(message: Any) -> None:
    """As SaveCheckpoint does."""
    convert.kind_from_pb(message.kind, "kind")
    convert.name_from_pb(message.name, "name")
    ttl_from_pb(message.ttl, "ttl")
    convert.metadata_from_pb(message.user_metadata, "user_metadata")


READERS: dict[str, Callable[[Any], Any]] = {
    "Sample": read_sampling,
    "ComputeLogprobs": read_scoring,
    "OptimStep": lambda m: convert.adam_from_pb(m.adam_params, "adam_params"),
    "CreateModel": lambda m: convert.tuning_to_pb(convert.tuning_from_pb(m, "", 256)),
    "SaveCheckpoint": read_save,
    "LoadCheckpoint": lambda m: convert.path_from_pb(m.checkpoint_path, "checkpoint_path"),
    "ListModels": lambda m: page_of(m.page_size, m.page_token),
}


def mutants(name: str) -> list[Message]:
    """Messages that parse."""
    return mutants_of(valid_requests(MODEL_ID, PATH)[name])


def mutants_of(valid: Message) -> list[Message]:
    """Messages that parse."""
    rng = random.Random(7)
    found: list[Message] = []
    for _ in range(MUTANTS):
        try:
            message = type(valid).FromString(mutate(valid, rng))
        except DecodeError:
            continue
        message.DiscardUnknownFields()
        found.append(message)
    return found


@pytest.mark.parametrize("name", ["Forward", "ForwardBackward"])
async def test_reading_data_raises_its_own_error_only(name: str) -> None:
    """An INTERNAL refusal raises here, too: it is no InvalidArgument."""
    fields = []
    for message in mutants(name):
        try:
            await read_data(message)
        except InvalidArgument as error:
            fields.append(error.field)
    assert len(fields) > MUTANTS / 4
    assert all(fields)


@pytest.mark.parametrize(("data", "left"), [(1, False), (40, True)])
async def test_only_what_has_many_items_leaves_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, data: int, *, left: bool
) -> None:
    """A few long tensors are read faster than a thread is reached."""
    used = []

    async def off_loop(function: Callable[..., Any], *args: Any) -> Any:
        used.append(function)
        return function(*args)

    monkeypatch.setattr(requests, "off_loop", off_loop)
    tokens = np.zeros(8192 // data, np.int64)
    call = pb.ForwardRequest(model_id=MODEL_ID, loss_fn={"cross_entropy": {}})
    for _ in range(data):
        datum = call.data.add()
        tensors.write(datum.model_input.chunks.add().tokens, tokens)
        tensors.write(datum.loss_fn_inputs["target_tokens"], tokens)
        tensors.write(datum.loss_fn_inputs["weights"], np.ones(len(tokens), np.float32))
    info = dataclasses.replace(INFO, context_length=8192)

    async def message() -> AsyncIterator[bytes]:
        yield call.SerializeToString()

    stream: Any = Intake(pb.ForwardRequest, 1 << 20, 1 << 18).stream(message())
    read = await requests.read_call(stream, lambda _: info, LIMITS)
    assert isinstance(read.call.work, ComputeWork)
    assert len(read.call.work.lengths) == data
    assert bool(used) is left


def calls_of_all_losses() -> list[Any]:
    """Calls in the usual form: of each loss, of both integer types, with and without shapes."""
    rng = np.random.default_rng(0)
    found = []
    for loss in LOSSES.values():
        call = pb.ForwardRequest(model_id=MODEL_ID, loss_fn={loss.name: {}})
        for count, kind in ((1, np.int64), (3, np.int32), (500, np.int64)):
            datum = call.data.add()
            tensors.write(datum.model_input.chunks.add().tokens, rng.integers(0, 300, count, kind))
            for name in loss.inputs:
                array: Any = rng.random(count, np.float32)
                if name == "target_tokens":
                    array = rng.integers(0, 300, count, kind)
                tensors.write(datum.loss_fn_inputs[name], array)
                if count == 3:
                    datum.loss_fn_inputs[name].ClearField("shape")
        found.append(call)
    return found


async def test_data_in_the_usual_form_are_seen_to_be_right_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is made of them, whichever loss they are for."""
    monkeypatch.setattr(requests, "check_datum", None)
    for call in calls_of_all_losses():
        work = (await requests.read_call(only(call), lambda _: INFO, LIMITS)).call.work
        assert isinstance(work, ComputeWork)
        assert list(work.lengths) == [1, 3, 500]


async def test_whether_data_are_looked_at_together_or_one_by_one_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Digests, lengths and refusals are the same, whatever is wrong with whichever datum."""
    valid = calls_of_all_losses()
    calls = [*valid, *(mutant for call in valid for mutant in mutants_of(call)[::3])]
    for bad in (-1, 300, 1 << 62):
        for call in calls_of_all_losses():
            tensors.write(call.data[1].model_input.chunks.add().tokens, np.full(1, bad))
            call.data[1].model_input.chunks.reverse()
            del call.data[1].model_input.chunks[1:]
            calls.append(call)
    together = [await read_whole(call) for call in calls]
    monkeypatch.setattr(PlainData, "lengths", lambda *_: None)
    assert together == [await read_whole(call) for call in calls]
    assert len({error for _, _, error in together}) > 50


async def read_whole(message: Any) -> tuple[bytes, Sequence[int], str]:
    """Digest and lengths of a call, and its refusal."""
    call = (await requests.read_call(only(message), lambda _: INFO, LIMITS)).call
    if isinstance(call.work, ComputeWork):
        return call.digest, call.work.lengths, ""
    assert isinstance(call.work, RefusedWork)
    return call.digest, (), str(call.work.error)


@pytest.mark.parametrize("name", READERS)
def test_converters_raise_their_own_error_only(name: str) -> None:
    """With the field."""
    fields = []
    for message in mutants(name):
        try:
            READERS[name](message)
        except InvalidArgument as error:
            fields.append(error.field)
    assert fields
    assert all(fields)


@pytest.mark.parametrize("where", [(PlainData, "lengths"), (convert, "datum_from_pb")])
async def test_a_fault_while_a_call_is_read_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: tuple[Any, str]
) -> None:
    """Whatever it is: the call has its digest and number, and the log has the cause."""

    def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(*where, fails)
    valid: Any = valid_requests(MODEL_ID, PATH)["Forward"]
    valid.data[0].model_input.chunks.add(tokens=tensors.encode(np.zeros(0, np.int64)))
    call = (await requests.read_call(only(valid), lambda _: INFO, LIMITS)).call
    assert isinstance(call.work, RefusedWork)
    assert call.work.error.reason == "INTERNAL"
    assert len(call.digest) == 32
    assert "a fault of ours" in caplog.text
    work = requests.read_work(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert work.kind == "refused"


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_travels(seed: int) -> None:
    """From the client to the domain and back; one below 0, as earlier versions kept, too."""
    params = sampling_params_to_pb(SamplingParams(max_tokens=1, seed=seed))
    asked = pb.SampleRequest(prompt=tokens_of([1]), sampling_params=params)
    read = sampler_convert.sample_request_from_pb(asked, chunks_max=1, stops_max=1)
    assert read.params.seed == seed % 2**64
    assert convert.lora_to_pb(LoraConfig(seed=seed)).seed == seed % 2**64
