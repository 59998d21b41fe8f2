"""Damages requests: bytes as a broken network would, fields as somebody who knows them would."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_F = FieldDescriptor
NAN, INF = float("nan"), float("inf")
SIGNED_64 = (0, 1, -1, 2, 1 << 24, (1 << 31) - 1, -(1 << 31), 1 << 62, (1 << 63) - 1, -(1 << 63))
_CHOICES: dict[int, tuple[Any, ...]] = {
    _F.TYPE_INT64: SIGNED_64,
    _F.TYPE_UINT64: (0, 1, 1 << 31, 1 << 63, (1 << 64) - 1),
    _F.TYPE_INT32: (0, 1, -1, 2, 9, (1 << 31) - 1, -(1 << 31)),
    _F.TYPE_FIXED32: (0, 1, (1 << 32) - 1),
    _F.TYPE_DOUBLE: (
        0.0,
        -0.0,
        1.0,
        -1.0,
        1e308,
        5e-324,
        float("nan"),
        float("inf"),
        -float("inf"),
    ),
    _F.TYPE_FLOAT: (0.0, -1.0, 3e38, 1e-45, NAN, INF),
    _F.TYPE_BOOL: (False, True),
    _F.TYPE_ENUM: (0, 1, 2, 3, 99, -1, (1 << 31) - 1),
    _F.TYPE_STRING: (
        *("", "a", "9" * 5000, "1" * 18, "x" * 5000, "\0", "a\nb", "\u2028", "\U0001f600" * 300),
        *(
            "..",
            "/etc/passwd",
            "tinsmith://a/weights/b",
            "tinker://a/sampler_weights/../b",
            "%s{0}",
        ),
        *("target_tokens", "weights", "logprobs", "model_state.json", "user_metadata", "é" * 129),
    ),
    _F.TYPE_BYTES: (b"", b"\0", b"\0" * 7, b"\xff" * 8, b"\0\0\x80\x7f" * 3, b"\x01" + b"\0" * 7),
}
_UNKNOWN = (b"\xa2\x1f\x00", b"\xa0\x1f\x01", b"\xa5\x1f\0\0\0\0", b"\xa3\x1f\xa4\x1f")


def flip_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, insert or enlarge, one to four times."""
    mutated = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(mutated) + 1)
        length = rng.randint(1, 8)
        match rng.randrange(6):
            case 0 if mutated:
                mutated[at % len(mutated)] ^= 1 << rng.randrange(8)
            case 1:
                del mutated[at : at + length]
            case 2:
                mutated[at:at] = mutated[at : at + length]
            case 3:
                mutated[at:at] = rng.randbytes(length)
            case 4:
                mutated[at:at] = b"\xff" * 9 + b"\x01"  # the largest number
            case _:
                del mutated[at:]
    return bytes(mutated)


def change_fields(message: Message, rng: random.Random) -> bytes:
    """Set one to three fields, at any level, to what is at the edge of their type or beyond."""
    mutated = type(message)()
    mutated.CopyFrom(message)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(mutated))
        if not places:
            break
        node, field = rng.choice(places)
        _change(node, field, rng)
    return mutated.SerializeToString()


def mutate(message: Message, rng: random.Random) -> bytes:
    """One of the two."""
    if rng.random() < 0.3:
        return flip_bytes(message.SerializeToString(), rng)
    return change_fields(message, rng)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _places(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Every field of every message that is there."""
    for field in message.DESCRIPTOR.fields:
        yield message, field  # type: ignore[misc]  # the same thing in two type stubs
    for field, value in message.ListFields():
        if _is_map(field):
            if field.message_type.fields_by_name["value"].message_type is not None:
                for key in list(value):
                    yield from _places(value[key])
        elif field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from _places(inner)


def _change(node: Message, field: FieldDescriptor, rng: random.Random) -> None:
    value: Any = getattr(node, field.name)
    if rng.random() < 0.1:
        node.ClearField(field.name)
    elif rng.random() < 0.05:
        node.MergeFromString(rng.choice(_UNKNOWN))
    elif _is_map(field):
        _change_map(value, field, rng)
    elif field.message_type is not None and field.is_repeated:
        for _ in range(rng.choice((1, 2, 70))):
            added = value.add()
            if len(value) > 1 and rng.random() < 0.7:
                added.CopyFrom(value[0])
    elif field.message_type is not None:
        value.SetInParent()
    elif field.is_repeated:
        choices = _CHOICES[field.type]
        value.extend(rng.choice(choices) for _ in range(rng.choice((1, 2, 3, 70))))
    else:
        setattr(node, field.name, rng.choice(_CHOICES[field.type]))


def _change_map(value: Any, field: FieldDescriptor, rng: random.Random) -> None:
    new_key: Callable[[], str] = lambda: rng.choice(_CHOICES[_F.TYPE_STRING])  # noqa: E731
    value_field = field.message_type.fields_by_name["value"]
    if value_field.message_type is None:
        for index in range(rng.choice((1, 2, 70))):
            value[f"{new_key()}{index}"] = rng.choice(_CHOICES[value_field.type])
        return
    for _ in range(rng.choice((1, 2, 20))):
        value[new_key()].SetInParent()
    if len(value) and rng.random() < 0.5:
        del value[rng.choice(sorted(value))]
