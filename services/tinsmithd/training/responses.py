"""Writes the answers of calls as messages: of the call's own RPC, and of GetAnswer."""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

from tinsmith.v1 import training_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmithd.convert.tensors import array_from_pb, write_array
from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.rpc.intake import INLINE_BYTES, off_loop
from tinsmithd.training.call import Answer, CallKind

RESPONSE_BYTES = 256 * 1024
"""A message has outputs of so many bytes, and of one datum more: each message costs as much time as
sending some tens of kilobytes."""

Computed = TypeVar("Computed", pb.ForwardResponse, pb.ForwardBackwardResponse)
Message = TypeVar("Message")


async def _messages(
    answer: Answer, tensor_format: int, new: Callable[[], tuple[Message, Computed]]
) -> AsyncIterator[Message]:
    """The messages of a computed answer.

    Args:
        answer: The answer, as it comes.
        tensor_format: How they carry tensors.
        new: Makes an empty message, and that in it which has outputs and metrics.
    """
    # Only size decides where a message ends, never timing: a repeat gets the same messages.
    (message, part), nbytes = new(), 0
    async for packed in answer.outputs():
        output = part.outputs.add()
        if tensor_format == types_pb2.TENSOR_FORMAT_PLAIN and len(packed) > INLINE_BYTES:
            await off_loop(_read_output, output, packed, tensor_format)
        else:
            _read_output(output, packed, tensor_format)
        nbytes += len(packed)
        if nbytes >= RESPONSE_BYTES:
            yield message
            (message, part), nbytes = new(), 0
    part.metrics.update((await answer.value())["metrics"])
    yield message


async def computed_to_pb(
    answer: Answer, tensor_format: int, kind: type[Computed]
) -> AsyncIterator[Computed]:
    """The answer of Forward or ForwardBackward.

    Args:
        answer: The answer, as it comes.
        tensor_format: How messages carry tensors.
        kind: Their type.
    """

    def new() -> tuple[Computed, Computed]:
        message = kind()
        return message, message

    async for message in _messages(answer, tensor_format, new):
        yield message


async def answer_to_pb(answer: Answer, tensor_format: int) -> AsyncIterator[pb.GetAnswerResponse]:
    """The answer of any call, as GetAnswer gives it."""
    kind = await answer.kind()
    if kind is CallKind.FORWARD or kind is CallKind.FORWARD_BACKWARD:

        def new() -> tuple[pb.GetAnswerResponse, Any]:
            message = pb.GetAnswerResponse()
            part = message.forward if kind is CallKind.FORWARD else message.forward_backward
            part.SetInParent()
            return message, part

        async for message in _messages(answer, tensor_format, new):
            yield message
        return
    value = await answer.value()
    match kind:
        case CallKind.OPTIM_STEP:
            yield pb.GetAnswerResponse(optim_step=step_to_pb(value))
        case CallKind.SAVE_CHECKPOINT:
            yield pb.GetAnswerResponse(save_checkpoint=saved_to_pb(value))
        case CallKind.LOAD_CHECKPOINT:
            yield pb.GetAnswerResponse(load_checkpoint=loaded_to_pb(value))
        case _:  # it ended with a value, so that it was no refused call
            text = "an older release of this server kept the answer, and not of which kind it is"
            raise FailedPrecondition(text, Reason.ANSWER_EXPIRED)


def step_to_pb(value: Mapping[str, Any]) -> pb.OptimStepResponse:
    """The answer of OptimStep."""
    return pb.OptimStepResponse(metrics=value["metrics"])


def saved_to_pb(value: Mapping[str, Any]) -> pb.SaveCheckpointResponse:
    """The answer of SaveCheckpoint."""
    return pb.SaveCheckpointResponse(
        checkpoint_path=value["path"],
        size_bytes=value["size_bytes"],
        digest=bytes.fromhex(value.get("digest", "")),  # an old journal has none
    )


def loaded_to_pb(value: Mapping[str, Any]) -> pb.LoadCheckpointResponse:
    """The answer of LoadCheckpoint."""
    return pb.LoadCheckpointResponse(checkpoint_path=value["path"])


def _read_output(output: pb.DatumOutput, packed: bytes, tensor_format: int) -> None:
    """Fill in one datum's output as the caller wants it; the ranks give it packed."""
    output.MergeFromString(packed)
    if tensor_format == types_pb2.TENSOR_FORMAT_PLAIN:
        for name in output.loss_fn_outputs:
            tensor = output.loss_fn_outputs[name]
            array = array_from_pb(tensor, name, "float")
            tensor.Clear()
            write_array(tensor, array, tensor_format)
