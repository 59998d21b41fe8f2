"""Blobs on a local disk, named by what they hold: whole or absent, shared between copies.

    <folder>/blobs/ab/abcd...      one file per content, named by its SHA-256
    <folder>/staging/<random>/     what is being written; emptied when the server starts
    <folder>/deposits/<random>/    what others on this machine left to be taken; see `deposits`
    <folder>/lock                  held by the one server that may write here

A durable blob is synced before it is renamed into place, then its folder, then the folder of
folders: a name that `DirectoryStaging.publish` returned for has its bytes, whatever happens to the
power. Where another one was there that may not be durable, that one is synced.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tinsmithd import failpoints
from tinsmithd.checkpoint.store.deposits import Deposits
from tinsmithd.checkpoint.store.failures import of_disk, storage_errors
from tinsmithd.checkpoint.store.interface import Blob, Staging, StoreBusy
from tinsmithd.errors import DataLoss, InvalidArgument, Reason, TinsmithError, over_limit
from tinsmithd.files import BLOBS_FOLDER, DEPOSITS_FOLDER, blob_file, file_digest, sync_file

READ_BYTES = 1024 * 1024


class DirectoryStaging:
    """See `Staging`; its files lie in a folder of their own.

    Args:
        folder: That folder; it is made here.
        blobs: The folder that published files go to.
        deposits: What is there to be taken.
        bytes_max: Maximum number of bytes in all files.
    """

    def __init__(self, folder: Path, blobs: Path, deposits: Deposits, bytes_max: int) -> None:
        self._folder = folder
        self._blobs = blobs
        self._deposits = deposits
        self._bytes_max = bytes_max
        self._bytes = 0
        self._sizes: dict[str, int] = {}
        self._digests: dict[str, hashlib._Hash] = {}
        self._files: dict[str, Any] = {}
        self._last_name = ""
        self._finished: Sequence[Blob] = ()
        with storage_errors():
            folder.mkdir()

    def append(self, name: str, offset: int, data: bytes) -> None:
        """See `Staging`."""
        expected = self._sizes.get(name, 0)
        if offset != expected or (name in self._sizes and name != self._last_name):
            message = f"offset {offset} of {name!r} does not follow what was sent before"
            raise InvalidArgument("piece.offset", message, Reason.MALFORMED_STREAM)
        self._count("piece.data", len(data))
        with storage_errors():
            if name not in self._sizes:
                self._last_name = name
                self._files[name] = self._path(name).open("wb")
                self._digests[name] = hashlib.sha256()
            self._files[name].write(data)
            failpoints.hit("ckpt_mid_write")
        self._sizes[name] = expected + len(data)
        self._digests[name].update(data)

    def take(self, deposit: str, name: str) -> int:
        """See `Staging`."""
        with storage_errors():
            file = self._files[name] = self._deposits.move(deposit, name, self._path(name))
            size = self._sizes[name] = os.fstat(file.fileno()).st_size
            failpoints.hit("ckpt_mid_take")
        self._count("commit.files", size)
        return size

    def _count(self, field: str, nbytes: int) -> None:
        self._bytes += nbytes
        if self._bytes > self._bytes_max:
            raise over_limit(field, "checkpoint_bytes_max", self._bytes, self._bytes_max)

    def flush(self) -> None:
        """See `Staging`."""
        with storage_errors():
            for name in self._digests:
                self._files[name].flush()

    def finish(self, *, durable: bool = True) -> list[Blob]:
        """See `Staging`."""
        self.flush()
        with storage_errors():
            for name in self._files.keys() - self._digests.keys():
                # Of what was taken: so far nobody here has read it.
                self._digests[name] = file_digest(self._files[name])
            failpoints.hit("ckpt_pre_fsync")
            # Through the descriptor that wrote: it hears of a write-back that failed.
            for file in self._files.values():
                if durable:
                    os.fsync(file.fileno())
                file.close()
        finished = [
            Blob(name, self._sizes[name], self._digests[name].hexdigest())
            for name in sorted(self._sizes)
        ]
        self._finished = finished
        return finished

    def open(self, name: str) -> BinaryIO:
        """See `Staging`."""
        return self._path(name).open("rb")

    def publish(self, *, durable: bool = True) -> None:
        """See `Staging`."""
        places = [blob_file(self._blobs, blob.sha256) for blob in self._finished]
        with storage_errors():
            failpoints.hit("ckpt_pre_rename")
            for index, (blob, place) in enumerate(zip(self._finished, places, strict=True)):
                if index:
                    failpoints.hit("ckpt_mid_rename")
                if not _holds(place, blob):
                    place.parent.mkdir(exist_ok=True)
                    os.replace(self._path(blob.name), place)
                elif durable:
                    sync_file(place)
            # Also for what was there: its writer may have died before it came to this.
            if durable:
                _sync_folders(self._blobs, places)

    def discard(self) -> None:
        """See `Staging`."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        # A name that someone sent is hashed before it meets the file system.
        return self._folder / hashlib.sha256(name.encode()).hexdigest()


class DirectoryStore:
    """See `Store`; its blobs are the files of one folder.

    Raises:
        StoreBusy: Another server has the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blobs = folder / BLOBS_FOLDER
        self._staging = folder / "staging"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StoreBusy(f"{folder} is used by another Checkpoint server") from error
        self._deposits = Deposits(folder / DEPOSITS_FOLDER)
        self._staging.mkdir(exist_ok=True)
        for left in self._staging.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        sync_file(folder)
        with contextlib.suppress(PermissionError):  # a mount point is often somebody else's
            sync_file(folder.parent)

    @property
    def empty(self) -> bool:
        """See `Store`."""
        return next(self._blobs.glob("*/*"), None) is None

    def close(self) -> None:
        """See `Store`."""
        self._lock.close()

    def stage(self, bytes_max: int) -> Staging:
        """See `Store`."""
        folder = self._staging / secrets.token_hex(16)
        return DirectoryStaging(folder, self._blobs, self._deposits, bytes_max)

    def forget_deposits(self) -> None:
        """See `Store`."""
        with storage_errors():
            self._deposits.sweep()

    def read(self, blob: Blob) -> Iterator[bytes]:
        """See `Store`."""
        try:
            file = blob_file(self._blobs, blob.sha256).open("rb")
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

    def sync(self, blobs: Collection[Blob]) -> None:
        """See `Store`."""
        places = [blob_file(self._blobs, blob.sha256) for blob in blobs]
        for blob, place in zip(blobs, places, strict=True):
            try:
                sync_file(place)
            except OSError as error:
                raise self._unreadable(blob, error) from error
        with storage_errors():
            _sync_folders(self._blobs, places)

    def probe(self) -> None:
        """See `Store`."""
        with storage_errors(), os.scandir(self._blobs) as entries:
            next(entries, None)

    def sweep(self, kept: Collection[str]) -> int:
        """See `Store`."""
        removed = 0
        for blob in self._blobs.glob("*/*"):
            if blob.name not in kept:
                blob.unlink(missing_ok=True)
                removed += 1
        return removed


def _sync_folders(blobs: Path, places: Collection[Path]) -> None:
    """Make the names of blobs durable."""
    for folder in sorted({place.parent for place in places}):
        sync_file(folder)
    sync_file(blobs)


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
