"""Reads the requests of a call into one checked `Call`.

A call that cannot be read is still a call: it has a digest and takes its number, and its work says
what is wrong with it.
"""

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from google.protobuf.message import Message

from tinsmith.v1 import training_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmithd.convert import types as convert
from tinsmithd.convert.plain import PlainData
from tinsmithd.convert.tensors import check_format
from tinsmithd.domain import BaseModelInfo, CrossEntropy, LossFn
from tinsmithd.errors import Internal, InvalidArgument, Reason, TinsmithError, over_limit
from tinsmithd.rpc.intake import is_inline, off_loop
from tinsmithd.training.call import Call, ComputeWork, RefusedWork, Work, check_datum

ComputeRequest = pb.ForwardRequest | pb.ForwardBackwardRequest
_HEADER_FIELDS = ("model_id", "seq_id", "loss_fn", "tensor_format", "acknowledge")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamedCall:
    """A Forward or ForwardBackward call, all its requests read.

    Attributes:
        model_id: Whose call.
        tensor_format: How the caller wants its outputs.
        call: What it asks for.
    """

    model_id: str
    tensor_format: int
    call: Call


@dataclass(frozen=True)
class DataLimits:
    """Bounds on the data of one call; the names are those of the settings."""

    data_per_call_max: int
    call_bytes_max: int
    chunks_max: int
    loss_fn_inputs_max: int
    targets_per_position_max: int


def digest_of(request: Message, refusal: TinsmithError | None = None) -> bytes:
    """Digest of a unary call's content, equal for equal content.

    Args:
        request: What could be read of it.
        refusal: Stands for what could not.
    """
    content = request.DESCRIPTOR.full_name.encode() + b"\0"
    content += request.SerializeToString(deterministic=True)
    if refusal is not None:
        content += b"\0" + str(refusal).encode()
    return hashlib.sha256(content).digest()


async def read_header(requests: AsyncIterator[ComputeRequest]) -> ComputeRequest:
    """The first request of a call.

    Raises:
        InvalidArgument: The stream ended without any (MALFORMED_STREAM).
    """
    async for first in requests:
        return first
    raise InvalidArgument("", "the call has no message", Reason.MALFORMED_STREAM)


def read_work(read: Callable[[], Work]) -> Work:
    """What a unary call asks for; `RefusedWork` where `read` raises."""
    with refusals() as found:
        return read()
    return RefusedWork(found[0])


@contextlib.contextmanager
def refusals() -> Iterator[list[TinsmithError]]:
    """Turn errors of the body of the `with` into the refusal of a call, under its number.

    An error that is no refusal by itself is a fault of ours: the log has it, the call is INTERNAL.
    """
    found: list[TinsmithError] = []
    try:
        yield found
    except InvalidArgument as error:
        found.append(_bare(error))
    except TinsmithError:
        raise  # such as RESOURCE_EXHAUSTED, which uses no number
    except Exception as error:
        _log.error("a call cannot be read", exc_info=error)
        found.append(Internal())


def _bare(error: TinsmithError) -> TinsmithError:
    """An error to keep: without the frames that raised it, which hold the call's requests."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


async def read_call(
    requests: AsyncIterator[ComputeRequest],
    find: Callable[[str], BaseModelInfo],
    limits: DataLimits,
) -> StreamedCall:
    """Read a call to its end; one that is wrong asks for `RefusedWork`.

    No request is kept beside what is made of it, nor until the next one is there.

    Args:
        requests: Its requests.
        find: Gives the base model of a model; the data have to fit it.
        limits: Bounds.

    Raises:
        InvalidArgument: There is no message (MALFORMED_STREAM).
        TinsmithError: What `find` raised.
    """
    first = await read_header(requests)
    model_id, seq_id, tensor_format = first.model_id, first.seq_id, first.tensor_format
    reader = _Reader(first, find(model_id), limits)
    acknowledge = first.acknowledge
    try:
        await _take(reader, first)
        del first
        async for message in requests:
            _check_no_header(message)
            await _take(reader, message)
            del message
        reader.end()
    except InvalidArgument as error:  # not worth reading on
        reader.refuse(_bare(error))
    call = dataclasses.replace(reader.call(seq_id), acknowledge=acknowledge and seq_id > 0)
    return StreamedCall(model_id, tensor_format, call)


async def _take(reader: "_Reader", message: ComputeRequest) -> None:
    if is_inline() or not message.data:
        reader.take(message)
    else:
        await off_loop(reader.take, message)


class _Reader:
    """Takes a call's data in: counted, digested, and checked until something is wrong."""

    def __init__(self, first: ComputeRequest, info: BaseModelInfo, limits: DataLimits) -> None:
        self._backward = isinstance(first, pb.ForwardBackwardRequest)
        self._loss = b""
        self._data: list[bytes] = []
        self._lengths: list[int] = []
        self._info = info
        self._limits = limits
        self._budget = _Budget(limits.data_per_call_max, limits.call_bytes_max)
        self._loss_fn: LossFn = CrossEntropy()
        self._content = hashlib.sha256(first.DESCRIPTOR.full_name.encode())
        self._content.update(first.loss_fn.SerializeToString(deterministic=True))
        with refusals() as found:
            check_format(first.tensor_format, "tensor_format")
            self._loss_fn = convert.loss_fn_from_pb(first.loss_fn, "loss_fn")
            loss = convert.loss_fn_to_pb(self._loss_fn)
            self._loss = loss.SerializeToString(deterministic=True)
        self._refusal = next(iter(found), None)
        self._plain = PlainData(self._loss_fn, info, limits.loss_fn_inputs_max)

    def call(self, seq_id: int) -> Call:
        """The call that was read."""
        digest = self._content.digest()
        if self._refusal is not None:
            return Call(seq_id, digest, RefusedWork(self._refusal))
        work = ComputeWork(self._loss, self._data, self._lengths, self._backward)
        return Call(seq_id, digest, work, work.nbytes)

    def refuse(self, error: TinsmithError) -> None:
        """Nobody reads the rest: the refusal stands for it in the digest, in place of any earlier
        refusal, whose cause may only be that something was not read."""
        self._content.update(b"\0" + str(error).encode())
        self._refusal = error

    def end(self) -> None:
        """All requests were taken."""
        if not self._budget.data and self._refusal is None:
            text = "must not be empty"
            self._refusal = InvalidArgument("data", text, Reason.MISSING_FIELD)

    def take(self, message: ComputeRequest) -> None:
        """Take the data of one request.

        Raises:
            InvalidArgument: They are too many or too large: nobody reads on.
        """
        self._budget.check_count(len(message.data))
        first, data = self._budget.data, message.data
        packed = [self._pack(datum) for datum in data]
        if self._refusal is not None:
            return
        with refusals() as found:
            lengths = self._plain.lengths(data)
            if lengths is None:
                named = ((f"data[{first + index}]", datum) for index, datum in enumerate(data))
                lengths = [self._checked(field, datum) for field, datum in named]
            self._data += packed
            self._lengths += lengths
        self._refusal = next(iter(found), None)

    def _pack(self, datum: types_pb2.Datum) -> bytes:
        """The bytes of a datum, which are counted and digested."""
        packed = datum.SerializeToString(deterministic=True)
        self._budget.spend(len(packed))
        # Length first, so that two data cannot look like two others.
        self._content.update(len(packed).to_bytes(8, "little"))
        self._content.update(packed)
        return packed

    def _checked(self, field: str, message: types_pb2.Datum) -> int:
        """Tokens of a datum that is right, or what is wrong with it."""
        limits = self._limits
        datum = convert.datum_from_pb(
            message,
            field,
            chunks_max=limits.chunks_max,
            loss_fn_inputs_max=limits.loss_fn_inputs_max,
        ).completed(self._loss_fn)
        check_datum(field, datum, self._loss_fn, self._info, limits.targets_per_position_max)
        return len(datum.tokens)


class _Budget:
    """Counts what a call holds and refuses what is too much."""

    def __init__(self, data_max: int, bytes_max: int) -> None:
        self._data_max = data_max
        self._bytes_max = bytes_max
        self._bytes = 0
        self.data = 0

    def check_count(self, more: int) -> None:
        """Refuse a request whose data would be too many, before anybody touches them."""
        if self.data + more > self._data_max:
            raise over_limit("data", "data_per_call_max", self.data + more, self._data_max)

    def spend(self, nbytes: int) -> None:
        """Count one more datum of so many bytes."""
        self.data += 1
        self._bytes += nbytes
        if self._bytes > self._bytes_max:
            raise over_limit("data", "call_bytes_max", self._bytes, self._bytes_max)


def _check_no_header(message: ComputeRequest) -> None:
    for name in _HEADER_FIELDS:
        descriptor = message.DESCRIPTOR.fields_by_name[name]
        if any(found is descriptor for found, _ in message.ListFields()):
            text = "belongs into the first message only"
            raise InvalidArgument(name, text, Reason.MALFORMED_STREAM)
