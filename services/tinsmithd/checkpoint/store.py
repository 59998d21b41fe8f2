"""Blobs in a local folder, named by their SHA-256: whole and verified, or not there.

    <folder>/lock              advisory lock: one process writes here
    <folder>/catalogue.db      which checkpoint has which blobs (`catalogue.py`)
    <folder>/staging/<random>/ files of one write that is under way; emptied at start
    <folder>/blobs/ab/ab12...  content by digest

A name that a caller chose never becomes part of a path. A blob is written to staging, its bytes
are forced to the disk, it is renamed to its digest and the directory is forced too; only then may
the catalogue refer to it. Blobs that nobody refers to are removed, unless a reader or a writer
has pinned them.
"""

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tinsmithd.errors import DataLoss, Reason, ResourceExhausted, Unavailable

_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


class StorageError(Exception):
    """The folder cannot be used at all; the message is one line for the operator."""


class FolderLock:
    """The right to write to a folder; the kernel takes it back when the process dies.

    Raises:
        StorageError: Another server holds it, or the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(f"{folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            message = f"{folder} is in use by another Checkpoint server (process {owner})"
            raise StorageError(message) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Let another server have the folder."""
        os.close(self._fd)


class StagedFile:
    """One file on its way: bytes are appended, then `finish` makes them durable.

    Attributes:
        path: Where the bytes are for now.
        size_bytes: Bytes so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._sha256 = hashlib.sha256()
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115  # closed by `finish`

    @property
    def sha256(self) -> bytes:
        """Digest of the bytes so far."""
        return self._sha256.digest()

    def append(self, data: bytes) -> None:
        """Append bytes."""
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._sha256.update(data)
        self.size_bytes += len(data)

    def finish(self) -> None:
        """Force the bytes to the disk and close; a second time does nothing."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def close(self) -> None:
        """Close without any promise."""
        self._file.close()


class StagedWrite:
    """The files of one write, in a directory of their own until they are published.

    Every method may run in another thread; they take turns, and after `discard` nothing more is
    written. Storage that is full raises ResourceExhausted (STORAGE_FULL).

    Attributes:
        files: What has arrived, by file name.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, StagedFile] = {}
        self._folder = folder
        self._open = True
        self._turn = threading.Lock()
        with storage_errors():
            folder.mkdir(mode=0o700)

    def append(self, name: str, data: bytes) -> None:
        """Append bytes to a file; the first bytes make it."""
        with self._turn, storage_errors():
            if not self._open:
                raise Unavailable("the write was given up", Reason.CHECKPOINT_UNAVAILABLE)
            file = self.files.get(name)
            if file is None:
                # Numbered, since the name is the caller's.
                file = self.files[name] = StagedFile(self._folder / str(len(self.files)))
            file.append(data)

    def finish(self) -> None:
        """Force every file to the disk."""
        with self._turn, storage_errors():
            for file in self.files.values():
                file.finish()

    def discard(self) -> None:
        """Remove what is still staged; a second time does nothing."""
        with self._turn:
            self._open = False
            for file in self.files.values():
                file.close()
            shutil.rmtree(self._folder, ignore_errors=True)


class BlobReader:
    """Reads one blob from front to back and compares it with its digest at the end.

    Args:
        path: Where the blob is.
        sha256: The digest that it must have.
        size_bytes: The length that it must have.
        label: What errors call it.

    Raises:
        DataLoss: It is missing, has another length or cannot be read (CHECKPOINT_CORRUPT).
    """

    def __init__(self, path: Path, sha256: bytes, size_bytes: int, label: str) -> None:
        self._expected = sha256
        self._left_bytes = size_bytes
        self._label = label
        self._sha256 = hashlib.sha256()
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by `close`
        except OSError as error:
            raise self._damage(str(error.strerror)) from error
        length = os.fstat(self._file.fileno()).st_size
        if length != size_bytes:
            self._file.close()
            raise self._damage(f"{length} bytes long, expected {size_bytes}")

    def read(self, bytes_max: int) -> bytes:
        """The next bytes, empty at the end; the end is reached only by content that is right.

        Raises:
            DataLoss: The content is not what was written (CHECKPOINT_CORRUPT).
        """
        if not self._left_bytes:
            if self._sha256.digest() != self._expected:
                raise self._damage("the content does not match its SHA-256")
            return b""
        try:
            data = self._file.read(min(bytes_max, self._left_bytes))
        except OSError as error:
            raise self._damage(str(error.strerror)) from error
        if not data:
            raise self._damage("shorter than it was")
        self._left_bytes -= len(data)
        self._sha256.update(data)
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _damage(self, what: str) -> DataLoss:
        _log.error("blob %s is damaged: %s", self._expected.hex(), what)
        return DataLoss(f"{self._label} is damaged: {what}", Reason.CHECKPOINT_CORRUPT)


class BlobStore:
    """The blobs of one folder.

    Args:
        folder: The data folder, locked by the caller.

    Raises:
        StorageError: The folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / "blobs"
        self._staging = folder / "staging"
        self._pins: Counter[bytes] = Counter()
        self._guard = threading.Lock()
        try:
            shutil.rmtree(self._staging, ignore_errors=True)
            for made in (self._blobs, self._staging):
                made.mkdir(exist_ok=True, mode=0o700)
            _sync_directory(folder)
        except OSError as error:
            raise StorageError(f"{folder}: {error.strerror}") from error

    def stage(self) -> StagedWrite:
        """Begin a write."""
        return StagedWrite(self._staging / secrets.token_hex(16))

    def open(self, sha256: bytes, size_bytes: int, label: str) -> BlobReader:
        """Open a blob, which the caller has pinned; errors as `BlobReader`."""
        return BlobReader(self._path(sha256), sha256, size_bytes, label)

    def publish(self, staged: StagedWrite) -> None:
        """Move finished files to their digests, durably; the caller has pinned these.

        A blob that is there already is replaced: if it was damaged, this heals it.
        """
        with storage_errors():
            for file in staged.files.values():
                target = self._path(file.sha256)
                if not target.parent.exists():
                    target.parent.mkdir(exist_ok=True, mode=0o700)
                    _sync_directory(self._blobs)
                os.replace(file.path, target)
                _sync_directory(target.parent)

    def pin(self, digests: Iterable[bytes]) -> None:
        """Keep blobs from being removed, whether or not they exist yet."""
        with self._guard:
            self._pins.update(digests)

    def unpin(self, digests: Iterable[bytes]) -> None:
        """Undo one `pin`."""
        with self._guard:
            self._pins.subtract(digests)
            self._pins = +self._pins

    def remove_unused(
        self, candidates: Iterable[bytes], is_referenced: Callable[[bytes], bool]
    ) -> set[bytes]:
        """Remove the blobs among these that nobody needs.

        Returns:
            Those that are pinned: to be tried again later.
        """
        kept = set()
        for digest in candidates:
            # Under the guard, so that nobody can pin it between the question and the removal.
            with self._guard:
                if self._pins[digest] > 0:
                    kept.add(digest)
                elif not is_referenced(digest):
                    self._path(digest).unlink(missing_ok=True)
        return kept

    def digests(self) -> Iterator[bytes]:
        """The digests of all blobs on the disk."""
        for path in self._blobs.glob("??/*"):
            try:
                yield bytes.fromhex(path.name)
            except ValueError:
                _log.warning("%s is no blob; it was left alone", path)

    def _path(self, sha256: bytes) -> Path:
        name = sha256.hex()
        return self._blobs / name[:2] / name


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn what the disk says about a write into a refusal that the caller can act on."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise storage_full() from error
        _log.error("the storage cannot be written: %s", error)
        raise Unavailable(
            "the storage cannot be written", Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=5.0
        ) from error


def storage_full() -> ResourceExhausted:
    """What to raise when there is no room."""
    return ResourceExhausted("the storage is full", Reason.STORAGE_FULL, retry_after_s=30.0)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
