"""Reads the files of checkpoints where they lie, on a machine that they share with their server.

What they are is said by the Checkpoint server; here it is only looked for under its digest. So what
is not there, or is not what it should be, is as if it were on another machine.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from tinsmithd.files import BLOBS_FOLDER, blob_file


class LocalFiles:
    """The files of one Checkpoint server.

    Args:
        data_folder: That server's `data_folder`.
    """

    def __init__(self, data_folder: Path) -> None:
        self._blobs = data_folder / BLOBS_FOLDER

    def read(self, files: Mapping[str, bytes], bytes_max: int) -> dict[str, bytes] | None:
        """The content of files; None where one of them cannot be had here.

        Args:
            files: SHA-256 of each, by name.
            bytes_max: Maximum bytes of all of them.
        """
        found: dict[str, bytes] = {}
        left = bytes_max
        for name, sha256 in files.items():
            try:
                with blob_file(self._blobs, sha256.hex()).open("rb") as file:
                    found[name] = file.read(left + 1)
            except OSError:
                return None
            left -= len(found[name])
            if left < 0 or hashlib.sha256(found[name]).digest() != sha256:
                return None
        return found if found else None
