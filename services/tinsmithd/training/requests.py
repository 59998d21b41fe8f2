"""Reads the streamed calls, Forward and ForwardBackward, into one checked value.

A call that cannot be read is still a call: it has a digest and takes its number, and `refusal`
says what is wrong with it.
"""

import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from google.protobuf.message import Message

from tinsmith.v1 import training_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmithd.convert import types as convert
from tinsmithd.convert.tensors import check_format
from tinsmithd.domain import BaseModelInfo, CrossEntropy, LossFn
from tinsmithd.errors import Internal, InvalidArgument, Reason, TinsmithError, over_limit
from tinsmithd.rpc.intake import is_inline, off_loop
from tinsmithd.training.call import ComputeWork, RefusedWork, Work, check_datum

ComputeRequest = pb.ForwardRequest | pb.ForwardBackwardRequest
_HEADER_FIELDS = ("model_id", "seq_id", "loss_fn", "tensor_format")

_log = logging.getLogger(__name__)


@dataclass
class ComputeCall:
    """One Forward or ForwardBackward call, all its messages read.

    Attributes:
        loss: The loss with its defaults filled in, as the wire has it.
        packed: Its data, as the wire has them.
        lengths: Tokens of each datum.
        refusal: What is wrong with it.
    """

    model_id: str
    seq_id: int
    tensor_format: int
    digest: bytes = b""
    loss: bytes = b""
    packed: list[bytes] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    refusal: TinsmithError | None = None

    def work(self, *, backward: bool) -> Work:
        """What it asks for."""
        if self.refusal is not None:
            return RefusedWork(self.refusal)
        return ComputeWork(self.loss, self.packed, self.lengths, backward)

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return sum(map(len, self.packed))


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
        request: What was read of it.
        refusal: Stands for what was not.
    """
    content = request.DESCRIPTOR.full_name.encode() + b"\0"
    content += request.SerializeToString(deterministic=True)
    if refusal is not None:
        content += b"\0" + str(refusal).encode()
    return hashlib.sha256(content).digest()


async def read_header(requests: AsyncIterator[ComputeRequest]) -> ComputeRequest:
    """The first message of a call.

    Raises:
        InvalidArgument: The stream ended without any (MALFORMED_STREAM).
    """
    async for first in requests:
        return first
    raise InvalidArgument("", "the call has no message", Reason.MALFORMED_STREAM)


def read_work(read: Callable[[], Work]) -> Work:
    """What a unary call asks for; that it is refused where `read` raises."""
    with refusals() as found:
        return read()
    return RefusedWork(found[0])


@contextlib.contextmanager
def refusals() -> Iterator[list[TinsmithError]]:
    """Turn what is raised while a call is read into its refusal, under its number.

    What is not a refusal by itself is a fault of ours: it is logged, and the call is INTERNAL.
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
    """An error to keep: without the frames that raised it, which hold the call's messages."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


async def read_call(
    requests: AsyncIterator[ComputeRequest],
    find: Callable[[str], BaseModelInfo],
    limits: DataLimits,
) -> ComputeCall:
    """Read a call to its end; what is wrong with it goes into `refusal`.

    A message is not kept beside what is made of it, nor until the next one is there.

    Args:
        requests: Its messages.
        find: Says by a model's id which base model the data are checked against.
        limits: Bounds.

    Raises:
        InvalidArgument: There is no message (MALFORMED_STREAM).
        TinsmithError: What `find` raised.
    """
    first = await read_header(requests)
    call = ComputeCall(first.model_id, first.seq_id, first.tensor_format)
    reader = _Reader(call, first, find(first.model_id), limits)
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
    call.digest = reader.content.digest()
    if call.refusal is not None:
        call.packed, call.lengths = [], []
    return call


async def _take(reader: "_Reader", message: ComputeRequest) -> None:
    if is_inline() or not message.data:
        reader.take(message)
    else:
        await off_loop(reader.take, message)


class _Reader:
    """Takes a call's data in: counted, digested, and checked until something is wrong."""

    def __init__(
        self, call: ComputeCall, first: ComputeRequest, info: BaseModelInfo, limits: DataLimits
    ) -> None:
        self._call = call
        self._info = info
        self._limits = limits
        self._budget = _Budget(limits.data_per_call_max, limits.call_bytes_max)
        self._loss_fn: LossFn = CrossEntropy()
        self.content = hashlib.sha256(first.DESCRIPTOR.full_name.encode())
        self.content.update(first.loss_fn.SerializeToString(deterministic=True))
        with refusals() as found:
            check_format(first.tensor_format, "tensor_format")
            self._loss_fn = convert.loss_fn_from_pb(first.loss_fn, "loss_fn")
            call.loss = convert.loss_fn_to_pb(self._loss_fn).SerializeToString(deterministic=True)
        call.refusal = next(iter(found), None)

    def refuse(self, error: TinsmithError) -> None:
        """What comes is not read: the refusal stands for it in the digest. What was found wrong
        before may only be that something was not read."""
        self.content.update(b"\0" + str(error).encode())
        self._call.refusal = error

    def end(self) -> None:
        """All was taken."""
        if not self._budget.data and self._call.refusal is None:
            text = "must not be empty"
            self._call.refusal = InvalidArgument("data", text, Reason.MISSING_FIELD)

    def take(self, message: ComputeRequest) -> None:
        """Take the data of one message.

        Raises:
            InvalidArgument: They are too many or too large, and nothing more is to be read.
        """
        self._budget.check_count(len(message.data))
        for datum in message.data:
            packed = datum.SerializeToString(deterministic=True)
            index = self._budget.spend(len(packed))
            # Length first, so that two data cannot look like two others.
            self.content.update(len(packed).to_bytes(8, "little"))
            self.content.update(packed)
            if self._call.refusal is None:
                with refusals() as found:
                    self._check(datum, packed, f"data[{index}]")
                self._call.refusal = next(iter(found), None)

    def _check(self, message: types_pb2.Datum, packed: bytes, field: str) -> None:
        limits = self._limits
        datum = convert.datum_from_pb(
            message,
            field,
            chunks_max=limits.chunks_max,
            loss_fn_inputs_max=limits.loss_fn_inputs_max,
        )
        check_datum(field, datum, self._loss_fn, self._info, limits.targets_per_position_max)
        self._call.packed.append(packed)
        self._call.lengths.append(len(datum.tokens))


class _Budget:
    """Counts what a call holds and refuses what is too much."""

    def __init__(self, data_max: int, bytes_max: int) -> None:
        self._data_max = data_max
        self._bytes_max = bytes_max
        self._bytes = 0
        self.data = 0

    def check_count(self, more: int) -> None:
        """Refuse a message whose data would be too many, before they are touched."""
        if self.data + more > self._data_max:
            raise over_limit("data", "data_per_call_max", self.data + more, self._data_max)

    def spend(self, nbytes: int) -> int:
        """Count one more datum of so many bytes; returns its index."""
        self.data += 1
        self._bytes += nbytes
        if self._bytes > self._bytes_max:
            raise over_limit("data", "call_bytes_max", self._bytes, self._bytes_max)
        return self.data - 1


def _check_no_header(message: ComputeRequest) -> None:
    for name in _HEADER_FIELDS:
        descriptor = message.DESCRIPTOR.fields_by_name[name]
        if any(found is descriptor for found, _ in message.ListFields()):
            text = "belongs into the first message only"
            raise InvalidArgument(name, text, Reason.MALFORMED_STREAM)
