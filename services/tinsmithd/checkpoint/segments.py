"""Long answers that can be resumed: what a reader has already is left out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tinsmithd.errors import InvalidArgument


@dataclass(frozen=True)
class Segment:
    """Some of the bytes of a long answer, such as one file.

    Attributes:
        size_bytes: How many.
        content: The bytes in order, read as they are needed.
    """

    size_bytes: int
    content: Iterator[bytes]

    @classmethod
    def of(cls, data: bytes) -> "Segment":
        """One whose bytes are there already."""
        return cls(len(data), iter((data,) if data else ()))


class Piece(NamedTuple):
    """Bytes of one segment.

    Attributes:
        segment: Index of the segment.
        offset: Where in the segment they go.
    """

    segment: int
    offset: int
    data: bytes


def check_offset(segments: Sequence[Segment], offset: int) -> int:
    """The size of all segments together.

    Raises:
        InvalidArgument: The offset is not in it.
    """
    size_bytes = sum(segment.size_bytes for segment in segments)
    if not 0 <= offset <= size_bytes:
        raise InvalidArgument("offset", f"{offset} is not in 0..{size_bytes}")
    return size_bytes


def pieces_from(segments: Sequence[Segment], offset: int) -> Iterator[Piece]:
    """The bytes of segments from an offset on.

    A segment before it is not read; one that it is in is read, and so verified, from its start.
    """
    for index, segment in enumerate(segments):
        if offset >= segment.size_bytes:
            offset -= segment.size_bytes
            continue
        at = 0
        for data in segment.content:
            left_out = min(max(offset - at, 0), len(data))
            if left_out < len(data):
                yield Piece(index, at + left_out, data[left_out:] if left_out else data)
            at += len(data)
        offset = 0
