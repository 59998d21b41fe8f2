"""States on their way between the ranks and the Checkpoint server: here, in memory or on disk.

A turn at the ranks lasts as long as it takes to copy a state, or to take one in, and never as long
as the Checkpoint server takes. So a state that leaves the ranks is taken in here at the speed of
the ranks, and one that comes for them is here whole before their turn. While it comes in it already
goes on to the Checkpoint server, as fast as that one takes it. A few small states are kept in
memory; the rest goes to files without names, of which nothing is left when the process ends.
"""

import asyncio
import contextlib
import itertools
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.training.ranks import Pieces

READ_BYTES = 1024 * 1024
MEMORY_BYTES_MAX = 64 * 1024 * 1024
"""Bytes of all states together that are kept in memory; what comes beyond goes to the disk."""


class Staged(Protocol):
    """The files of one state."""

    async def write(self, name: str, data: bytes) -> None:
        """Append bytes to a file; files come one after the other.

        Raises:
            ResourceExhausted: There is no room (STORAGE_FULL).
        """

    def complete(self) -> None:
        """Say that nothing more is written."""

    def pieces(self) -> AsyncIterator[tuple[str, bytes]]:
        """What was written, from the start, and what still is until `complete`: file names with
        their next bytes."""


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
    """All of a complete state, in memory."""
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
        self.memory_nbytes = 0

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
            self.memory_nbytes -= staged.memory_nbytes
            await asyncio.to_thread(staged.close)

    def _open(self) -> IO[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=self._folder, buffering=0)

    def take(self, nbytes: int) -> bool:
        """Count bytes that arrive; True where memory has room for them.

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
        in_memory = self.memory_nbytes + nbytes <= MEMORY_BYTES_MAX
        self.memory_nbytes += nbytes if in_memory else 0
        return in_memory


class DiskStaged:
    """See `Staged`. What is written comes one piece at a time; what is read may be meanwhile."""

    def __init__(self, staging: DiskStaging, file: IO[bytes]) -> None:
        self._staging = staging
        self._file = file
        self._lock = threading.Lock()  # a call's thread may outlive its caller
        self._pieces: list[tuple[str, bytes | _InFile]] = []
        self._written_bytes = 0
        self._complete = False
        self._more = asyncio.Event()
        self.nbytes = 0
        self.memory_nbytes = 0

    async def write(self, name: str, data: bytes) -> None:
        """Append bytes to a file."""
        in_memory = self._staging.take(len(data))
        self.nbytes += len(data)
        piece: bytes | _InFile = data
        if in_memory:
            self.memory_nbytes += len(data)
        else:
            with _storage_errors():
                await asyncio.to_thread(self._write, data)
            piece = _InFile(self._written_bytes, len(data))
            self._written_bytes += len(data)
        self._pieces.append((name, piece))
        self._more.set()

    def complete(self) -> None:
        """Say that nothing more is written."""
        self._complete = True
        self._more.set()

    def _write(self, data: bytes) -> None:
        with self._lock:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]

    async def pieces(self) -> AsyncIterator[tuple[str, bytes]]:
        """What was written, from the start, and what still is until `complete`."""
        index = 0
        while True:
            if index == len(self._pieces):
                if self._complete:
                    return
                self._more.clear()
                await self._more.wait()
                continue
            name, piece = self._pieces[index]
            if isinstance(piece, bytes):
                some = self._in_memory(name, index)
                index += len(some)
                yield name, some[0] if len(some) == 1 else b"".join(some)
            else:
                index += 1
                for at in range(piece.start, piece.start + piece.nbytes, READ_BYTES):
                    nbytes = min(READ_BYTES, piece.start + piece.nbytes - at)
                    yield name, await asyncio.to_thread(self._read, at, nbytes)

    def _in_memory(self, name: str, index: int) -> list[bytes]:
        """Pieces of one file from an index on, together at most `READ_BYTES` if not one alone."""
        some: list[bytes] = []
        nbytes = 0
        for of, piece in itertools.islice(self._pieces, index, None):
            if of != name or not isinstance(piece, bytes):
                break
            nbytes += len(piece)
            if some and nbytes > READ_BYTES:
                break
            some.append(piece)
        return some

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


class _InFile(NamedTuple):
    """Where a piece is in the file of its state."""

    start: int
    nbytes: int


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"a state cannot be written: {error}"
        raise ResourceExhausted(text, Reason.STORAGE_FULL, retry_after_s=1.0) from error
