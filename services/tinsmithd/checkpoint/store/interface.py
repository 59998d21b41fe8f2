"""Where the bytes of checkpoints are, whatever keeps them: a protocol and its words.

`tests/conformance/test_store.py` holds every implementer to it. Copies of a checkpoint share blobs,
and names that tenants choose never become paths. A blob is whole or absent. What `Staging.publish`
returned for is durable, unless it was told that this does not matter: then a loss of power, and
nothing else, may take or damage it.
"""

import contextlib
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

Guard = Callable[[], contextlib.AbstractContextManager[object]]
"""Makes what keeps others out."""
Unused = Callable[[Sequence[str]], Collection[str]]
"""Says which of some places of blobs no checkpoint refers to."""


class StoreBusy(Exception):
    """Another server has the store."""


class StoreUnusable(Exception):
    """The store cannot be used as it is set; the message says what to do."""


@dataclass(frozen=True)
class Blob:
    """One file of a checkpoint: its name there, length in bytes, and SHA-256 in hex.

    Attributes:
        key: Where it is in a store that does not find it by its content; empty elsewhere.
    """

    name: str
    size_bytes: int
    sha256: str
    key: str = field(default="", compare=False)

    @property
    def place(self) -> str:
        """What its store knows it by."""
        return self.key or self.sha256


class Staging(Protocol):
    """Files on their way in: `append` their bytes, `finish`, `publish`; or `discard` them.

    Besides what they say, calls raise ResourceExhausted (STORAGE_FULL) and Unavailable
    (CHECKPOINT_UNAVAILABLE) where the store does not take it.
    """

    @property
    def is_clean(self) -> bool:
        """Whether `discard` has nothing to remove, and waits for nothing."""
        ...

    def keeps(self, name: str, nbytes: int) -> bool:
        """Whether `append` of so many bytes waits for nothing."""
        ...

    def append(self, name: str, offset: int, data: bytes) -> None:
        """Add the next bytes of a file; files come one after the other.

        Raises:
            InvalidArgument: They are not the next bytes (MALFORMED_STREAM).
            InvalidArgument: They are too many (LIMIT_EXCEEDED).
        """

    def follow(self, deposit: str, names: Sequence[str]) -> None:
        """Begin to read the files of a deposit that are being written, if that saves time later.

        Args:
            deposit: Which one; it need not be there.
            names: Of the files that are worth it, in the order in which they are written.
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

    def open(self, name: str) -> io.BufferedIOBase:
        """Read a file that is flushed or finished, seekable, before it is published."""
        ...

    def publish(self, *, durable: bool = True) -> None:
        """Move finished files to their places, durably or not; a content that is there stays.

        Where it raises, some of them may be in their places.
        """

    def refused(self) -> None:
        """Say of what was published that nothing will ever refer to it: `discard` forgets it."""

    def discard(self) -> None:
        """Forget what was not published."""


class Store(Protocol):
    """All blobs. Calls may come from any thread.

    Attributes:
        shared: Whether several processes may have it at a time. Then a blob that no checkpoint
            refers to stays for a while: its writer may be about to commit, and whoever reads it
            goes on.
    """

    @property
    def shared(self) -> bool:
        """See the class."""
        ...

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

        Only a normal end means that they were what was written. What is wrong with a blob is said
        by this call or by the iterator.

        Raises:
            DataLoss: It is gone, or not what was written (CHECKPOINT_CORRUPT).
            Unavailable: It cannot be opened now (CHECKPOINT_UNAVAILABLE).
        """
        ...

    def url(self, blob: Blob, seconds: float) -> str:
        """Where anybody can read a blob for a while; empty where there is no such place."""
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

    def sweep(
        self, unused: Unused, of: Collection[str] | None = None, guard: Guard = nullcontext
    ) -> int:
        """Remove blobs that no checkpoint refers to; returns how many.

        Args:
            unused: Says which are.
            of: Only some of these places; None means all that there are.
            guard: Held while `unused` is asked and what it says is removed, which are some
                thousands at most: while it is, nothing may be published, and no name looked up for
                reading.

        Where the store is shared only what was unused for a while is removed, whatever it is of.
        """
        ...
