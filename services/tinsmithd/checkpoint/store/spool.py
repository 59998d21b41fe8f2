"""Files on their way in, on a local disk: what every store does with them before they count.

<folder>/staging/<random>/     what is being written; emptied when the server starts
<folder>/deposits/<random>/    what others on this machine left to be taken; see `deposits`
<folder>/lock                  held by the one server that may write here
<folder>/format.json           in which format the folder is
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tinsmithd import failpoints
from tinsmithd.checkpoint.store.deposits import Deposits
from tinsmithd.checkpoint.store.failures import storage_errors
from tinsmithd.checkpoint.store.following import FOLLOWED_MAX, Following
from tinsmithd.checkpoint.store.interface import Blob, StoreBusy
from tinsmithd.errors import InvalidArgument, Reason, over_limit
from tinsmithd.files import DEPOSITS_FOLDER, file_digest, sync_file
from tinsmithd.formats import check_folder

FORMAT = 1
"""Of the folder."""
SYNCS = 32
"""Files that are waited for at a time, of all that are on their way in."""
KEPT_BYTES = 64 * 1024
"""Bytes of a write's small files that stay in memory until it ends: whoever sends them waits for no
disk, and what is there already is not written again."""
KEEPERS_MAX = 256
"""Writes at a time that keep some."""


class SpoolFolder:
    """What one server has on its disk of files on their way in.

    Attributes:
        staging: The folder that has those that are being written.
        deposits: What is there to be taken.
        places: A place is had by whoever follows one of them.
        keepers: A place is had by whoever keeps small files in memory.

    Raises:
        StoreBusy: Another server has the folder.
        FormatUnknown: A later release wrote it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StoreBusy(f"{folder} is used by another Checkpoint server") from error
        check_folder(folder, "the folder of checkpoints", FORMAT)
        self.deposits = Deposits(folder / DEPOSITS_FOLDER)
        self.places = threading.BoundedSemaphore(FOLLOWED_MAX)
        self.keepers = threading.BoundedSemaphore(KEEPERS_MAX)
        self.staging = folder / "staging"
        self.staging.mkdir(exist_ok=True)
        for left in self.staging.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        sync_file(folder)
        with contextlib.suppress(PermissionError):  # a mount point is often somebody else's
            sync_file(folder.parent)
        self._beside = ThreadPoolExecutor(SYNCS, thread_name_prefix="sync")

    def close(self) -> None:
        """Let another server have it."""
        self._beside.shutdown()
        self._lock.close()

    def together(self, syncs: Sequence[Callable[[], object]]) -> None:
        """Wait for the disk for several things at once, which takes little longer than for one."""
        coming = [self._beside.submit(sync) for sync in syncs[1:]]
        try:
            for sync in syncs[:1]:
                sync()
        finally:
            wait(coming)
        for each in coming:
            each.result()

    def forget_deposits(self) -> None:
        """Remove the deposits whose writers are gone."""
        with storage_errors():
            self.deposits.sweep()


class Spool:
    """What `Staging` says, but for `publish`; its files lie in a folder of their own.

    Args:
        within: Gets that folder.
        bytes_max: Maximum number of bytes in all files.
        kept_max: Bytes of small files that may stay in memory until `finish`.
    """

    def __init__(self, within: SpoolFolder, bytes_max: int, kept_max: int = 0) -> None:
        self._folder = within.staging / secrets.token_hex(16)
        self._is_made = False
        self._keepers = within.keepers
        self._is_keeper = kept_max > 0 and self._keepers.acquire(blocking=False)
        self._kept_max = kept_max
        self._kept: dict[str, bytearray] = {}
        self._together = within.together
        self._deposits, self._places = within.deposits, within.places
        self._following: Following | None = None
        self._bytes_max = bytes_max
        self._bytes = 0
        self._sizes: dict[str, int] = {}
        self._digests: dict[str, hashlib._Hash] = {}
        self._files: dict[str, Any] = {}
        self._last_name = ""
        self._finished: Sequence[Blob] = ()

    def keeps(self, name: str, nbytes: int) -> bool:
        """See `Staging`."""
        is_small = name in self._kept or name not in self._sizes
        kept = sum(map(len, self._kept.values()))
        return self._is_keeper and is_small and kept + nbytes <= self._kept_max

    @property
    def is_clean(self) -> bool:
        """See `Staging`."""
        return not self._is_made and self._following is None

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
                self._digests[name] = hashlib.sha256()
            if self.keeps(name, len(data)):
                self._kept.setdefault(name, bytearray()).extend(data)
            else:
                if name not in self._files:
                    self._begin(name, self._kept.pop(name, b""))
                self._files[name].write(data)
            failpoints.hit("ckpt_mid_write")
        self._sizes[name] = expected + len(data)
        self._digests[name].update(data)

    def _begin(self, name: str, data: bytes | bytearray) -> None:
        """Begin a file on the disk."""
        self._make_folder()
        self._files[name] = self._path(name).open("wb")
        self._files[name].write(data)

    def _make_folder(self) -> None:
        if not self._is_made:
            self._folder.mkdir()
            self._is_made = True

    def follow(self, deposit: str, names: Sequence[str]) -> None:
        """See `Staging`."""
        if self._following is None and self._places.acquire(blocking=False):
            try:
                self._following = Following(self._deposits, deposit, names)
            except RuntimeError:  # no thread is to be had: all is hashed in the end
                self._places.release()

    def take(self, deposit: str, name: str) -> int:
        """See `Staging`."""
        with storage_errors():
            self._make_folder()
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
                if name in self._files:
                    self._files[name].flush()

    def finish(self, *, durable: bool = True) -> list[Blob]:
        """See `Staging`."""
        if self._following is not None:
            self._following.stop()
        with storage_errors():
            for name, data in self._kept.items():
                if not self._is_stored(self._blob(name)):
                    self._begin(name, data)
        self.flush()
        with storage_errors():
            for name in self._files.keys() - self._digests.keys():
                # Of what was taken: nobody here has read it so far, or not all of it.
                file = self._files[name]
                begun = None if self._following is None else self._following.digest_of(name, file)
                self._digests[name] = file_digest(file, begun)
            failpoints.hit("ckpt_pre_fsync")
            if durable:
                # Through the descriptor that wrote: it hears of a write-back that failed.
                numbers = [file.fileno() for file in self._files.values()]
                self._together([functools.partial(_sync, number) for number in numbers])
            for file in self._files.values():
                file.close()
        self._finished = [self._blob(name) for name in sorted(self._sizes)]
        return list(self._finished)

    def _blob(self, name: str) -> Blob:
        return Blob(name, self._sizes[name], self._digests[name].hexdigest())

    def _is_stored(self, blob: Blob) -> bool:
        """Whether a file that is kept in memory needs not be written, as far as that is known."""
        return False

    def open(self, name: str) -> io.BufferedIOBase:
        """See `Staging`."""
        kept = self._kept.get(name)
        return open(self._path(name), "rb") if kept is None else io.BytesIO(kept)

    def refused(self) -> None:
        """See `Staging`; nothing happens where another checkpoint may have the same files."""

    def discard(self) -> None:
        """See `Staging`."""
        if self._following is not None:
            self._following.close()
            self._following = None
            self._places.release()
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        if self._is_keeper:
            self._is_keeper = False
            self._keepers.release()
        if self._is_made:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        # A name that someone sent is hashed before it meets the file system.
        return self._folder / hashlib.sha256(name.encode()).hexdigest()


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
