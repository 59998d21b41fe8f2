"""Reads the bytes of requests: what would cost too much is refused before it is parsed, and what
this server does not know is refused, never passed over.

Parsing holds the interpreter's lock, and with it the event loop: 32 MiB of empty messages take
seconds, whatever thread parses them. So the bytes of a large message are walked first, in a thread
and in small steps, and its items are counted. What has no more than `message_items_max` is parsed
in some tens of milliseconds. A message of fewer bytes than that cannot have more items, and is
parsed at once. One that has very few items, as a few long tensors are, is walked at once instead,
and what is made of it stays on the event loop: a thread would cost more than the work.

A refused call still uses its number (see `training_service.proto`). Of a request that has one, a
servicer therefore gets what could be read, and hears of the refusal when it asks: the stream raises
it next, and for a single request `refusal_of_call` says it.
"""

import asyncio
import contextvars
import functools
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from tinsmithd.errors import InvalidArgument, Reason, ResourceExhausted, TinsmithError, over_limit
from tinsmithd.processes import give_back_freed_memory

T = TypeVar("T")

HEADER_FIELDS = ("model_id", "seq_id")
HEADER_FIELD_BYTES_MAX = 1024
KEY_CHARACTERS_MAX = 100
"""What a path shows of the key of an entry."""
TEXT_BYTES_PER_ITEM = 4
"""Text is shown in refusals and compared, letter by letter."""
LEFT_BEHIND_BYTES = 4 * 1024 * 1024
"""A larger message has left much behind: it came to gRPC's core in pieces, which held twice its
bytes and are free now. They are given back before the message is read, or they would be there
beside all that is made of it."""
INLINE_BYTES = 32 * 1024
"""What is made of a message that is no larger takes up to some 20 ms, whatever is in it."""
FIELD_BYTES_MAX = 20
"""Bytes of a field that is one number: ten for its tag and ten for its value."""
FEW_ITEMS = 256
"""Walking a message that has no more takes up to 0.2 ms."""
FEW_ITEMS_INLINE_BYTES = 512 * 1024
"""Copying, hashing and comparing what such a message holds takes some milliseconds."""
THREADS = 2
"""They mostly wait for each other: a second one lets a short request pass a long one."""

_refusal: contextvars.ContextVar[TinsmithError | None] = contextvars.ContextVar(
    "refusal", default=None
)
_inline: contextvars.ContextVar[bool] = contextvars.ContextVar("inline", default=False)
_threads = ThreadPoolExecutor(THREADS, "intake")


async def off_loop(function: Callable[..., T], *args: Any) -> T:
    """Run what would hold up the event loop in a thread of the few that read requests."""
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *args)


def refusal_of_call() -> TinsmithError | None:
    """What is wrong with the one, numbered request of this call, if anything is."""
    return _refusal.get()


def is_inline() -> bool:
    """Whether the request that this call received last may be worked on in the event loop."""
    return _inline.get()


class Intake:
    """Reads the requests of one method.

    Args:
        kind: The type of its requests.
        message_bytes_max: A larger message is ResourceExhausted (MESSAGE_TOO_LARGE).
        message_items_max: One of more items is InvalidArgument (LIMIT_EXCEEDED).
        own: They come from another process of this cluster, and only their bytes are limited.
        items_limit: What a refusal calls `message_items_max`.
    """

    def __init__(
        self,
        kind: type[Message],
        message_bytes_max: int,
        message_items_max: int,
        *,
        own: bool = False,
        items_limit: str = "message_items_max",
    ) -> None:
        self._items_limit = items_limit
        self._kind = kind
        self._descriptor: Any = kind.DESCRIPTOR
        self._bytes_max = message_bytes_max
        self._items_max = message_items_max
        self._own = own
        self._numbered = all(name in kind.DESCRIPTOR.fields_by_name for name in HEADER_FIELDS)

    async def request(self, data: bytes) -> Message:
        """Read the one request of a call.

        Raises:
            TinsmithError: It is refused, and has no number or none that can be read.
        """
        message, error = await self._read(data)
        if error is not None and not self._numbered:
            del data, message  # an error keeps the frame that raises it
            raise error
        _refusal.set(error)
        return message

    async def stream(self, requests: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        """Read the requests of a call; the refusal of one follows what can be read of it.

        Raises:
            TinsmithError: A request is refused.
        """
        async for data in requests:
            message, error = await self._read(data)
            del data  # what was read is not kept until the next message is there
            if error is None or self._numbered:
                yield message
            del message
            if error is not None:
                raise error

    async def _read(self, data: bytes) -> tuple[Message, TinsmithError | None]:
        if len(data) > self._bytes_max:
            message = f"a message of {len(data)} bytes; message_bytes_max is {self._bytes_max}"
            metadata = {"limit": "message_bytes_max", "value": str(len(data))}
            raise ResourceExhausted(message, Reason.MESSAGE_TOO_LARGE, metadata=metadata)
        if self._own:
            return self._parse(data), None
        few = INLINE_BYTES < len(data) <= FEW_ITEMS_INLINE_BYTES and self._is_plain(data)
        _inline.set(few or len(data) <= INLINE_BYTES)
        if few:
            return self._parse(data), None
        if len(data) > self._items_max:
            return await off_loop(self._read_walked, data)
        parsed = self._parse(data)
        # Both are done in C, at once for all that is inside.
        size = parsed.ByteSize()
        parsed.DiscardUnknownFields()
        if parsed.ByteSize() == size:
            return parsed, None
        error = await off_loop(self._refusal_of, data)
        return parsed, error or _unknown("")

    def _is_plain(self, data: bytes) -> bool:
        """Whether a message has few items, all of them known."""
        try:
            return walk(data, self._descriptor, min(FEW_ITEMS, self._items_max)) is None
        except (_TooManyItems, IndexError):  # the slower way says what is wrong, if anything is
            return False

    def _read_walked(self, data: bytes) -> tuple[Message, TinsmithError | None]:
        if len(data) > LEFT_BEHIND_BYTES:
            give_back_freed_memory()
        error = self._refusal_of(data)
        if error is None:
            return self._parse(data), None
        return self._parse(header_of(data, self._descriptor, self._items_max)), error

    def _refusal_of(self, data: bytes) -> InvalidArgument | None:
        try:
            at = walk(data, self._descriptor, self._items_max)
            return None if at is None else _unknown(path_at(data, self._descriptor, at))
        except _TooManyItems as error:
            field = path_at(data, self._descriptor, error.position).partition("[")[0]
            return over_limit(field, self._items_limit, error.items, self._items_max)
        except IndexError:
            raise _malformed() from None

    def _parse(self, data: bytes) -> Message:
        try:
            return self._kind.FromString(data)
        except DecodeError:
            raise _malformed() from None


def _malformed() -> InvalidArgument:
    return InvalidArgument("", "the bytes are no message of this type", Reason.MALFORMED_STREAM)


def _unknown(path: str) -> InvalidArgument:
    return InvalidArgument(path, "this server does not know this field; is it older than you?")


# --- the wire format (protobuf.dev/programming-guides/encoding) ----------------------------------

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_WIRE_TYPES = {
    FieldDescriptor.TYPE_DOUBLE: _FIXED64,
    FieldDescriptor.TYPE_FIXED64: _FIXED64,
    FieldDescriptor.TYPE_SFIXED64: _FIXED64,
    FieldDescriptor.TYPE_FLOAT: _FIXED32,
    FieldDescriptor.TYPE_FIXED32: _FIXED32,
    FieldDescriptor.TYPE_SFIXED32: _FIXED32,
    FieldDescriptor.TYPE_STRING: _LENGTH,
    FieldDescriptor.TYPE_BYTES: _LENGTH,
    FieldDescriptor.TYPE_MESSAGE: _LENGTH,
}
_BYTES_EACH = {_FIXED64: 8, _FIXED32: 4, _VARINT: 1}


class _TooManyItems(Exception):
    def __init__(self, items: int, position: int) -> None:
        super().__init__()
        self.items = items
        self.position = position


@functools.cache
def _fields(descriptor: Descriptor) -> Mapping[int, "FieldDescriptor"]:
    """The fields of a message by the tags that they may have on the wire."""
    fields: dict[int, FieldDescriptor] = {}
    for field in descriptor.fields:
        wire_type = _WIRE_TYPES.get(field.type, _VARINT)
        fields[field.number << 3 | wire_type] = field
        if field.is_repeated and wire_type != _LENGTH:
            fields[field.number << 3 | _LENGTH] = field  # packed
    return fields


@functools.cache
def _steps(descriptor: Descriptor) -> Mapping[int, Any]:
    """What `walk` does at each tag: a mapping to go into, or bytes of one item in it, or 0."""
    steps: dict[int, Any] = {}
    for tag, field in _fields(descriptor).items():
        if field.message_type is not None:
            steps[tag] = _steps(field.message_type)
        elif field.type == FieldDescriptor.TYPE_STRING:
            steps[tag] = TEXT_BYTES_PER_ITEM
        elif tag & 7 == _LENGTH:
            steps[tag] = _BYTES_EACH.get(_WIRE_TYPES.get(field.type, _VARINT), 0)
        else:
            steps[tag] = 0
    return steps


def walk(data: bytes, descriptor: Descriptor, items_max: int) -> int | None:
    """Count the items of a message: every field that is set, at every level, every number in it,
    and some bytes of text.

    Returns:
        Where the first field is that the descriptor does not have; None where there is none.

    Raises:
        _TooManyItems: There are more than `items_max`.
        IndexError: The bytes are no message.
    """
    position, end, items = 0, len(data), 0
    steps = _steps(descriptor)
    outer: list[tuple[int, Mapping[int, Any]]] = []
    while True:
        if position >= end:
            if position > end:
                raise IndexError
            if not outer:
                return None
            end, steps = outer.pop()
            continue
        begin = position
        tag = data[position]
        position += 1
        if tag > 127:
            tag, position = _varint(data, begin)
        items += 1
        step = steps.get(tag)
        if step is None:
            return begin
        wire_type = tag & 7
        if wire_type == _LENGTH:
            size = data[position]
            position += 1
            if size > 127:
                size, position = _varint(data, position - 1)
            if position + size > end:
                raise IndexError
            if step.__class__ is dict:
                outer.append((end, steps))
                end, steps = position + size, step
            else:
                items += _numbers(data, position, size, step) if step else 0
                position += size
        elif wire_type == _VARINT:
            while data[position] > 127:
                position += 1
                if position - begin > FIELD_BYTES_MAX:
                    raise IndexError
            position += 1
        else:
            position += _BYTES_EACH[wire_type]
        if items > items_max:
            raise _TooManyItems(items, begin)


def _numbers(data: bytes, position: int, size: int, bytes_each: int) -> int:
    if bytes_each > 1:
        return size // bytes_each
    return int(np.count_nonzero(np.frombuffer(data, np.uint8, size, position) < 128))


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := data[position]) > 127:
        value |= (byte & 127) << shift
        shift += 7
        position += 1
        if shift > 63:
            raise IndexError
    return value | byte << shift, position + 1


def _skip(data: bytes, position: int, wire_type: int) -> tuple[int, int]:
    """Where the value of a field begins, and where it ends."""
    if wire_type == _LENGTH:
        size, position = _varint(data, position)
        return position, position + size
    if wire_type == _VARINT:
        return position, _varint(data, position)[1]
    return position, position + _BYTES_EACH.get(wire_type, 0)


def header_of(data: bytes, descriptor: Descriptor, items_max: int) -> bytes:
    """The bytes of the fields that say which call this is, if they are among the first."""
    position, found = 0, []
    try:
        for _ in range(items_max):
            if position >= len(data):
                break
            begin = position
            tag, position = _varint(data, position)
            _, position = _skip(data, position, tag & 7)
            field = _fields(descriptor).get(tag)
            short = position - begin <= HEADER_FIELD_BYTES_MAX
            if field is not None and field.name in HEADER_FIELDS and short:
                found.append(data[begin:position])
    except IndexError:  # not these fields
        pass
    return b"".join(found)


def path_at(data: bytes, descriptor: Descriptor, target: int) -> str:
    """The path of the field at a position, such as `data[3].loss_fn_inputs["weights"].shape`; one
    that the descriptor does not have is shown by its number, as in protobuf's text format."""
    position, path, key = 0, "", ""
    counts: dict[int, int] = {}
    while position <= target:
        begin = position
        tag, position = _varint(data, position)
        field = _fields(descriptor).get(tag)
        start, position = _skip(data, position, tag & 7)
        is_entry = descriptor.GetOptions().map_entry
        if field is None:
            return f"{path}.{tag >> 3}".removeprefix(".")
        counts[tag] = counts.get(tag, -1) + 1
        if is_entry and field.name == "key" and tag & 7 == _LENGTH:
            key = data[start:position].decode(errors="replace")[:KEY_CHARACTERS_MAX]
        if not begin <= target < position:
            continue
        if is_entry:
            path = f'{path}["{key}"]'
        else:
            path = f"{path}.{field.name}".removeprefix(".")
            message = field.message_type
            if field.is_repeated and not (message and message.GetOptions().map_entry):
                path += f"[{counts[tag]}]" if message else ""
        if begin == target or field.message_type is None:
            return path
        descriptor, position, counts = field.message_type, start, {}
    return path
