"""Reads the files of checkpoints where they lie, on a machine that they share with their server.

What they are is said by the Checkpoint server; here it is only looked for under its digest. So what
is not there, or is not what it should be, is as if it were on another machine.
"""

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from tinsmithd.errors import DataLoss
from tinsmithd.files import BLOBS_FOLDER, blob_file
from tinsmithd.reused_memory import ReusedMemory

T = TypeVar("T")
KEPT_BYTES_MAX = 64 * 1024 * 1024
"""Of memory for the next files: as large as what a Sampler brings in ahead, by default."""


@dataclass(frozen=True)
class Found(Generic[T]):
    """What lies under the digests of some files.

    Attributes:
        content: What was made of it.
        proof: Whether it is what those digests are of. As long as that is not known, or if it is
            not, nothing may come of the content that anybody sees.
    """

    content: T
    proof: Future[bool]


class LocalFiles:
    """The files of one Checkpoint server.

    Args:
        data_folder: That server's `data_folder`.
    """

    def __init__(self, data_folder: Path) -> None:
        self._blobs = data_folder / BLOBS_FOLDER
        self._memory = ReusedMemory(KEPT_BYTES_MAX)

    def read(
        self,
        files: Mapping[str, bytes],
        bytes_max: int,
        parse: Callable[[Mapping[str, memoryview]], T],
    ) -> Found[T] | None:
        """What files hold; None where one of them cannot be had here.

        Args:
            files: SHA-256 of each, by name.
            bytes_max: Maximum bytes of all of them.
            parse: Makes it of their content, which is verified meanwhile and goes on to be: it
                takes any bytes, and raises DataLoss for those that it cannot use.

        Raises:
            DataLoss: What `parse` raised of the right content.
        """
        found = self._read(files, bytes_max)
        if found is None:
            return None
        # Either takes long, and hashing leaves the interpreter to others.
        beside = ThreadPoolExecutor(1, "verifying")
        proof = beside.submit(_match, found, files)
        beside.shutdown(wait=False)
        try:
            return Found(parse(found), proof)
        except DataLoss:
            if proof.result():
                raise
            return None

    def _read(self, files: Mapping[str, bytes], bytes_max: int) -> dict[str, memoryview] | None:
        found: dict[str, memoryview] = {}
        left = bytes_max
        for name, sha256 in files.items():
            try:
                with blob_file(self._blobs, sha256.hex()).open("rb", buffering=0) as file:
                    content = self._content(file, left)
            except OSError:
                return None
            if content is None:
                return None
            found[name] = content
            left -= len(content)
        return found if found else None

    def _content(self, file: io.FileIO, bytes_max: int) -> memoryview | None:
        """All bytes of a file; None where they are too many, or fewer than the file had."""
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > bytes_max:
            return None
        content, end = self._memory.take(nbytes).data, 0
        while end < nbytes:
            count = file.readinto(content[end:])
            if not count:
                return None
            end += count
        return content


def _match(found: Mapping[str, memoryview], files: Mapping[str, bytes]) -> bool:
    return all(hashlib.sha256(found[name]).digest() == sha256 for name, sha256 in files.items())
