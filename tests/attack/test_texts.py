"""What a caller says reaches a log, a status or a metric only escaped and cut."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from attack.requests import ENDLESS
from clusters import RunningCluster
from tinsmith.v1 import checkpoint_service_pb2, sampler_service_pb2, training_service_pb2
from wire import reason_and_field

TRAILER_BYTES_MAX = 8 * 1024
"""gRPC's clients begin to refuse more."""
FORGED = "12:00:00 training ERROR the server is on fire"
TEXT = f"x\n{FORGED}\r\n\x1b[31m\u202e" + "%\u00e9\u4e2d" * 30_000
LINE = re.compile(rb"^(\d\d:\d\d:\d\d (training|sampler|checkpoint|trainer) [A-Z]+ |  \| )")
DEPTH_MAX = 5

SERVICES = {
    "training": training_service_pb2.DESCRIPTOR.services_by_name["TrainingService"],
    "sampler": sampler_service_pb2.DESCRIPTOR.services_by_name["SamplerService"],
    "checkpoint": checkpoint_service_pb2.DESCRIPTOR.services_by_name["CheckpointService"],
}
METHODS = [(name, m) for name, service in SERVICES.items() for m in service.methods]


def places(message: Descriptor, depth: int = 0) -> Iterator[tuple[FieldDescriptor, ...]]:
    """The way to each text in a message."""
    for field in message.fields:
        if field.type == field.TYPE_STRING:
            yield (field,)
        elif field.message_type is not None and depth < DEPTH_MAX:
            for rest in places(field.message_type, depth + 1):
                yield (field, *rest)


def put(message: Any, way: tuple[FieldDescriptor, ...], text: str) -> None:
    """Set one text of a message, however deep."""
    field, *rest = way
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entries, value = getattr(message, field.name), field.message_type.fields_by_name["value"]
        if rest[0].name == "key" and value.message_type is not None:
            entries[text].SetInParent()
        elif rest[0].name == "key":
            entries[text] = value.default_value
        elif len(rest) == 1:
            entries["key"] = text
        else:
            put(entries["key"], tuple(rest[1:]), text)
    elif not rest and field.is_repeated:
        getattr(message, field.name).append(text)
    elif not rest:
        setattr(message, field.name, text)
    elif field.is_repeated:
        put(getattr(message, field.name).add(), tuple(rest), text)
    else:
        put(getattr(message, field.name), tuple(rest), text)


def call(channel: grpc.Channel, method: MethodDescriptor, request: Any) -> grpc.RpcError | None:
    """Make a call of one message; returns what it failed with."""
    kind = ("stream" if method.client_streaming else "unary") + "_"
    kind += "stream" if method.server_streaming else "unary"
    make = getattr(channel, kind)(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    argument = iter([request]) if method.client_streaming else request
    try:
        response = make(argument, timeout=60)
        if method.server_streaming:
            for _ in response:
                if method.name in ENDLESS:
                    response.cancel()
                    return None
    except grpc.RpcError as error:
        return error
    return None


def trailer_bytes(error: grpc.RpcError) -> int:
    """Size of what a refusal sends, as HTTP/2 counts it but for a few bytes."""
    assert isinstance(error, grpc.Call)
    total = sum(len(key) + len(value) * 4 // 3 + 32 for key, value in error.trailing_metadata())
    message = (error.details() or "").encode()
    return total + sum(1 if 0x20 <= byte < 0x7F and byte != 0x25 else 3 for byte in message)


@pytest.fixture(scope="module")
def channels(cluster: RunningCluster) -> Iterator[Mapping[str, grpc.Channel]]:
    opened = {name: grpc.insecure_channel(at) for name, at in cluster.addresses.items()}
    yield opened
    for channel in opened.values():
        channel.close()


@pytest.mark.parametrize(("name", "method"), METHODS, ids=[m.full_name for _, m in METHODS])
def test_a_refusal_of_any_text_keeps_its_reason(
    channels: Mapping[str, grpc.Channel], name: str, method: MethodDescriptor
) -> None:
    """No refusal is too large to arrive, whichever text of whichever request is long."""
    kind = GetMessageClass(method.input_type)
    for way in places(method.input_type):
        request = kind()
        put(request, way, TEXT)
        error = call(channels[name], method, request)
        where = ".".join(field.name for field in way)
        if error is None:
            continue
        assert isinstance(error, grpc.Call)
        reason, field = reason_and_field(error)
        assert error.code().name not in ("INTERNAL", "UNKNOWN"), where
        assert error.code().name != "INVALID_ARGUMENT" or field or reason == "MALFORMED_STREAM"
        assert trailer_bytes(error) < TRAILER_BYTES_MAX, where
        assert "\n" not in (error.details() or ""), where


def test_no_caller_writes_a_line_of_a_log(
    cluster: RunningCluster, channels: Mapping[str, grpc.Channel]
) -> None:
    """Each line of each log begins as the server's own lines do, and has an end."""
    for name, method in METHODS:
        for way in places(method.input_type):
            request = GetMessageClass(method.input_type)()
            put(request, way, TEXT)
            call(channels[name], method, request)
    lines = 0
    for log in sorted(cluster.logs.glob("*.log")):
        for line in log.read_bytes().splitlines():
            lines += 1
            assert not line.startswith(FORGED.encode()), log.name
            assert len(line) < 5000, log.name
            if b"forged" in line or b"on fire" in line:
                assert LINE.match(line), (log.name, line[:200])
    assert lines
