"""Reads the files of checkpoints where they lie, on a machine that they share with their server.

What they are is said by the Checkpoint server; here it is only looked for under its digest. So what
is not there, or is not what it should be, is as if it were on another machine.
"""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from tinsmithd.errors import DataLoss
from tinsmithd.files import BLOBS_FOLDER, blob_file

T = TypeVar("T")


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

    def read(
        self,
        files: Mapping[str, bytes],
        bytes_max: int,
        parse: Callable[[Mapping[str, bytes]], T],
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

    def _read(self, files: Mapping[str, bytes], bytes_max: int) -> dict[str, bytes] | None:
        found: dict[str, bytes] = {}
        left = bytes_max
        for name, sha256 in files.items():
            try:
                with blob_file(self._blobs, sha256.hex()).open("rb") as file:
                    found[name] = file.read(left + 1)
            except OSError:
                return None
            left -= len(found[name])
            if left < 0:
                return None
        return found if found else None


def _match(found: Mapping[str, bytes], files: Mapping[str, bytes]) -> bool:
    return all(hashlib.sha256(found[name]).digest() == sha256 for name, sha256 in files.items())
