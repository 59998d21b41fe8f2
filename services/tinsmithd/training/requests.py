"""Reads the streamed calls, Forward and ForwardBackward, into one checked value.

A call that cannot be read is still a call: it has a digest and takes its number, and `refusal`
says what is wrong with it.
"""

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from google.protobuf.message import Message

from tinsmith.v1 import training_service_pb2 as pb
from tinsmithd.convert import types as convert
from tinsmithd.convert.tensors import check_format
from tinsmithd.domain import BaseModelInfo, CrossEntropy, Datum, LossFn
from tinsmithd.errors import InvalidArgument, Reason, TinsmithError
from tinsmithd.training.validate import check_data
from tinsmithd.training.works import ComputeWork, RefusedWork, Work

ComputeRequest = pb.ForwardRequest | pb.ForwardBackwardRequest
_HEADER_FIELDS = ("model_id", "seq_id", "loss_fn", "tensor_format")


@dataclass
class ComputeCall:
    """One Forward or ForwardBackward call, all its messages read."""

    model_id: str
    seq_id: int
    tensor_format: int
    digest: bytes = b""
    loss_fn: LossFn = field(default_factory=CrossEntropy)
    loss: bytes = b""
    data: list[Datum] = field(default_factory=list)
    packed: list[bytes] = field(default_factory=list)
    refusal: TinsmithError | None = None

    def work(self, info: BaseModelInfo, targets_per_position_max: int, *, backward: bool) -> Work:
        """What it asks for, once it is held against the base model, the loss and the limits."""
        try:
            if self.refusal is not None:
                raise self.refusal
            check_data(self.data, self.loss_fn, info, targets_per_position_max)
        except TinsmithError as error:
            return RefusedWork(error)
        lengths = [len(datum.tokens) for datum in self.data]
        return ComputeWork(self.loss, self.packed, lengths, backward)

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return sum(map(len, self.packed))


def digest_of(request: Message) -> bytes:
    """Digest of a unary call's content, equal for equal content."""
    name = request.DESCRIPTOR.full_name.encode()
    return hashlib.sha256(name + b"\0" + request.SerializeToString(deterministic=True)).digest()


async def read_header(requests: AsyncIterator[ComputeRequest]) -> ComputeRequest:
    """The first message of a call.

    Raises:
        InvalidArgument: The stream ended without any (MALFORMED_STREAM).
    """
    async for first in requests:
        return first
    raise InvalidArgument("", "the call has no message", Reason.MALFORMED_STREAM)


async def read_call(
    first: ComputeRequest,
    rest: AsyncIterator[ComputeRequest],
    *,
    data_per_call_max: int,
    call_bytes_max: int,
) -> ComputeCall:
    """Read a call to its end; what is wrong with it goes into `refusal`."""
    call = ComputeCall(first.model_id, first.seq_id, first.tensor_format)
    content = hashlib.sha256(first.DESCRIPTOR.full_name.encode())
    content.update(first.loss_fn.SerializeToString(deterministic=True))
    budget = _Budget(data_per_call_max, call_bytes_max)
    try:
        check_format(first.tensor_format, "tensor_format")
        call.loss_fn = convert.loss_fn_from_pb(first.loss_fn, "loss_fn")
        call.loss = convert.loss_fn_to_pb(call.loss_fn).SerializeToString(deterministic=True)
    except InvalidArgument as error:
        call.refusal = error
    try:
        _take(call, content, budget, first)
        async for message in rest:
            _check_no_header(message)
            _take(call, content, budget, message)
    except InvalidArgument as error:  # not worth reading on
        call.refusal = call.refusal or error
    call.digest = content.digest()
    if call.refusal is not None:
        call.data, call.packed = [], []
    return call


class _Budget:
    """Counts what a call holds and refuses the datum that is too much."""

    def __init__(self, data_max: int, bytes_max: int) -> None:
        self._data_max = data_max
        self._bytes_max = bytes_max
        self._data = 0
        self._bytes = 0

    def spend(self, nbytes: int) -> int:
        """Count one more datum of so many bytes; returns its index."""
        self._data += 1
        self._bytes += nbytes
        for limit, value, most in (
            ("data_per_call_max", self._data, self._data_max),
            ("call_bytes_max", self._bytes, self._bytes_max),
        ):
            if value > most:
                raise InvalidArgument(
                    "data",
                    f"{limit} is {most}",
                    Reason.LIMIT_EXCEEDED,
                    metadata={"limit": limit, "value": str(value)},
                )
        return self._data - 1


def _check_no_header(message: ComputeRequest) -> None:
    for name in _HEADER_FIELDS:
        descriptor = message.DESCRIPTOR.fields_by_name[name]
        if any(found is descriptor for found, _ in message.ListFields()):
            text = "belongs into the first message only"
            raise InvalidArgument(name, text, Reason.MALFORMED_STREAM)


def _take(
    call: ComputeCall, content: "hashlib._Hash", budget: _Budget, message: ComputeRequest
) -> None:
    for datum in message.data:
        packed = datum.SerializeToString(deterministic=True)
        index = budget.spend(len(packed))
        # Length first, so that two data cannot look like two others.
        content.update(len(packed).to_bytes(8, "little"))
        content.update(packed)
        if call.refusal is None:
            try:
                call.data.append(convert.datum_from_pb(datum, f"data[{index}]"))
                call.packed.append(packed)
            except InvalidArgument as error:
                call.refusal = error
