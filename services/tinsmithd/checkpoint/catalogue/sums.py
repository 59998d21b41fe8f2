"""Sums of the pages of SQLite's file: whether they are what was written, in a second for a million
checkpoints.

SQLite itself finds that out by looking each row up in each index, which takes ten times as long,
and finds no damage within a row. So a start compares sums, and lets SQLite look where they differ.

Nothing depends on this file (`.sums`): one that is lost, old or damaged costs that time. So it is
not waited for when it is written.

    8 bytes     what it is
    4 bytes     bytes of a page
    4 bytes     0
    4 bytes     of each page in order: its CRC-32; 0 for one that was never written
"""

import array
import contextlib
import itertools
import logging
import os
import struct
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from zlib import crc32

from tinsmithd.checkpoint.catalogue import wal
from tinsmithd.files import sync_file

_MAGIC = b"tinsums1"
_HEADER = struct.Struct("<8sII")
_SUM = struct.Struct("<I")
_PAGE_BYTES_AT = 16
"""Where in its first page SQLite has the bytes of a page, as two bytes; 1 stands for 65536."""
_READ_BYTES = 1024 * 1024

_log = logging.getLogger(__name__)


class PageSums:
    """The sums of a SQLite file.

    Args:
        file: The SQLite file.
        log: SQLite's log of it.
    """

    def __init__(self, file: Path, log: Path) -> None:
        self._file, self._log = file, log
        self._path = file.with_suffix(".sums")

    def match(self) -> bool:
        """Whether every page is what was written last, or what the log has of it.

        A page that the log has may be in the file or not yet: SQLite reads the log's, which has
        checksums of its own.
        """
        try:
            with self._file.open("rb") as file:
                page_bytes = _page_bytes(file)
                return bool(page_bytes) and self._match(file, page_bytes)
        except OSError:
            return False

    def _match(self, file: BufferedReader, page_bytes: int) -> bool:
        expected = self._read(page_bytes)
        if expected is None:
            return False
        logged: dict[int, set[int]] = defaultdict(set)
        for number, page in wal.frames(self._log):
            logged[number].add(crc32(page))
        if os.fstat(file.fileno()).st_size % page_bytes:
            return False
        never_written, number = crc32(bytes(page_bytes)), 1
        for found in _sums_of(file, page_bytes):
            wanted = expected[number - 1 : number - 1 + len(found)]
            if found != wanted:
                for at, (one, other) in enumerate(
                    itertools.zip_longest(found, wanted, fillvalue=0), start=number
                ):
                    if one != (other or never_written) and one not in logged.get(at, ()):
                        return False
            number += len(found)
        missing = range(number, len(expected) + 1)
        return all(each in logged for each in missing)

    def _read(self, page_bytes: int) -> "array.array[int] | None":
        """Sums of all pages; None where there are none of this file."""
        try:
            data = self._path.read_bytes()
            magic, its_page_bytes, _ = _HEADER.unpack_from(data)
        except (OSError, struct.error):
            return None
        if magic != _MAGIC or its_page_bytes != page_bytes:
            return None
        end = len(data) - (len(data) - _HEADER.size) % _SUM.size
        sums = array.array("I", data[_HEADER.size : end])
        if sys.byteorder == "big":
            sums.byteswap()
        return sums

    def note(self, pages: Iterable[tuple[int, bytes]]) -> bool:
        """Write down the sums of pages that SQLite has just copied into the file; whether it is."""
        with self._writing(os.O_RDWR) as descriptor:
            sums = {number: crc32(page) for number, page in pages}
            for number, value in sums.items():
                os.pwrite(descriptor, _SUM.pack(value), _HEADER.size + _SUM.size * (number - 1))
            return True
        return False

    def make(self) -> bool:
        """Write down the sums of all pages, as they are; SQLite's log must be in the file."""
        with (
            self._writing(os.O_RDWR | os.O_CREAT | os.O_TRUNC) as descriptor,
            self._file.open("rb") as file,
            open(descriptor, "wb", closefd=False) as sums,
        ):
            page_bytes = _page_bytes(file)
            sums.write(_HEADER.pack(_MAGIC, page_bytes, 0))
            for found in _sums_of(file, page_bytes):
                if sys.byteorder == "big":
                    found.byteswap()
                sums.write(found)
            return True
        return False

    def sync(self) -> None:
        """Wait until what was written down is on the disk."""
        with contextlib.suppress(OSError):
            sync_file(self._path)

    @contextlib.contextmanager
    def _writing(self, flags: int) -> Iterator[int]:
        """Open the file; where the disk does not take it, it goes: then a start has none."""
        try:
            descriptor = os.open(self._path, flags | os.O_CLOEXEC, 0o600)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            _log.warning("%s is not written, the next start takes longer: %s", self._path, error)
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def _page_bytes(file: BufferedReader) -> int:
    """Bytes of a page, as the file says it; 0 where it says none."""
    head = file.read(_PAGE_BYTES_AT + 2)
    file.seek(0)
    said = int.from_bytes(head[_PAGE_BYTES_AT:], "big")
    size = 65536 if said == 1 else said
    return size if size >= 512 and size & (size - 1) == 0 else 0


def _sums_of(file: BufferedReader, page_bytes: int) -> "Iterator[array.array[int]]":
    """Sums of the whole pages of a file, some at once; it is read up to the last of them."""
    buffer = memoryview(bytearray(_READ_BYTES))
    rest = 0
    while count := file.readinto(buffer[rest:]):
        whole = (rest + count) // page_bytes * page_bytes
        yield array.array(
            "I", [crc32(buffer[at : at + page_bytes]) for at in range(0, whole, page_bytes)]
        )
        rest = rest + count - whole
        buffer[:rest] = buffer[whole : whole + rest]
