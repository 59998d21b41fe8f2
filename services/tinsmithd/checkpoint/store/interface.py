"""Where the bytes of checkpoints are, whatever keeps them: a protocol and its words.

`tests/conformance/test_store.py` holds every implementer to it. A store names blobs by
their content, so copies of a checkpoint share them, and names that tenants choose never become
paths. A blob is whole or absent. What `Staging.publish` returned for is durable, unless it was told
that this does not matter: then a loss of power, and nothing else, may take or damage it.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol


class StoreBusy(Exception):
    """Another server has the store."""


@dataclass(frozen=True)
class Blob:
    """One file of a checkpoint: its name there, length in bytes, and SHA-256 in hex."""

    name: str
    size_bytes: int
    sha256: str


class Staging(Protocol):
    """Files on their way in: `append` their bytes, `finish`, `publish`; or `discard` them.

    Besides what they say, calls raise ResourceExhausted (STORAGE_FULL) and Unavailable
    (CHECKPOINT_UNAVAILABLE) where the store does not take it.
    """

    def append(self, name: str, offset: int, data: bytes) -> None:
        """Add the next bytes of a file; files come one after the other.

        Raises:
            InvalidArgument: They are not the next bytes (MALFORMED_STREAM).
            InvalidArgument: They are too many (LIMIT_EXCEEDED).
        """

    def take(self, deposit: str, name: str) -> int:
        """Take a file that a writer on this machine left in a deposit; returns its bytes.

        Raises:
            NotFound: It is not there (DEPOSIT_NOT_FOUND).
            InvalidArgument: They are too many (LIMIT_EXCEEDED).
        """
        ...

    def flush(self) -> None:
        """Let `open` read all that came; nothing comes any more."""

    def finish(self, *, durable: bool = True) -> list[Blob]:
        """End what came, durably or not; returns it, sorted by name."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Read a file that is flushed or finished, seekable, before it is published."""
        ...

    def publish(self, *, durable: bool = True) -> None:
        """Move finished files to their places, durably or not; a content that is there stays.

        Where it raises, some of them may be in their places.
        """

    def discard(self) -> None:
        """Forget what was not published."""


class Store(Protocol):
    """All blobs; one process at a time may have them. Calls may come from any thread."""

    @property
    def empty(self) -> bool:
        """True where there is no blob."""
        ...

    def close(self) -> None:
        """Let another server have the store."""

    def stage(self, bytes_max: int) -> Staging:
        """Begin to write at most `bytes_max` bytes."""
        ...

    def read(self, blob: Blob) -> Iterator[bytes]:
        """The bytes of a blob, which stays readable from this call on, whatever is deleted.

        Only a normal end means that they were what was written.

        Raises:
            DataLoss: It is gone, or not what was written (CHECKPOINT_CORRUPT).
            Unavailable: It cannot be opened now (CHECKPOINT_UNAVAILABLE).
        """
        ...

    def sync(self, blobs: Collection[Blob]) -> None:
        """Make blobs durable that may not be.

        Raises:
            DataLoss, Unavailable, ResourceExhausted: They cannot be.
        """

    def forget_deposits(self) -> None:
        """Remove the deposits whose writers are gone."""

    def probe(self) -> None:
        """Do nothing, as long as blobs can be found.

        Raises:
            Unavailable: They cannot (CHECKPOINT_UNAVAILABLE).
        """

    def sweep(self, kept: Collection[str]) -> int:
        """Remove blobs of other contents than these, given by SHA-256; returns how many.

        Nothing may be published, and no name looked up for reading, from before `kept` was made
        until the end: the caller sees to that. Readers that have a blob open keep it.
        """
        ...
