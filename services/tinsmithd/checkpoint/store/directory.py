"""Blobs on a local disk, named by what they hold: whole or absent, shared between copies.

    <folder>/blobs/ab/abcd...      one file per content, named by its SHA-256
    <folder>/staging/<random>/     what is being written; emptied when the server starts
    <folder>/lock                  held by the one server that may write here

A blob is synced before it is renamed into place, then its folder, then the folder of folders: a
name that `Store.publish` returned for has its bytes, whatever happens to the power. Names that
tenants choose never become paths.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinsmithd import failpoints
from tinsmithd.checkpoint.store.failures import of_disk, storage_errors
from tinsmithd.errors import DataLoss, InvalidArgument, Reason, TinsmithError, over_limit
from tinsmithd.files import sync_folder

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
    """Files on their way in. `append` their bytes, `finish`, then hand it to `Store.publish`.

    Besides what they say, calls raise ResourceExhausted (STORAGE_FULL) and Unavailable
    (CHECKPOINT_UNAVAILABLE) where the disk does not take it.
    """

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._bytes = 0
        self._sizes: dict[str, int] = {}
        self._digests: dict[str, hashlib._Hash] = {}
        self._files: dict[str, Any] = {}
        self._last_name = ""
        with storage_errors():
            folder.mkdir()

    def append(self, name: str, offset: int, data: bytes) -> None:
        """Add the next bytes of a file; files come one after the other.

        Raises:
            InvalidArgument: They are not the next bytes (MALFORMED_STREAM).
            InvalidArgument: They are too many (LIMIT_EXCEEDED).
        """
        expected = self._sizes.get(name, 0)
        if offset != expected or (name in self._sizes and name != self._last_name):
            message = f"offset {offset} of {name!r} does not follow what was sent before"
            raise InvalidArgument("piece.offset", message, Reason.MALFORMED_STREAM)
        self._bytes += len(data)
        if self._bytes > self._bytes_max:
            raise over_limit("piece.data", "checkpoint_bytes_max", self._bytes, self._bytes_max)
        with storage_errors():
            if name not in self._sizes:
                self._last_name = name
                self._files[name] = self._path(name).open("wb")
                self._digests[name] = hashlib.sha256()
            self._files[name].write(data)
            failpoints.hit("ckpt_mid_write")
        self._sizes[name] = expected + len(data)
        self._digests[name].update(data)

    def finish(self) -> list[Blob]:
        """Everything was sent; makes it durable and returns what came, sorted by name."""
        with storage_errors():
            for file in self._files.values():
                file.flush()
            failpoints.hit("ckpt_pre_fsync")
            # Through the descriptor that wrote: it hears of a write-back that failed.
            for file in self._files.values():
                os.fsync(file.fileno())
                file.close()
        return [
            Blob(name, self._sizes[name], self._digests[name].hexdigest())
            for name in sorted(self._sizes)
        ]

    def path(self, name: str) -> Path:
        """Where a finished file lies until it is published."""
        return self._path(name)

    def discard(self) -> None:
        """Forget it all."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        # A name that someone sent is hashed before it meets the file system.
        return self._folder / hashlib.sha256(name.encode()).hexdigest()


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
        self._staging.mkdir(exist_ok=True)
        for left in self._staging.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        sync_folder(folder)
        with contextlib.suppress(PermissionError):  # of someone else, such as a mount point's
            sync_folder(folder.parent)

    @property
    def empty(self) -> bool:
        """True where there is no blob."""
        return next(self._blobs.glob("*/*"), None) is None

    def close(self) -> None:
        """Let another server have the folder."""
        self._lock.close()

    def stage(self, bytes_max: int) -> Staging:
        """Begin to write at most `bytes_max` bytes."""
        return Staging(self._staging / secrets.token_hex(16), bytes_max)

    def publish(self, staging: Staging, blobs: Collection[Blob]) -> None:
        """Move finished files to their places, durably; a content that is there already stays.

        Raises:
            ResourceExhausted, Unavailable: As `Staging`; some may be in their places.
        """
        places = [self._place(blob.sha256) for blob in blobs]
        with storage_errors():
            failpoints.hit("ckpt_pre_rename")
            for index, (blob, place) in enumerate(zip(blobs, places, strict=True)):
                if index:
                    failpoints.hit("ckpt_mid_rename")
                if not _holds(place, blob):
                    place.parent.mkdir(exist_ok=True)
                    os.replace(staging.path(blob.name), place)
            # Also for what was there: its writer may have died before it came to this.
            for folder in sorted({place.parent for place in places}):
                sync_folder(folder)
            sync_folder(self._blobs)

    def read(self, blob: Blob) -> Iterator[bytes]:
        """The bytes of a blob, which stays readable from this call on, whatever is deleted.

        Only a normal end means that they were what was written.

        Raises:
            DataLoss: It is gone, or not what was written (CHECKPOINT_CORRUPT).
            Unavailable: It cannot be opened now (CHECKPOINT_UNAVAILABLE).
        """
        try:
            file = self._place(blob.sha256).open("rb")
        except OSError as error:
            raise self._unreadable(blob, error) from error
        return self._verified(file, blob)

    def _unreadable(self, blob: Blob, error: OSError) -> TinsmithError:
        # Where all blobs are gone the disk is, not this one. EIO is what a worn-out disk says.
        lost = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
        if lost and self._blobs.is_dir():
            return _corrupt(blob, f"cannot be read: {error.strerror}")
        return of_disk(error)

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

    def _read_some(self, file: Any, blob: Blob) -> bytes:
        try:
            return bytes(file.read(READ_BYTES))
        except OSError as error:
            raise self._unreadable(blob, error) from error

    def probe(self) -> None:
        """Do nothing, as long as blobs can be found.

        Raises:
            Unavailable: They cannot (CHECKPOINT_UNAVAILABLE).
        """
        with storage_errors(), os.scandir(self._blobs) as entries:
            next(entries, None)

    def sweep(self, kept: Collection[str]) -> int:
        """Remove blobs of other contents than these; returns how many.

        Nothing may be published, and no name looked up for reading, from before `kept` was made
        until the end: the caller sees to that. Readers that have a blob open keep it.
        """
        removed = 0
        for blob in self._blobs.glob("*/*"):
            if blob.name not in kept:
                blob.unlink(missing_ok=True)
                removed += 1
        return removed

    def _place(self, sha256: str) -> Path:
        return self._blobs / sha256[:2] / sha256


def _holds(place: Path, blob: Blob) -> bool:
    try:
        if place.stat().st_size != blob.size_bytes:
            return False
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == blob.sha256
    except OSError:
        return False  # not there, or not readable: what was sent now replaces it


def _corrupt(blob: Blob, what: str) -> DataLoss:
    message = f"{blob.name} (sha256 {blob.sha256[:12]}…) {what}"
    return DataLoss(message, Reason.CHECKPOINT_CORRUPT)
