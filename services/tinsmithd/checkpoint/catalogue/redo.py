"""What was committed since SQLite's log was last copied into its file: the second copy, as changes.

SQLite takes a damaged log for one that ends earlier, and would forget commits without a word. So
each commit is in this file, too (`.redo`), before it counts: a start makes those again that SQLite
has forgotten. Once the log is in SQLite's file, which reports its damage, what is here is written
over.

The file has a fixed size, so that writing to it needs no room on the disk, and waiting for it
writes nothing but the changes. Each commit has a position, one more than that before it, which
SQLite's file has too.

    4 bytes     what it is
    4 bytes     bytes of the changes
    8 bytes     position
    32 bytes    SHA-256 of which catalogue this is of, the bytes before it, and the changes
    ...         the changes, as JSON
"""

import hashlib
import json
import logging
import os
import struct
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tinsmithd.checkpoint.catalogue.rows import Change
from tinsmithd.files import sync_file

REDO_BYTES = 256 * 1024
_MAGIC = b"tinR"
_HEAD = struct.Struct("<4sIQ")
_DIGEST_BYTES = 32

_log = logging.getLogger(__name__)


class Redo:
    """The file. Its calls come one at a time.

    Args:
        path: Where it is; it is made where there is none.
        identity: Which catalogue it is of.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity.encode()
        self._beside = ThreadPoolExecutor(1, "redo")
        self._descriptor = self._open()
        self._end = self._last = 0
        self._has_all = True

    def _open(self) -> int:
        """Its descriptor; -1 where the disk does not take it."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if os.fstat(descriptor).st_size < REDO_BYTES:
                os.pwrite(descriptor, bytes(REDO_BYTES), 0)
                os.fsync(descriptor)
                sync_file(self._path.parent)
        except OSError as error:
            _log.warning("%s cannot be used, commits take longer: %s", self._path, error)
            return -1
        return descriptor

    def close(self) -> None:
        """Close it."""
        self._beside.shutdown()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def after(self, position: int) -> Sequence[tuple[int, Sequence[Change]]]:
        """Commits after a position, in order, with their own positions.

        Raises:
            ValueError: Those that follow the position are not there, and later ones are.
        """
        data = b"" if self._descriptor < 0 else os.pread(self._descriptor, REDO_BYTES, 0)
        found: list[tuple[int, Sequence[Change]]] = []
        at = 0
        while (entry := self._entry(data, at)) is not None:
            number, changes, at = entry
            if found and number != found[-1][0] + 1:
                break  # written before those in front of it
            found.append((number, changes))
        if found and found[0][0] > position + 1:
            raise ValueError(
                f"{self._path.name} beside it goes on from change {found[0][0]}, and it ends with"
                f" {position}: it is older than that file"
            )
        return [(number, changes) for number, changes in found if number > position]

    def _entry(self, data: bytes, at: int) -> tuple[int, Sequence[Change], int] | None:
        """Position and changes of an entry, and where the next one is; None where there is none."""
        body_at = at + _HEAD.size + _DIGEST_BYTES
        if body_at > len(data):
            return None
        head = data[at : at + _HEAD.size]
        magic, length, position = _HEAD.unpack(head)
        body = data[body_at : body_at + length]
        if magic != _MAGIC or self._digest(head, body) != data[at + _HEAD.size : body_at]:
            return None
        return position, json.loads(body), body_at + length

    def _digest(self, head: bytes, body: bytes) -> bytes:
        return hashlib.sha256(self._identity + head + body).digest()

    def append(self, position: int, changes: Sequence[Change]) -> bool:
        """Write a commit down, not yet durably; False where it does not get in."""
        body = json.dumps(changes).encode()
        head = _HEAD.pack(_MAGIC, len(body), position)
        entry = head + self._digest(head, body) + body
        fits = self._descriptor >= 0 and self._end + len(entry) <= REDO_BYTES
        # Behind one that is not there nothing would be read.
        self._has_all = self._has_all and fits and self._write(entry, self._end)
        if self._has_all:
            self._last, self._end = self._end, self._end + len(entry)
        return self._has_all

    def _write(self, data: bytes, at: int) -> bool:
        try:
            return os.pwrite(self._descriptor, data, at) == len(data)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self._path, error)
            return False

    def sync(self) -> "Future[bool]":
        """Begin to make durable what was written; whether it is."""
        return self._beside.submit(self._sync)

    def _sync(self) -> bool:
        sync = getattr(os, "fdatasync", os.fsync)  # which not every system has
        try:
            sync(self._descriptor)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self._path, error)
            self._has_all = False
            return False
        return True

    def take_back(self) -> None:
        """Take out the last commit, which was not made."""
        self._write(bytes(_HEAD.size), self._last)
        self._end = self._last

    def begin_anew(self) -> None:
        """Forget all: SQLite's file has it."""
        self._end, self._has_all = 0, True

    def clear(self) -> None:
        """Forget all, so that no start finds it."""
        self.begin_anew()
        if self._descriptor >= 0 and self._write(bytes(_HEAD.size), 0):
            self._sync()
