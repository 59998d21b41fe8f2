"""Requests before they are parsed: their items are counted, and nothing unknown is passed over."""

from typing import Any

import pytest
from google.protobuf.message import Message

from tinsmith.v1 import (
    checkpoint_service_pb2,
    sampler_service_pb2,
    training_service_pb2,
    types_pb2,
)
from tinsmithd.errors import InvalidArgument, Reason, ResourceExhausted, TinsmithError
from tinsmithd.rpc import intake
from tinsmithd.rpc.intake import (
    FEW_ITEMS,
    FEW_ITEMS_INLINE_BYTES,
    INLINE_BYTES,
    Intake,
    is_inline,
    refusal_of_call,
    walk,
)

ForwardRequest = training_service_pb2.ForwardRequest
TENSOR = types_pb2.Tensor(dtype=types_pb2.DTYPE_INT64, shape=[2], ints=[1, 300])
CHUNK = types_pb2.ModelInputChunk(tokens=TENSOR)
DATUM = types_pb2.Datum(
    model_input=types_pb2.ModelInput(chunks=[CHUNK, CHUNK]), loss_fn_inputs={"weights": TENSOR}
)
CALL = ForwardRequest(model_id="m", seq_id=7, data=[DATUM, DATUM])
TENSOR_ITEMS = 1 + 2 + 3  # dtype, shape and ints; one dimension, two numbers
DATUM_ITEMS = 1 + 2 * (1 + 1 + TENSOR_ITEMS) + 1 + 1 + 1 + TENSOR_ITEMS + len("weights") // 4
CALL_ITEMS = 2 + 2 * (1 + DATUM_ITEMS)
MIB = 1 << 20


async def read(data: bytes, kind: type[Message] = ForwardRequest, items: int = 1 << 18) -> Message:
    """One request, as a server reads it; with `items` below its bytes it is walked."""
    message = await Intake(kind, MIB, items).request(data)
    error = refusal_of_call()
    if error is not None:
        raise error
    return message


async def refused(data: bytes, *args: Any) -> TinsmithError:
    """What a request is refused with."""
    with pytest.raises(TinsmithError) as refusal:
        await read(data, *args)
    return refusal.value


async def test_items_are_counted_before_a_message_is_parsed() -> None:
    """Each field at each level and each plain number is one item, packed or not."""
    data = CALL.SerializeToString()
    assert len(data) > CALL_ITEMS
    assert await read(data, ForwardRequest, CALL_ITEMS) == CALL
    error = await refused(data, ForwardRequest, CALL_ITEMS - 1)
    assert (error.reason, error.field) == (Reason.LIMIT_EXCEEDED, "data")
    assert error.metadata == {
        "limit": "message_items_max",
        "value": str(CALL_ITEMS),
        "allowed": str(CALL_ITEMS - 1),
    }
    unpacked = b"\x10\x01\x10\x01\x10\x01"  # Tensor.shape, a field for each
    assert await read(unpacked, types_pb2.Tensor, 3) == types_pb2.Tensor(shape=[1, 1, 1])
    assert (await refused(unpacked, types_pb2.Tensor, 2)).reason is Reason.LIMIT_EXCEEDED


async def test_a_message_that_is_too_large_is_not_even_walked() -> None:
    """RESOURCE_EXHAUSTED, with the limit."""
    error = await refused(bytes(MIB + 1))
    assert isinstance(error, ResourceExhausted)
    assert error.metadata == {"limit": "message_bytes_max", "value": str(MIB + 1)}


UNKNOWN = b"\xa2\x1f\x01x"  # field 500, length-delimited


def call_of(nbytes: int, items: int = 8) -> Message:
    """A call with a tensor of so many bytes and so many items in all."""
    assert items >= 8  # seven fields, and a dimension
    tensor = types_pb2.Tensor(shape=[1] * (items - 7), data=bytes(nbytes))
    chunk = types_pb2.ModelInputChunk(tokens=tensor)
    datum = types_pb2.Datum(model_input=types_pb2.ModelInput(chunks=[chunk]))
    return ForwardRequest(model_id="m", data=[datum])


@pytest.mark.parametrize(
    ("call", "inline"),
    [
        (call_of(0, INLINE_BYTES // 2), True),  # small, whatever is in it
        (call_of(INLINE_BYTES, FEW_ITEMS), True),
        (call_of(FEW_ITEMS_INLINE_BYTES - 1000), True),
        (call_of(INLINE_BYTES, FEW_ITEMS + 1), False),
        (call_of(FEW_ITEMS_INLINE_BYTES), False),
    ],
)
async def test_what_has_few_items_is_worked_on_in_the_event_loop(
    call: Message, *, inline: bool
) -> None:
    """Many items, or very many bytes, leave it."""
    assert await read(call.SerializeToString()) == call
    assert is_inline() is inline


async def test_a_long_message_of_few_items_is_refused_like_any_other() -> None:
    """For what is unknown, by its path; for what is cut; and for too many items."""
    data = call_of(INLINE_BYTES).SerializeToString()
    error = await refused(data + nested(0x22, UNKNOWN))
    assert (error.reason, error.field) == (Reason.INVALID_FIELD, "data[1].500")
    assert not is_inline()
    assert (await refused(data[:-1])).reason is Reason.MALFORMED_STREAM
    assert (await refused(data, ForwardRequest, 7)).reason is Reason.LIMIT_EXCEEDED


def nested(tag: int, content: bytes) -> bytes:
    """A field with a message in it."""
    assert len(content) < 128
    return bytes([tag, len(content)]) + content


@pytest.mark.parametrize("walked", [False, True])
@pytest.mark.parametrize(
    ("data", "field"),
    [
        (UNKNOWN, "500"),
        (nested(0x1A, UNKNOWN), "loss_fn.500"),
        (nested(0x22, b"") + nested(0x22, nested(0x0A, UNKNOWN)), "data[1].model_input.500"),
        (nested(0x22, nested(0x12, b"\x0a\x01w" + nested(0x12, UNKNOWN))), None),
        (b"\x0d\0\0\0\0", "1"),  # model_id, with the wire type of a float
        (b"\xa3\x1f\xa4\x1f", "500"),  # a group
    ],
)
async def test_what_is_unknown_is_refused_with_its_path(
    data: bytes, field: str | None, *, walked: bool
) -> None:
    """In small messages and in those that are walked first, at every level."""
    header = b"\x0a\x01m\x10\x07"
    error = await refused(header + data, ForwardRequest, 6 if walked else 1 << 18)
    if walked and error.reason is Reason.LIMIT_EXCEEDED:
        return  # there were more items before it
    assert isinstance(error, InvalidArgument)
    assert error.reason is Reason.INVALID_FIELD
    assert error.field == (field or 'data[0].loss_fn_inputs["w"].500')


def every_message() -> list[type[Message]]:
    """All messages of the contract."""
    modules = (types_pb2, training_service_pb2, sampler_service_pb2, checkpoint_service_pb2)
    found = []
    for module in modules:
        names = module.DESCRIPTOR.message_types_by_name
        found += [getattr(module, name) for name in names]
    return found


@pytest.mark.parametrize("kind", every_message(), ids=lambda kind: kind.__name__)
async def test_no_message_of_the_contract_takes_what_it_does_not_know(kind: type[Message]) -> None:
    """A newer client's field or case of a oneof is refused, never taken for a default."""
    assert (await refused(UNKNOWN, kind)).field == "500"
    assert (await refused(UNKNOWN, kind, 2)).field == "500"


async def test_a_refused_call_still_says_which_call_it_is() -> None:
    """Its number is used; a request without one is refused at once."""
    for items in (3, 1 << 18):
        reader = Intake(ForwardRequest, MIB, items)
        found = await reader.request(CALL.SerializeToString() + UNKNOWN)
        assert (found.model_id, found.seq_id) == ("m", 7)  # type: ignore[attr-defined]
        assert refusal_of_call() is not None
    with pytest.raises(InvalidArgument):
        await Intake(training_service_pb2.GetModelRequest, MIB, 9).request(UNKNOWN)


async def test_the_refusal_of_a_streamed_request_follows_what_can_be_read() -> None:
    """So that a call's header is known before its fault."""

    async def requests() -> Any:
        yield CALL.SerializeToString() + UNKNOWN

    stream = Intake(ForwardRequest, MIB, 1 << 18).stream(requests())
    assert await anext(stream) == CALL
    with pytest.raises(InvalidArgument):
        await anext(stream)


def test_an_endless_number_is_not_walked_to_its_end() -> None:
    """It is one item, and would be half a megabyte of steps in the event loop."""
    longest = b"\x10" + b"\xff" * 9 + b"\x01"
    assert walk(longest, ForwardRequest.DESCRIPTOR, 1) is None
    with pytest.raises(IndexError):
        walk(b"\x10" + b"\x80" * 99 + b"\x01", ForwardRequest.DESCRIPTOR, 1)


@pytest.mark.parametrize("items", [1, 1 << 18])
@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",
        b"\x0a\x05m",
        b"\x80" * 12,
        b"\x22\x02\x0a\x05\x00\x00",
        b"\x00\x00",
    ],
)
async def test_what_is_no_message_is_refused(data: bytes, items: int) -> None:
    """Cut fields, endless numbers, fields that reach out of their message."""
    error = await refused(data, ForwardRequest, items)
    assert isinstance(error, InvalidArgument)


def test_walking_agrees_with_parsing_on_all_prefixes() -> None:
    """What one takes for a message, the other does, too."""
    data = CALL.SerializeToString()
    descriptor: Any = CALL.DESCRIPTOR
    for end in range(len(data)):
        try:
            ForwardRequest.FromString(data[:end])
            parsed = True
        except Exception:
            parsed = False
        try:
            intake.walk(data[:end], descriptor, 1000)
            walked = True
        except IndexError:
            walked = False
        assert parsed == walked, end
