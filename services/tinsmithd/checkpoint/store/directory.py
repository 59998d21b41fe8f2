"""Blobs on a local disk, named by what they hold: whole or absent, shared between copies.

    <folder>/blobs/ab/abcd...      one file per content, named by its SHA-256
    <folder>/...                   what is on its way in; see `spool`

A durable blob is synced before it is renamed into place, then its folder and the folder of folders:
a name that `DirectoryStaging.publish` returned for has its bytes, whatever happens to the power.
Where another one was there that may not be durable, that one is synced.
"""

import contextlib
import errno
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tinsmithd import failpoints
from tinsmithd.checkpoint.store.failures import of_disk, storage_errors
from tinsmithd.checkpoint.store.interface import Blob, Guard, Staging, Unused
from tinsmithd.checkpoint.store.spool import KEPT_BYTES, Spool, SpoolFolder
from tinsmithd.checkpoint.store.verified import corrupt, verified
from tinsmithd.errors import TinsmithError
from tinsmithd.files import BLOBS_FOLDER, blob_file, sync_file

READ_BYTES = 1024 * 1024


class BlobFolder:
    """Where blobs lie, and what makes their names durable.

    Args:
        path: The folder.
        together: Waits for the disk for several things at once.
    """

    def __init__(
        self, path: Path, together: Callable[[Sequence[Callable[[], object]]], None]
    ) -> None:
        self.path = path
        self._together = together
        self._durable: set[Path] = set()

    def place(self, blob: Blob) -> Path:
        """Where a blob is."""
        return blob_file(self.path, blob.sha256)

    def make_room(self, place: Path) -> None:
        """Make the folder of a blob, if it is not there."""
        try:
            place.parent.mkdir()
        except FileExistsError:
            return
        self._durable.discard(place.parent)

    def sync(self, places: Collection[Path], files: Collection[Path] = ()) -> None:
        """Make the names of blobs durable, and files of them."""
        folders = {place.parent for place in places}
        syncs = [*files, *sorted(folders)]
        if not folders <= self._durable:  # else their own names are on the disk, and stay
            syncs.append(self.path)
        self._together([functools.partial(sync_file, path) for path in syncs])
        self._durable |= folders


class DirectoryStaging(Spool):
    """See `Staging`.

    Args:
        within: Gets a folder for its files.
        blobs: The folder that published files go to.
        bytes_max: Maximum number of bytes in all files.
    """

    def __init__(self, within: SpoolFolder, blobs: BlobFolder, bytes_max: int) -> None:
        super().__init__(within, bytes_max, KEPT_BYTES)
        self._blobs = blobs

    def _is_stored(self, blob: Blob) -> bool:
        return _holds(self._blobs.place(blob), blob)

    def publish(self, *, durable: bool = True) -> None:
        """See `Staging`."""
        places = [self._blobs.place(blob) for blob in self._finished]
        there: list[Path] = []
        with storage_errors():
            failpoints.hit("ckpt_pre_rename")
            for index, (blob, place) in enumerate(zip(self._finished, places, strict=True)):
                if index:
                    failpoints.hit("ckpt_mid_rename")
                if _holds(place, blob):
                    there.append(place)
                    continue
                if blob.name not in self._files:
                    self._write_now(blob.name)
                self._blobs.make_room(place)
                os.replace(self._path(blob.name), place)
            # Also for what was there: its writer may have died before it came to this.
            if durable:
                self._blobs.sync(places, there)
            if self._is_made:
                with contextlib.suppress(OSError):  # what is left `discard` removes
                    self._folder.rmdir()
                    self._is_made = False

    def _write_now(self, name: str) -> None:
        """Write a file that was stored when the others were written, and was removed since."""
        self._begin(name, self._kept[name])
        with self._files[name] as file:
            file.flush()
            os.fsync(file.fileno())


class DirectoryStore:
    """See `Store`; its blobs are the files of one folder.

    Raises:
        StoreBusy: Another server has the folder.
        FormatUnknown: A later release wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / BLOBS_FOLDER
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._spool = SpoolFolder(folder)
        self._places = BlobFolder(self._blobs, self._spool.together)

    @property
    def shared(self) -> bool:
        """See `Store`."""
        return False

    @property
    def empty(self) -> bool:
        """See `Store`."""
        return next(self._blobs.glob("*/*"), None) is None

    def close(self) -> None:
        """See `Store`."""
        self._spool.close()

    def stage(self, bytes_max: int) -> Staging:
        """See `Store`."""
        return DirectoryStaging(self._spool, self._places, bytes_max)

    def forget_deposits(self) -> None:
        """See `Store`."""
        self._spool.forget_deposits()

    def read(self, blob: Blob) -> Iterator[bytes]:
        """See `Store`."""
        try:
            file = blob_file(self._blobs, blob.sha256).open("rb")
        except OSError as error:
            raise self._unreadable(blob, error) from error
        return verified(blob, self._pieces(file, blob))

    def _unreadable(self, blob: Blob, error: OSError) -> TinsmithError:
        # Where all blobs are gone the disk is, not this one. EIO is what a worn-out disk says.
        lost = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
        if lost and self._blobs.is_dir():
            return corrupt(blob, f"cannot be read: {error.strerror}")
        return of_disk(error)

    def _pieces(self, file: Any, blob: Blob) -> Iterator[bytes]:
        with file:
            try:
                while data := file.read(READ_BYTES):
                    yield data
            except OSError as error:
                raise self._unreadable(blob, error) from error

    def url(self, blob: Blob, seconds: float) -> str:
        """See `Store`."""
        return ""

    def sync(self, blobs: Collection[Blob]) -> None:
        """See `Store`."""
        places = [blob_file(self._blobs, blob.sha256) for blob in blobs]
        for blob, place in zip(blobs, places, strict=True):
            try:
                sync_file(place)
            except OSError as error:
                raise self._unreadable(blob, error) from error
        with storage_errors():
            self._places.sync(places)

    def probe(self) -> None:
        """See `Store`."""
        with storage_errors(), os.scandir(self._blobs) as entries:
            next(entries, None)

    def sweep(
        self,
        unused: Unused,
        of: Collection[str] | None = None,
        guard: Guard = nullcontext,
    ) -> int:
        """See `Store`."""
        if of is not None:
            return self._remove([blob_file(self._blobs, place) for place in of], unused, guard)
        removed = 0
        for folder in sorted(self._blobs.iterdir()):
            removed += self._remove(list(folder.iterdir()), unused, guard)
        return removed

    @staticmethod
    def _remove(files: Collection[Path], unused: Unused, guard: Guard) -> int:
        places = {file.name: file for file in files}
        with guard():
            removed = [name for name in unused(list(places)) if places[name].exists()]
            for name in removed:
                places[name].unlink(missing_ok=True)
            return len(removed)


def _holds(place: Path, blob: Blob) -> bool:
    try:
        if place.stat().st_size != blob.size_bytes:
            return False
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == blob.sha256
    except OSError:
        return False  # not there, or not readable: what was sent now replaces it
