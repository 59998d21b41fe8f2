"""Messages with too many things in them: counted before they are touched, health beside it."""

import random
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from attack.amount import ATTACKS, SEED
from attack.harness import Watch, targets_of, watching
from attack.requests import (
    LOSS,
    SERVICES,
    Caller,
    Method,
    bomb,
    datum,
    every_method,
    length_delimited,
    paths,
    tokens_of,
    valid_requests,
    wrapped,
)
from clusters import RunningCluster
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster, connect
from tinsmith.v1 import types_pb2
from tinsmithd.config import CheckpointConfig, SamplerConfig, TrainingConfig
from tinsmithd.rpc.intake import TEXT_BYTES_PER_ITEM

LIMITS = TrainingConfig()
ITEMS = LIMITS.message_items_max - 100
"""Leaves room for what a bomb is packed in."""
CONFIGS = {"training": TrainingConfig, "sampler": SamplerConfig, "checkpoint": CheckpointConfig}
MESSAGE_BYTES_MAX = {
    server: config.model_fields["message_bytes_max"].default for server, config in CONFIGS.items()
}
TEXT = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
METHODS = {method.name: method for method in every_method()}


@pytest.fixture(scope="module")
def caller(attacked: RunningCluster) -> Iterator[Caller]:
    """Sends bytes to the cluster."""
    with Caller(attacked) as found:
        yield found


@pytest.fixture(scope="module")
def stubs(attacked: RunningCluster) -> Iterator[Cluster]:
    """Generated stubs of the cluster."""
    with connect(attacked.address) as connected:
        yield connected


def new_model(stubs: Cluster) -> str:
    """A fresh model."""
    lora = pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=2, seed=1))
    return stubs.training.CreateModel(lora).model.model_id


def saved(stubs: Cluster, model_id: str) -> str:
    """Path of a checkpoint of a model."""
    save = pb.SaveCheckpointRequest(model_id=model_id, name="s", kind=1)
    return stubs.training.SaveCheckpoint(save).checkpoint_path


def limit_of(error: object) -> tuple[str, str, str]:
    """Reason, field and limit of a refusal."""
    assert isinstance(error, grpc.RpcError), error
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    info = error_details_pb2.ErrorInfo()
    for detail in rpc_status.from_call(error).details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
    return info.reason, info.metadata["field"], info.metadata.get("limit", "")


def largest(method: Method, valid: bytes) -> Iterator[bytes]:
    """Requests with as many items of one kind as a message may have, and with as many bytes; each
    behind a valid request, so that it gets as far as can be."""
    nbytes = MESSAGE_BYTES_MAX[method.server] - len(valid) - 64
    for path in paths(method.request):
        field = path[-1]
        if field.is_repeated:
            each = 2 if field.message_type and field.message_type.GetOptions().map_entry else 1
            yield valid + bomb(path, ITEMS // (each + 1))
        if field.type in TEXT:
            yield valid + wrapped(path, length_delimited(field.number, b"a" * nbytes))
        if field.type == FieldDescriptor.TYPE_STRING:
            most = ITEMS * TEXT_BYTES_PER_ITEM
            yield valid + wrapped(path, length_delimited(field.number, b"a" * most))


def send_all(caller: Caller, watch: Watch, attacks: list[tuple[Method, bytes]]) -> None:
    """Send messages, one after the other."""
    for attack in attacks:
        answer = caller.call(*attack)
        refused = isinstance(answer, grpc.RpcError)
        watch.answered(answer.code() if refused else grpc.StatusCode.OK)


@pytest.mark.parametrize("server", SERVICES)
def test_health_answers_beside_the_largest_message_of_every_rpc(
    attacked: RunningCluster, caller: Caller, stubs: Cluster, server: str
) -> None:
    """Within half a second, whatever field is as large or as often there as limits allow."""
    model_id = new_model(stubs)
    path = saved(stubs, model_id)
    valid = valid_requests(model_id, path)
    attacks = []
    for method in METHODS.values():
        if method.server == server:
            request = valid[method.name]
            if "seq_id" in method.request.fields_by_name:
                request.seq_id = 0  # type: ignore[attr-defined]  # now, again and again
            content = request.SerializeToString()
            attacks += [(method, attack) for attack in largest(method, content)]
    random.Random(SEED).shuffle(attacks)
    attacks = attacks if ATTACKS else attacks[:16]
    with watching(targets_of(attacked)) as watch:
        send_all(caller, watch, attacks)
    assert watch.codes[grpc.StatusCode.INVALID_ARGUMENT] >= len(attacks) / 3


def first_bytes(model_id: str, seq_id: int) -> bytes:
    """The header of a numbered call."""
    request = pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn=LOSS)
    return request.SerializeToString()


def field_path(*names: str) -> tuple[FieldDescriptor, ...]:
    """Fields of a ForwardBackwardRequest by their names."""
    descriptor, found = METHODS["ForwardBackward"].request, []
    for name in names:
        found.append(descriptor.fields_by_name[name])
        descriptor = found[-1].message_type
    return tuple(found)


TOKENS = ("data", "model_input", "chunks", "tokens")
INPUT = ("data", "loss_fn_inputs", "value")
BOMBS = {
    "80,000 dimensions": (
        bomb(field_path(*TOKENS, "shape"), 80_000),
        ("INVALID_SHAPE", "data[0].model_input.chunks[0].tokens", ""),
    ),
    "80,000 dimensions of an input": (
        bomb(field_path(*INPUT, "shape"), 80_000),
        ("INVALID_SHAPE", 'data[0].loss_fn_inputs[""]', ""),
    ),
    "1,000,000 chunks of one token": (
        wrapped(field_path(*TOKENS[:3]), b"\x0a\x05\x0a\x03\x2a\x01\x05" * 1_000_000),
        ("LIMIT_EXCEEDED", "data", "message_items_max"),
    ),
    "20,000 chunks of one token": (
        wrapped(field_path(*TOKENS[:3]), b"\x0a\x05\x0a\x03\x2a\x01\x05" * 20_000),
        ("LIMIT_EXCEEDED", "data[0].model_input.chunks", "chunks_max"),
    ),
    "50,000 inputs": (
        bomb(field_path("data", "loss_fn_inputs"), 50_000),
        ("LIMIT_EXCEEDED", "data[0].loss_fn_inputs", "loss_fn_inputs_max"),
    ),
    "1,000,000 inputs": (
        bomb(field_path("data", "loss_fn_inputs"), 1_000_000),
        ("LIMIT_EXCEEDED", "data", "message_items_max"),
    ),
    "100,000 data": (
        bomb(field_path("data"), 100_000),
        ("LIMIT_EXCEEDED", "data", "data_per_call_max"),
    ),
    "30 MiB of empty data": (
        bomb(field_path("data"), 15 << 20),
        ("LIMIT_EXCEEDED", "data", "message_items_max"),
    ),
    "30 Mi plain numbers": (
        bomb(field_path(*TOKENS, "ints"), 30 << 20),
        ("LIMIT_EXCEEDED", "data", "message_items_max"),
    ),
    "65 dimensions": (
        wrapped(field_path(*INPUT, "shape"), b"\x12\x41" + b"\x01" * 65),
        ("INVALID_SHAPE", 'data[0].loss_fn_inputs[""]', ""),
    ),
    "no values in an endless shape": (
        wrapped(field_path(*INPUT, "shape"), b"\x10\x00\x10" + b"\x80" * 8 + b"\x40"),
        ("INVALID_SHAPE", 'data[0].loss_fn_inputs[""]', ""),
    ),
}


def test_counts_are_bounded_before_anything_is_touched(
    attacked: RunningCluster, caller: Caller, stubs: Cluster
) -> None:
    """Each is refused with its field and limit, under its number, and health answers meanwhile;
    in the first message of a call or in a later one."""
    model_id = new_model(stubs)
    seq_id = 0
    with watching(targets_of(attacked)) as watch:
        for name, (content, expected) in BOMBS.items():
            for later in (False, True):
                seq_id += 1
                header = first_bytes(model_id, seq_id)
                messages = (header, content) if later else (header + content,)
                error = caller.call(METHODS["ForwardBackward"], *messages)
                assert limit_of(error) == expected, name
                watch.answered(error.code())  # type: ignore[union-attr]
    found = stubs.training.GetModel(pb.GetModelRequest(model_id=model_id)).model
    assert found.next_seq_id == seq_id + 1


@pytest.mark.parametrize("name", ["OptimStep", "SaveCheckpoint", "LoadCheckpoint", "Forward"])
def test_a_call_with_too_many_items_uses_its_number(
    caller: Caller, stubs: Cluster, name: str
) -> None:
    """A repeat gets the same refusal, another content a conflict, and the next call runs."""
    model_id = new_model(stubs)
    method = METHODS[name]
    header = GetMessageClass(method.request)(model_id=model_id, seq_id=1).SerializeToString()
    unknown = b"\xa0\x1f\x01" * 1_000_000
    for _ in range(2):
        assert limit_of(caller.call(method, header + unknown))[0] == "INVALID_FIELD"
    conflict = caller.call(METHODS["OptimStep"], header)
    assert isinstance(conflict, grpc.RpcError)
    assert conflict.code() is grpc.StatusCode.ALREADY_EXISTS
    step = pb.OptimStepRequest(model_id=model_id, seq_id=2)
    assert stubs.training.OptimStep(step, timeout=30).metrics["step:last"] == 1


def one_token(chunks: int) -> types_pb2.Datum:
    """A datum with so many chunks of one plain number each."""
    chunk = types_pb2.ModelInputChunk(tokens=types_pb2.Tensor(ints=[1]))
    found = datum(chunks)
    found.model_input.CopyFrom(types_pb2.ModelInput(chunks=[chunk] * chunks))
    return found


def test_health_answers_beside_the_largest_calls_that_are_carried_out(
    attacked: RunningCluster, stubs: Cluster
) -> None:
    """The most data, chunks, plain numbers and targets of a call, answered as plain numbers; the
    most chunks and scores of a prompt; pages of checkpoints with the most metadata."""
    model_id = new_model(stubs)
    plain = types_pb2.TENSOR_FORMAT_PLAIN
    wide = np.ones((512, 64))
    numbers = {
        "target_tokens": tensors.encode(wide.astype(np.int64), plain=True),
        "weights": tensors.encode(wide, plain=True),
    }
    calls = [
        [datum(1)] * 4096,
        [one_token(40)] * 1000,
        [one_token(512)] * 40,
        [pb.Datum(model_input=tokens_of([1] * 512), loss_fn_inputs=numbers)] * 3,
    ]
    metadata = {f"{i:0128}": "\U0001f600" * 1024 for i in range(64)}
    for i in range(12):
        save = pb.SaveCheckpointRequest(model_id=model_id, kind=1, user_metadata=metadata)
        save.name = f"fat{i}"
        stubs.training.SaveCheckpoint(save, timeout=60)
    prompt = one_token(500).model_input
    with watching(targets_of(attacked)) as watch:
        for data in calls:
            request = pb.ForwardBackwardRequest(
                model_id=model_id, loss_fn=LOSS, data=data, tensor_format=plain
            )
            stream = stubs.training.ForwardBackward(iter([request]), timeout=100)
            outputs = [output for response in stream for output in response.outputs]
            assert len(outputs) == len(data)
            watch.answered(grpc.StatusCode.OK)
        score = pb.ComputeLogprobsRequest(
            prompt=prompt, topk_prompt_logprobs=64, tensor_format=plain
        )
        scored = stubs.sampler.ComputeLogprobs(score, timeout=60).prompt_logprobs
        assert len(scored.topk_logprobs.floats) == 500 * 64
        listed = pb.ListCheckpointsRequest(model_id=model_id, page_size=1000)
        names = []
        while True:
            page = stubs.checkpoint.ListCheckpoints(listed, timeout=60)
            names += [checkpoint.name for checkpoint in page.checkpoints]
            if not page.next_page_token:
                break
            listed.page_token = page.next_page_token
    assert sorted(names) == sorted(f"fat{i}" for i in range(12))
