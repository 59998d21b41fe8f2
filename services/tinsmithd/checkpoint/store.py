"""Blobs on a local disk, named by what they hold: whole or absent, shared between copies.

    <folder>/blobs/ab/abcd...      one file per content, named by its SHA-256
    <folder>/staging/<random>/     what is being written; emptied when the server starts
    <folder>/lock                  held by the one server that may write here

A blob is synced before it is renamed into place, and its folder after, so that a name that exists
has its bytes, whatever happens to the power. Names that tenants choose never become paths.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinsmithd.errors import DataLoss, InvalidArgument, Reason, ResourceExhausted

READ_BYTES = 1024 * 1024


class StoreBusy(Exception):
    """Another server has the folder."""


@dataclass(frozen=True)
class Blob:
    """One file of a checkpoint: its name there, length in bytes, and SHA-256 in hex."""

    name: str
    size_bytes: int
    sha256: str


class Staging:
    """Files on their way in. `append` their bytes, `finish`, then hand it to `Store.publish`."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._bytes = 0
        self._sizes: dict[str, int] = {}
        self._digests: dict[str, hashlib._Hash] = {}
        self._open_name = ""
        self._open_file: Any = None
        with full_disk():
            folder.mkdir()

    def append(self, name: str, offset: int, data: bytes) -> None:
        """Add the next bytes of a file; files come one after the other.

        Raises:
            InvalidArgument: They are not the next bytes (MALFORMED_STREAM).
            ResourceExhausted: The disk is full (STORAGE_FULL), or they are too many
                (LIMIT_EXCEEDED).
        """
        expected = self._sizes.get(name, 0)
        if offset != expected or (name in self._sizes and name != self._open_name):
            message = f"offset {offset} of {name!r} does not follow what was sent before"
            raise InvalidArgument("piece.offset", message, Reason.MALFORMED_STREAM)
        self._bytes += len(data)
        if self._bytes > self._bytes_max:
            raise ResourceExhausted(
                f"the checkpoint is larger than checkpoint_bytes_max = {self._bytes_max}",
                Reason.LIMIT_EXCEEDED,
                field="piece.data",
                metadata={"limit": "checkpoint_bytes_max", "value": str(self._bytes)},
            )
        with full_disk():
            if name not in self._sizes:
                self._close_file()
                self._open_name = name
                self._open_file = self._path(name).open("wb")
                self._digests[name] = hashlib.sha256()
            self._open_file.write(data)
        self._sizes[name] = expected + len(data)
        self._digests[name].update(data)

    def finish(self) -> list[Blob]:
        """Everything was sent; returns what came, sorted by name."""
        with full_disk():
            self._close_file()
        return [
            Blob(name, self._sizes[name], self._digests[name].hexdigest())
            for name in sorted(self._sizes)
        ]

    def path(self, name: str) -> Path:
        """Where a finished file lies until it is published."""
        return self._path(name)

    def discard(self) -> None:
        """Forget it all."""
        with contextlib.suppress(OSError):
            if self._open_file is not None:
                self._open_file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        # A name that someone sent is hashed before it meets the file system.
        return self._folder / hashlib.sha256(name.encode()).hexdigest()

    def _close_file(self) -> None:
        if self._open_file is not None:
            self._open_file.flush()
            os.fsync(self._open_file.fileno())
            self._open_file.close()
            self._open_file = None


class Store:
    """The blobs of one folder; one process at a time may have it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blobs = folder / "blobs"
        self._staging = folder / "staging"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StoreBusy(f"{folder} is used by another Checkpoint server") from error
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir()

    def close(self) -> None:
        """Let another server have the folder."""
        self._lock.close()

    def stage(self, bytes_max: int) -> Staging:
        """Begin to write at most `bytes_max` bytes."""
        return Staging(self._staging / secrets.token_hex(16), bytes_max)

    def publish(self, staging: Staging, blobs: Collection[Blob]) -> None:
        """Move finished files to their places; a content that is there already stays."""
        with full_disk():
            for blob in blobs:
                place = self._place(blob.sha256)
                if _holds(place, blob):
                    continue
                place.parent.mkdir(exist_ok=True)
                os.replace(staging.path(blob.name), place)
                sync_folder(place.parent)
            sync_folder(self._blobs)

    def read(self, blob: Blob) -> Iterator[bytes]:
        """The bytes of a blob, which stays readable from this call on, whatever is deleted.

        Only a normal end means that they were what was written.

        Raises:
            DataLoss: It is gone, or not what was written (CHECKPOINT_CORRUPT).
        """
        try:
            file = self._place(blob.sha256).open("rb")
        except OSError as error:
            raise _corrupt(blob, "cannot be opened") from error
        return self._verified(file, blob)

    def _verified(self, file: Any, blob: Blob) -> Iterator[bytes]:
        with file:
            digest, size = hashlib.sha256(), 0
            while data := self._read_some(file, blob):
                digest.update(data)
                size += len(data)
                if size > blob.size_bytes:
                    raise _corrupt(blob, "is longer than it was")
                yield data
            if size != blob.size_bytes or digest.hexdigest() != blob.sha256:
                raise _corrupt(blob, "is not what was written")

    @staticmethod
    def _read_some(file: Any, blob: Blob) -> bytes:
        try:
            return bytes(file.read(READ_BYTES))
        except OSError as error:
            raise _corrupt(blob, "cannot be read") from error

    def sweep(self, referenced: Callable[[], Collection[str]]) -> int:
        """Remove blobs that nothing refers to; returns how many.

        Nothing may be published between the call of `referenced` and the end: the caller sees to
        that. Readers that have a blob open keep it.
        """
        kept, removed = set(referenced()), 0
        for folder in self._blobs.iterdir():
            for blob in folder.iterdir():
                if blob.name not in kept:
                    blob.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _place(self, sha256: str) -> Path:
        return self._blobs / sha256[:2] / sha256


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Turn a full disk into its error.

    Raises:
        ResourceExhausted: No space is left (STORAGE_FULL).
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = "no space is left for checkpoints"
        raise ResourceExhausted(message, Reason.STORAGE_FULL, retry_after_s=30.0) from error


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holds(place: Path, blob: Blob) -> bool:
    if not place.exists() or place.stat().st_size != blob.size_bytes:
        return False
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == blob.sha256


def _corrupt(blob: Blob, what: str) -> DataLoss:
    message = f"{blob.name} (sha256 {blob.sha256[:12]}…) {what}"
    return DataLoss(message, Reason.CHECKPOINT_CORRUPT)
