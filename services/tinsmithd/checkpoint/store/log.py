"""What several Checkpoint servers agree on: a log whose entries are decided once, and snapshots.

`tests/conformance/test_log.py` holds every implementer to it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Snapshot:
    """What all entries up to a position say together, in one object.

    Attributes:
        position: That of the last entry that is in it.
        log_bytes: Bytes of all entries up to there, those that are gone, too.
        size_bytes: Its own.
    """

    position: int
    log_bytes: int
    size_bytes: int = 0


class Log(Protocol):
    """Entries at positions 1, 2, ...; whoever is first at a position has it. Calls block.

    Attributes:
        identity: Tells this log from every other one.

    Besides what they say, calls raise Unavailable (CHECKPOINT_UNAVAILABLE) where the store does not
    answer: then an entry that was to be appended may be there or not.
    """

    @property
    def identity(self) -> str:
        """See the class."""
        ...

    def append(self, position: int, entry: bytes) -> bool:
        """Write the entry of a position, durably; False where there is one."""
        ...

    def read(self, position: int) -> bytes | None:
        """The entry of a position; None where there is none, or none any more."""
        ...

    def has(self, position: int) -> bool:
        """Whether there is an entry."""
        ...

    def first_after(self, position: int) -> int | None:
        """The first position after one at which there is an entry; None where there is none."""
        ...

    def newest_snapshot(self) -> Snapshot | None:
        """The snapshot of the highest position."""
        ...

    def read_snapshot(self, snapshot: Snapshot) -> Iterator[bytes]:
        """The bytes of a snapshot, in pieces of any length."""
        ...

    def write_snapshot(self, snapshot: Snapshot, pieces: Iterable[bytes]) -> None:
        """Write a snapshot, which is there whole or not at all."""

    def trim(self) -> int:
        """Remove entries and snapshots that an old snapshot stands for; returns how many.

        They stay for `KEPT_S` after it, so that whoever follows the log does not lose it.
        """
        ...
