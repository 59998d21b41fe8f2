"""One checkpoint on its way in: what it says of itself, and its files until they count."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from tinsmithd.checkpoint.catalogue import Checkpoint, Writer, digest_of
from tinsmithd.checkpoint.rules.safety import (
    check_file_name,
    check_files,
    check_length,
    followed_names,
)
from tinsmithd.checkpoint.store import Blob, Staging, storage_errors
from tinsmithd.domain import CheckpointPath, Tuning
from tinsmithd.errors import DataLoss, InvalidArgument, Reason

CHECK_BYTES = 32 * 1024 * 1024
"""Bytes that come in between two looks whether there is room for more."""
_FINISHING = 64
_beside = ThreadPoolExecutor(_FINISHING, thread_name_prefix="finish")
"""Writes that wait for the store while their files are looked at."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint that is being written says of itself."""

    path: CheckpointPath
    base_model: str
    tuning: Tuning
    step_count: int
    ttl_seconds: int | None
    overwrite: bool
    user_metadata: dict[str, str]
    writer: Writer | None = None
    """None where nobody else may write in its place."""
    ephemeral: bool = False
    request_id: str = ""
    """Tells a repeat of this request from another request; empty where none is a repeat."""
    lease_id: str = ""
    """The first lease on an ephemeral checkpoint."""
    deposit: str = ""
    """Where files lie that are not sent; empty where all are."""

    @property
    def durable(self) -> bool:
        """Whether it must survive a loss of power: what nobody named is gone with its holders."""
        return not self.ephemeral

    def digest(self, files: Sequence[Blob]) -> str:
        """Digest of the request, except for who makes it, how its files come, and who holds the
        checkpoint."""
        return digest_of(
            *(str(self.path), self.base_model, str(self.tuning), self.step_count),
            *(self.ttl_seconds, self.overwrite, self.ephemeral, sorted(self.user_metadata.items())),
            [[blob.name, blob.size_bytes, blob.sha256] for blob in files],
        )


class Write:
    """One checkpoint on its way in; `commit` or `discard` ends it.

    Its calls may come from different threads, and `discard` while another is under way: then it
    waits for that, and whatever comes later fails.

    Args:
        header: What it says of itself.
        stage: Makes room for its files.
        publish: Makes finished files a checkpoint that is visible.
        check_room: Refuses so many bytes as all files have, if that is too much.
    """

    def __init__(
        self,
        header: Header,
        stage: Callable[[], Staging],
        publish: Callable[[Header, Staging, Sequence[Blob]], Checkpoint],
        check_room: Callable[[int], None],
    ) -> None:
        self._check_room = check_room
        self._nbytes = 0
        self._checked_bytes = 0
        self._header = header
        self._stage = stage
        self._publish = publish
        self._lock = threading.Lock()
        self._staging: Staging | None = None
        self._sent: set[str] = set()
        self._taken: set[str] = set()
        self._ended = False

    def keeps(self, name: str, nbytes: int) -> bool:
        """Whether `append` of so many bytes waits for nothing."""
        with self._lock:
            is_looked_at = self._nbytes + nbytes - self._checked_bytes >= CHECK_BYTES
            return not is_looked_at and self._staged().keeps(name, nbytes)

    def append(self, name: str, offset: int, data: bytes) -> None:
        """Add the next bytes of a file.

        Raises:
            InvalidArgument, ResourceExhausted: See `Staging.append`, `check_file_name` and
                `check_length`.
        """
        check_file_name("piece.file_name", name, self._header.path.kind, self._header.tuning)
        check_length("piece.data", name, offset + len(data))
        with self._lock:
            self._comes(len(data))
            self._staged().append(name, offset, data)
            self._sent.add(name)

    def follow(self) -> None:
        """Begin to read what its writer leaves in the deposit, if there is one."""
        header = self._header
        if header.deposit:
            with self._lock:
                names = followed_names(header.path.kind, header.tuning)
                self._staged().follow(header.deposit, names)

    def take(self, promised: Sequence[Blob]) -> int:
        """Take the files that were not sent out of the deposit, if there is one.

        Args:
            promised: All files.

        Returns:
            The bytes that were taken.

        Raises:
            NotFound, InvalidArgument, ResourceExhausted, Unavailable: See `Staging.take`,
                `check_file_name` and `check_length`.
        """
        header, nbytes = self._header, 0
        with self._lock:
            for blob in promised if header.deposit else ():
                if blob.name not in self._sent | self._taken:
                    check_file_name("commit.files", blob.name, header.path.kind, header.tuning)
                    size = self._staged().take(header.deposit, blob.name)
                    check_length("commit.files", blob.name, size)
                    self._taken.add(blob.name)
                    nbytes += size
                    self._comes(size)
        return nbytes

    def commit(self, promised: Sequence[Blob]) -> Checkpoint:
        """Make the checkpoint visible, durably unless it is ephemeral, if its files are those that
        were promised.

        Raises:
            DataLoss: The bytes that came are not those (CHECKPOINT_CORRUPT).
            InvalidArgument: The files are not what a checkpoint is.
            AlreadyExists: The name is taken (CHECKPOINT_EXISTS).
            FailedPrecondition: The writer was replaced meanwhile (STALE_EPOCH).
            ResourceExhausted, Unavailable: The disk does not take it; what was there stays.
        """
        with self._lock:
            staging, header = self._staged(), self._header
            self._check_room(self._nbytes)
            staging.flush()
            finishing = _beside.submit(staging.finish, durable=header.durable)
            try:
                refusal = self._refusal(staging)
            finally:
                wait([finishing])
            found = finishing.result()
            # Damage on the way may make of a file what no file may be: that is no fault of it.
            self._check_promised(found, promised)
            if refusal is not None:
                raise refusal
            return self._publish(header, staging, found)

    def _comes(self, nbytes: int) -> None:
        """So many bytes come; looks now and then whether all of them find room."""
        self._nbytes += nbytes
        if self._nbytes - self._checked_bytes >= CHECK_BYTES:
            self._check_room(self._nbytes)
            self._checked_bytes = self._nbytes

    def _refusal(self, staging: Staging) -> InvalidArgument | None:
        """Why the files are not what a checkpoint is, if they are not."""
        header, names = self._header, self._sent | self._taken
        try:
            with storage_errors():
                check_files(staging, names, header.path.kind, header.tuning, header.step_count)
        except InvalidArgument as error:
            return error
        return None

    def _check_promised(self, found: Sequence[Blob], promised: Sequence[Blob]) -> None:
        ordered = sorted(promised, key=lambda blob: blob.name)
        if [(b.name, b.size_bytes) for b in found] != [(b.name, b.size_bytes) for b in ordered]:
            message = "names and sizes are not those of the files that arrived"
            raise InvalidArgument("commit.files", message, Reason.MALFORMED_STREAM)
        for ours, theirs in zip(found, ordered, strict=True):
            unsaid = not theirs.sha256 and ours.name in self._taken
            if not unsaid and ours.sha256 != theirs.sha256:
                message = f"{ours.name} does not have the digest that the commit names"
                raise DataLoss(message, Reason.CHECKPOINT_CORRUPT)

    @property
    def is_clean(self) -> bool:
        """Whether `discard` waits for nothing."""
        return self._staging is None or self._staging.is_clean

    def discard(self) -> None:
        """Leave nothing behind; harmless after a commit."""
        with self._lock:
            self._ended = True
            if self._staging is not None:
                self._staging.discard()

    def _staged(self) -> Staging:
        # The first bytes make it, under the lock: before them there is nothing to leave behind.
        if self._ended:
            raise RuntimeError("this write has ended")
        if self._staging is None:
            self._staging = self._stage()
        return self._staging
