"""The calls of one model, as messages: built and checked in the caller's thread, then numbered.

Nothing of a caller's is read once a call has its number, and nothing that is wrong with it is found
out after that.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import grpc

from tinsmith._connection import Connection
from tinsmith._convert import ComputeRequest, loss_fn_to_pb, output_from_pb, requests_of
from tinsmith._custom_loss import (
    CustomLossFn,
    backward_data,
    forward_data,
    metrics_of,
    run_loss,
)
from tinsmith._lane import Lane
from tinsmith.errors import InternalError, UnimplementedError, from_rpc_error
from tinsmith.types import Datum, ForwardBackwardOutput
from tinsmith.v1 import training_service_pb2 as pb

CALL_DIGEST = "tinsmith-call-digest-bin"
ASK_AGAIN_BYTES = 64 * 1024
"""A larger call is asked for after a lost connection, and sent again only where that fails."""


class Calls:
    """Makes the calls of one model.

    Args:
        connection: Where to.
        model_id: Which model.
        lane: Numbers them.
    """

    def __init__(self, connection: Connection, model_id: str, lane: Lane) -> None:
        self._connection = connection
        self._model_id = model_id
        self._lane = lane

    def unary(
        self, what: str, method: str, message: Any, read: Callable[[Any], Any]
    ) -> "Future[Any]":
        """Make a call of one message.

        Args:
            what: Names the call for a person.
            method: The stub's method.
            message: The call without its model and number.
            read: Makes the result of the answer.
        """
        message.model_id = self._model_id

        async def start(numbers: Sequence[int]) -> Any:
            message.seq_id = numbers[0]

            async def attempt() -> Any:
                return await getattr(self._connection.training(), method)(message)

            return read(await self._lane.call(what, numbers[0], attempt))

        return self._lane.submit(1, start)

    def compute(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        config: Mapping[str, float | str] | None,
        *,
        backward: bool,
    ) -> "Future[ForwardBackwardOutput]":
        """Make a forward or a forward_backward call."""
        kind = pb.ForwardBackwardRequest if backward else pb.ForwardRequest
        requests = requests_of(kind, data, loss_fn_to_pb(loss_fn, config))
        count = len(data)

        async def start(numbers: Sequence[int]) -> ForwardBackwardOutput:
            return await self._send(numbers[0], count, requests)

        return self._lane.submit(1, start)

    def custom(
        self, data: Sequence[Datum], loss_fn: CustomLossFn
    ) -> "Future[ForwardBackwardOutput]":
        """Make the two calls of a custom loss, with the loss between them."""
        prepared = forward_data(data)
        count = len(data)
        loss = loss_fn_to_pb("cross_entropy", None)
        requests = requests_of(pb.ForwardRequest, prepared, loss)

        async def start(numbers: Sequence[int]) -> ForwardBackwardOutput:
            first, second = numbers
            forward = await self._send(first, count, requests)
            logprobs = [output["logprobs"] for output in forward.loss_fn_outputs]
            arrays = [tensor.view() for tensor in logprobs]
            done, error = await asyncio.to_thread(_caught, run_loss, loss_fn, list(data), arrays)
            if error is not None:
                raise error
            value, metrics, gradients = done
            weighted = backward_data(prepared, gradients)
            output = await self._send(
                second, count, requests_of(pb.ForwardBackwardRequest, weighted, loss)
            )
            return output.model_copy(update={"metrics": metrics_of(value, metrics, output.metrics)})

        return self._lane.submit(2, start)

    async def _send(
        self, seq_id: int, count: int, requests: Sequence[ComputeRequest]
    ) -> ForwardBackwardOutput:
        requests[0].model_id, requests[0].seq_id = self._model_id, seq_id
        backward = isinstance(requests[0], pb.ForwardBackwardRequest)
        is_large = len(requests) > 1 or requests[0].ByteSize() > ASK_AGAIN_BYTES

        digest = b""  # once the service has said that it has the whole call

        async def attempt() -> ForwardBackwardOutput:
            nonlocal digest
            if digest:  # its answer may be there by now, and no data need be sent for it
                try:
                    return await self._answer(seq_id, digest, count)
                except grpc.RpcError as error:
                    if not _is_unknown(error):
                        raise
            stub = self._connection.training()
            method: Any = stub.ForwardBackward if backward else stub.Forward
            call = method(iter(requests))
            if is_large:
                digest = _digest_in(await call.initial_metadata())
            return await _read(call, count)

        what = "forward_backward" if backward else "forward"
        return await self._lane.call(what, seq_id, attempt)

    async def _answer(self, seq_id: int, digest: bytes, count: int) -> ForwardBackwardOutput:
        """The answer of a call that the service has, without sending it again."""
        request = pb.GetAnswerRequest(model_id=self._model_id, seq_id=seq_id, call_digest=digest)
        call = self._connection.training().GetAnswer(request)
        return await _read(call, count, lambda response: getattr(response, _case_of(response)))


async def _read(
    call: Any, count: int, part: Callable[[Any], Any] = lambda response: response
) -> ForwardBackwardOutput:
    """Read the answer of a computed call; `part` of each message has outputs and metrics."""
    outputs: list[Any] = []
    metrics: dict[str, float] = {}
    async for response in call:
        found = part(response)
        outputs.extend(found.outputs)
        metrics.update(found.metrics)
    try:
        return output_from_pb(outputs, metrics, count)
    except ValueError as error:
        raise InternalError(f"the answer cannot be read: {error}") from None


def _case_of(response: pb.GetAnswerResponse) -> str:
    case = response.WhichOneof("response")
    if case not in ("forward", "forward_backward"):
        raise InternalError(f"the answer is one of {case or 'an unknown call'}")
    return case


def _digest_in(metadata: Any) -> bytes:
    return next((value for key, value in metadata or () if key == CALL_DIGEST), b"")


def _is_unknown(error: grpc.RpcError) -> bool:
    """Whether the call has to be sent: the service does not have it, or cannot be asked for it."""
    failure = from_rpc_error(error)
    return failure.reason == "CALL_NOT_FOUND" or isinstance(failure, UnimplementedError)


def _caught(function: Callable[..., Any], *args: Any) -> tuple[Any, BaseException | None]:
    """What a user's function returns or raises: some exceptions cannot pass through a future."""
    try:
        return function(*args), None
    except BaseException as error:
        return None, error
