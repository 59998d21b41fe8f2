"""What SQLite's log (`-wal`) has: its layout, as https://www.sqlite.org/fileformat2.html says it.

A header, then frames: each a page with its number. Frames that were written since the log was begun
anew have its salts; behind them there may be older ones. Which frames count SQLite alone decides.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_HEADER = struct.Struct(">8I")
"""Magic, version, bytes of a page, sequence, two salts, two checksums."""
_FRAME = struct.Struct(">6I")
"""Number of the page, pages of the file after a commit or 0, two salts, two checksums."""


def frames(log: Path, most: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of pages, in the order in which they were written.

    Args:
        log: The log; nothing comes of one that is not there.
        most: Maximum number of frames; None: all since it was begun anew.
    """
    try:
        file = log.open("rb")
    except FileNotFoundError:
        return
    with file:
        yield from _frames(file, most)


def _frames(file: BinaryIO, most: int | None) -> Iterator[tuple[int, bytes]]:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return
    _, _, page_bytes, _, *salts, _, _ = _HEADER.unpack(header)
    count = 0
    while most is None or count < most:
        frame = file.read(_FRAME.size)
        page = file.read(page_bytes)
        if len(frame) < _FRAME.size or len(page) < page_bytes:
            return
        number, _, *its_salts, _, _ = _FRAME.unpack(frame)
        if its_salts != salts:
            return
        yield number, page
        count += 1


def since_begun(data: bytes) -> bytes:
    """A log without what is left of the ones before."""
    if len(data) < _HEADER.size:
        return b""
    _, _, page_bytes, _, *salts, _, _ = _HEADER.unpack_from(data)
    end, size = _HEADER.size, _FRAME.size + page_bytes
    while end + size <= len(data):
        _, _, *its_salts, _, _ = _FRAME.unpack_from(data, end)
        if its_salts != salts:
            break
        end += size
    return data[:end]
