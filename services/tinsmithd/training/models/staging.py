"""States on their way between the ranks and the Checkpoint server: on this server's disk.

A turn at the ranks lasts as long as it takes to copy a state, or to take one in, and never as long
as the Checkpoint server takes. So a state that leaves the ranks is written here first, and one that
comes for them is here whole before their turn. These files have no names on the disk, and nothing
is left of them when the process ends.
"""

import asyncio
import contextlib
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import IO, Protocol

from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.training.ranks import Pieces

READ_BYTES = 256 * 1024


class Staged(Protocol):
    """The files of one state."""

    async def write(self, name: str, data: bytes) -> None:
        """Append bytes to a file; files come one after the other.

        Raises:
            ResourceExhausted: There is no room (STORAGE_FULL).
        """

    def pieces(self) -> AsyncIterator[tuple[str, bytes]]:
        """What was written, from the start: file names with their next bytes."""


class Staging(Protocol):
    """Takes states in."""

    def open(self) -> AbstractAsyncContextManager[Staged]:
        """Room for one state, for the body of the `async with`."""


class Copies:
    """Limits how many whole states are in memory at once, over all models.

    Args:
        leaving_max: Maximum number of copies that the ranks hold until they are here.

    Attributes:
        leaving: Held from before a copy is made until the ranks have sent all of it.
        coming: Held while one is in this process's memory, on its way to the ranks.
    """

    def __init__(self, leaving_max: int) -> None:
        self.leaving = asyncio.Semaphore(leaving_max)
        self.coming = asyncio.Lock()


async def whole(staged: Staged) -> Pieces:
    """All of a state, in memory."""
    return [piece async for piece in staged.pieces()]


class DiskStaging:
    """See `Staging`.

    Args:
        folder: Has the files; made when it is needed.
        bytes_max: Maximum bytes of all states together.
    """

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self.nbytes = 0

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator["DiskStaged"]:
        """Room for one state."""
        with _storage_errors():
            file = await asyncio.to_thread(self._open)
        staged = DiskStaged(self, file)
        try:
            yield staged
        finally:
            self.nbytes -= staged.nbytes
            await asyncio.to_thread(staged.close)

    def _open(self) -> IO[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=self._folder, buffering=0)

    def take(self, nbytes: int) -> None:
        """Count bytes that arrive.

        Raises:
            ResourceExhausted: They are too many (STORAGE_FULL).
        """
        if self.nbytes + nbytes > self._bytes_max:
            raise ResourceExhausted(
                f"states on their way hold {self.nbytes} bytes, staged_bytes_max is "
                f"{self._bytes_max}",
                Reason.STORAGE_FULL,
                retry_after_s=1.0,
                metadata={"limit": "staged_bytes_max", "value": str(self.nbytes + nbytes)},
            )
        self.nbytes += nbytes


class DiskStaged:
    """See `Staged`. Its calls come one at a time."""

    def __init__(self, staging: DiskStaging, file: IO[bytes]) -> None:
        self._staging = staging
        self._file = file
        self._lock = threading.Lock()  # a call's thread may outlive its caller
        self._sizes: dict[str, int] = {}
        self.nbytes = 0

    async def write(self, name: str, data: bytes) -> None:
        """Append bytes to a file."""
        self._staging.take(len(data))
        self.nbytes += len(data)
        with _storage_errors():
            await asyncio.to_thread(self._write, data)
        self._sizes[name] = self._sizes.get(name, 0) + len(data)

    def _write(self, data: bytes) -> None:
        with self._lock:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]

    async def pieces(self) -> AsyncIterator[tuple[str, bytes]]:
        """What was written, from the start."""
        start = 0
        for name, size in self._sizes.items():
            if not size:
                yield name, b""
            for at in range(start, start + size, READ_BYTES):
                nbytes = min(READ_BYTES, start + size - at)
                yield name, await asyncio.to_thread(self._read, at, nbytes)
            start += size

    def _read(self, at: int, nbytes: int) -> bytes:
        with self._lock:
            data = os.pread(self._file.fileno(), nbytes, at)
        if len(data) != nbytes:
            raise OSError(f"{nbytes} bytes were written at {at}, {len(data)} are there")
        return data

    def close(self) -> None:
        """Give the room back."""
        with self._lock:
            self._file.close()


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"a state cannot be written: {error}"
        raise ResourceExhausted(text, Reason.STORAGE_FULL, retry_after_s=1.0) from error
