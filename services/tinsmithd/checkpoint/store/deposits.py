"""Files that writers on this machine left for the Checkpoint server instead of sending them.

    <folder>/<deposit>/<file name>

A writer makes the folder of a deposit, under a random name that nobody else knows, and holds a lock
on it while it lives. What it left is moved out, and then looked at: what it was called before tells
nothing. A deposit that no living writer holds is removed.
"""

import contextlib
import errno
import fcntl
import io
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from tinsmithd.errors import NotFound, Reason
from tinsmithd.files import is_deposit, private_folder

NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EXDEV, errno.ENXIO)
"""What a system says of a place that has no file, or leads elsewhere."""
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Without waiting for somebody to write into it, should it be a pipe."""


class Deposits:
    """The deposits at one Checkpoint server.

    Args:
        folder: Has them; it is made here, for this server's user alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        private_folder(folder)
        self.sweep()

    def open(self, deposit: str, name: str) -> io.FileIO:
        """Open a file that may not be complete yet, for reading; it stays where it is.

        Raises:
            NotFound: As `move`.
            OSError: The disk fails.
        """
        with self._holder(deposit, name) as holder:
            return io.FileIO(_checked(name, os.open(name, _READ, dir_fd=holder)))

    def move(self, deposit: str, name: str, place: Path) -> io.BufferedReader:
        """Move a file out of a deposit.

        Args:
            deposit: Which one.
            name: A plain name.
            place: Where it goes, in a folder of which nobody else knows.

        Returns:
            The file, open for reading.

        Raises:
            NotFound: It is not there, or is no file that this user alone has (DEPOSIT_NOT_FOUND);
                whatever else it is, it is at `place` then.
            OSError: The disk fails.
        """
        with self._holder(deposit, name) as holder:
            os.rename(name, place, src_dir_fd=holder)
            descriptor = _checked(name, os.open(place, _READ))
        os.fchmod(descriptor, 0o600)
        return os.fdopen(descriptor, "rb")

    @contextlib.contextmanager
    def _holder(self, deposit: str, name: str) -> Iterator[int]:
        """A descriptor of a deposit's folder, for the body of the `with`, which is after a file."""
        try:
            holder = os.open(
                self._folder / deposit, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            )
            try:
                yield holder
            finally:
                os.close(holder)
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            raise _not_found(name, os.strerror(error.errno)) from error

    def sweep(self) -> None:
        """Remove the deposits that no living writer holds."""
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if is_deposit(path.name):
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(descriptor)


def _checked(name: str, descriptor: int) -> int:
    """The descriptor of a file, once it is seen to be one that this server's user alone has."""
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_nlink != 1:
        os.close(descriptor)
        raise _not_found(name, "it is no file that this server's user alone has")
    return descriptor


def _not_found(name: str, why: str) -> NotFound:
    return NotFound(f"{name[:100]!r} is not in the deposit: {why}", Reason.DEPOSIT_NOT_FOUND)
