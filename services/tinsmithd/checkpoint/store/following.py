"""Hashes the files of a deposit while their writer still writes them: a head start, and no more.

What is left to do when the writer says that all is there is to hash the rest, and all of a file
that was not followed. A writer writes each file from its beginning, and no byte twice; of one that
does otherwise the digest is not that of the file, which whoever reads it then finds out.
"""

import hashlib
import io
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tinsmithd.checkpoint.store.deposits import Deposits
from tinsmithd.errors import NotFound
from tinsmithd.files import DIGEST_BYTES

FOLLOWED_MAX = 4
"""Deposits that are followed at once; of others all is hashed in the end."""
PAUSE_S_MIN, PAUSE_S_MAX = 0.0003, 0.02
"""Between two looks whether there is more; the longer nothing comes, the longer."""


@dataclass
class _Begun:
    """What was hashed of one file."""

    file: io.FileIO
    digest: Any = field(default_factory=hashlib.sha256)
    nbytes: int = 0


class Following:
    """Follows the files of one deposit, one after the other, on a thread of its own.

    Args:
        deposits: Has it.
        deposit: Its name.
        names: Of the files, in the order in which they are written; some may not come.
    """

    def __init__(self, deposits: Deposits, deposit: str, names: Sequence[str]) -> None:
        self._deposits, self._deposit = deposits, deposit
        self._names = list(names)
        self._begun: dict[str, _Begun] = {}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="following", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Follow no more; this waits for the piece that is being hashed."""
        self._ends.set()
        self._thread.join()

    def close(self) -> None:
        """Stop, and forget it all."""
        self.stop()
        while self._begun:
            self._begun.popitem()[1].file.close()

    def digest_of(self, name: str, file: io.BufferedReader) -> Any:
        """SHA-256 of what was read of a file so far, which is left before its next byte.

        Only after `stop`.
        """
        begun = self._begun.get(name)
        if begun is None or not os.path.sameopenfile(begun.file.fileno(), file.fileno()):
            return hashlib.sha256()
        file.seek(begun.nbytes)
        return begun.digest

    def _run(self) -> None:
        piece = memoryview(bytearray(DIGEST_BYTES))
        pause_s, begun = PAUSE_S_MIN, None
        try:
            while not self._ends.is_set():
                count = 0 if begun is None else begun.file.readinto(piece)
                if begun is not None and count:
                    begun.digest.update(piece[:count])
                    begun.nbytes += count
                elif (following := self._open_next()) is not None:
                    begun = following
                else:
                    self._ends.wait(pause_s)
                    pause_s = min(2 * pause_s, PAUSE_S_MAX)
                    continue
                pause_s = PAUSE_S_MIN
        except OSError:
            return  # whoever takes the files hears of it

    def _open_next(self) -> _Begun | None:
        """The first of the files to come that is there: those before it are complete."""
        for index, name in enumerate(self._names):
            try:
                file = self._deposits.open(self._deposit, name)
            except NotFound:
                continue
            del self._names[: index + 1]
            self._begun[name] = begun = _Begun(file)
            return begun
        return None
