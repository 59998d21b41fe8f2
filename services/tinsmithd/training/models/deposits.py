"""Deposits: what the ranks leave on this machine's disk for the Checkpoint server, unsent.

Where the Checkpoint server's data folder can be written to here, a save makes a folder in it, of a
name that nobody else knows. Rank 0 leaves the state's files there if it finds that folder, which
shows that it is on this machine, too; the Checkpoint server takes them if it is told its name. A
lock on the folder says that this process lives, so that what it leaves is removed if it dies.
"""

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tinsmithd.errors import Reason, Unavailable
from tinsmithd.files import DEPOSITS_FOLDER, hold_deposit

READ_BYTES = 1024 * 1024

_log = logging.getLogger(__name__)


class Deposit:
    """The files of one state.

    Args:
        path: Its folder.

    Attributes:
        name: That of the folder, which the Checkpoint server is told.
        folder: The folder.
        files: Bytes of each file, once they are there.
        begun: Set when they begin to come.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.folder = path.name, str(path)
        self.files: Mapping[str, int] = {}
        self.begun = asyncio.Event()

    async def pieces(self) -> AsyncIterator[tuple[str, bytes]]:
        """The files piece by piece, for a server that does not find them.

        Raises:
            Unavailable: They are gone (CHECKPOINT_UNAVAILABLE).
        """
        for name, nbytes in self.files.items():
            with await self._try(name, self._open, name) as file:
                sent = 0
                while data := await self._try(name, file.read, READ_BYTES):
                    sent += len(data)
                    yield name, data
            if sent != nbytes:
                raise _gone(name, f"{sent} of {nbytes} bytes are there")

    def _open(self, name: str) -> BinaryIO:
        return (Path(self.folder) / name).open("rb", buffering=0)

    async def _try(self, name: str, read: Any, *args: Any) -> Any:
        try:
            return await asyncio.to_thread(read, *args)
        except OSError as error:
            raise _gone(name, str(error.strerror)) from error


class Deposits:
    """Makes deposits at one Checkpoint server.

    Args:
        data_folder: That server's, where it is on this machine; None: it is not.
    """

    def __init__(self, data_folder: Path | None) -> None:
        self._folder = None if data_folder is None else data_folder / DEPOSITS_FOLDER

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Deposit | None]:
        """A deposit for the body of the `async with`, after which what is left of it is removed.

        Yields:
            None where there is none to be had.
        """
        if self._folder is None:
            yield None
            return
        making = asyncio.ensure_future(asyncio.to_thread(hold_deposit, self._folder))
        try:
            path, holder = await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(_unmake)
            raise
        except OSError as error:
            _log.info("a state is sent, since no deposit can be made: %s", error)
            yield None
            return
        try:
            yield Deposit(path)
        finally:
            await asyncio.to_thread(_remove, path, holder)

    def are_not_found(self) -> None:
        """The Checkpoint server does not find what is left: from now on all is sent."""
        _log.warning("the Checkpoint server is not that of checkpoint_folder: states are sent")
        self._folder = None


def _remove(path: Path, holder: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(holder)


def _unmake(made: asyncio.Future[tuple[Path, int]]) -> None:
    """Remove a folder whose caller went away while it was made."""
    if not made.cancelled() and made.exception() is None:
        _remove(*made.result())


def _gone(name: str, why: str) -> Unavailable:
    text = f"{name}, which the ranks left for the Checkpoint server, is not there any more: {why}"
    return Unavailable(text, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=1.0)
