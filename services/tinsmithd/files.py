"""What every server that keeps files does with them."""

import contextlib
import fcntl
import hashlib
import io
import os
import re
import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

BLOBS_FOLDER = "blobs"
"""Where in its data folder a Checkpoint server keeps the files of checkpoints."""
DEPOSITS_FOLDER = "deposits"
"""Where in its data folder writers on the same machine leave files, each in a folder of its own."""
SNAPSHOTS_FOLDER = "snapshots"
"""Where in its data folder a Training server keeps snapshots of models."""
DIGEST_BYTES = 1024 * 1024
"""Bytes of a file that are read at once to be hashed: always into the same memory, which a core has
in its cache then. New memory for each costs as much as the hash."""
BUFFERS_MAX = 1024
"""Buffers that the system takes at once (IOV_MAX)."""
TOGETHER_BYTES = 4 * 1024 * 1024
"""Bytes after which no more of them are written at once: their maker may copy each."""
_DEPOSIT = re.compile(r"[0-9a-f]{32}", re.ASCII)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


def is_plain_name(name: str) -> bool:
    """Whether a name that another process gave is a file's, and leads into no other folder."""
    return _PLAIN_NAME.fullmatch(name) is not None


def is_deposit(name: str) -> bool:
    """Whether a name that another process gave may be that of a deposit."""
    return _DEPOSIT.fullmatch(name) is not None


def hold_deposit(deposits: Path) -> tuple[Path, int]:
    """Make a deposit that is held by this process: no sweep removes it while it is.

    A sweep may come between the two steps of it, of which the system knows no one that is both.

    Args:
        deposits: The folder of deposits of a Checkpoint server, on this machine.

    Returns:
        Its folder, and the descriptor that holds it until it is closed.

    Raises:
        OSError: It cannot be made; nothing is left then.
    """
    while True:
        path = deposits / secrets.token_hex(16)
        path.mkdir(mode=0o700)
        holder = None
        try:
            holder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(holder, fcntl.LOCK_SH)
            path.stat()
        except BaseException as error:
            if holder is not None:
                os.close(holder)
            if isinstance(error, FileNotFoundError):  # it was swept: another one
                continue
            with contextlib.suppress(OSError):
                path.rmdir()
            raise
        return path, holder


def blob_file(blobs: Path, sha256: str) -> Path:
    """Where a Checkpoint server keeps a file of this content (SHA-256 in hex)."""
    return blobs / sha256[:2] / sha256


def file_digest(file: io.BufferedReader, digest: "hashlib._Hash | None" = None) -> "hashlib._Hash":
    """SHA-256 of the rest of a file, and of what the digest has had before that."""
    digest = hashlib.sha256() if digest is None else digest
    piece = memoryview(bytearray(DIGEST_BYTES))
    while count := file.readinto(piece):
        digest.update(piece[:count])
    return digest


def write_all(descriptor: int, buffers: Iterable[memoryview]) -> int:
    """Write buffers of bytes one after the other; returns how many bytes they are.

    Small ones go together: a call of the system for each costs as much as the writing.
    """
    written = 0
    for some in _together(buffers):
        while some:
            count = os.writev(descriptor, some)
            written += count
            while some and count >= len(some[0]):
                count -= len(some.popleft())
            if some:
                some[0] = some[0][count:]
    return written


def _together(buffers: Iterable[memoryview]) -> Iterator[deque[memoryview]]:
    some, nbytes = deque[memoryview](), 0
    for buffer in buffers:
        some.append(buffer)
        nbytes += len(buffer)
        if len(some) == BUFFERS_MAX or nbytes >= TOGETHER_BYTES:
            yield some
            some, nbytes = deque(), 0
    yield some


def sync_file(path: Path) -> None:
    """Make the content of a file durable; that of a folder is the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_folder(folder: Path) -> None:
    """Make a folder for a server's data, or close the one that is there to other users.

    The umask of a server keeps new files to its user; what an older release wrote was for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # a mounted volume, which somebody else owns
        folder.chmod(folder.stat().st_mode & ~0o077)
