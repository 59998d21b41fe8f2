"""The rules of the Checkpoint service: how store and catalogue move together.

Everything here blocks on disk; the servicer calls it from threads.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinsmithd.checkpoint.catalogue import Catalogue, Checkpoint
from tinsmithd.checkpoint.safety import check_file_name, check_files
from tinsmithd.checkpoint.store import Blob, Staging, Store
from tinsmithd.domain import CheckpointPath, Tuning
from tinsmithd.errors import DataLoss, InvalidArgument, NotFound, Reason

_log = logging.getLogger(__name__)


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


class Write:
    """One checkpoint on its way in; `commit` or `discard` ends it.

    Its calls may come from different threads, and `discard` while another is under way: then it
    waits for that, and whatever comes later fails.
    """

    def __init__(self, keeper: "Keeper", header: Header) -> None:
        self._keeper = keeper
        self._header = header
        self._lock = threading.Lock()
        self._staging: Staging | None = None
        self._ended = False

    def append(self, name: str, offset: int, data: bytes) -> None:
        """Add the next bytes of a file.

        Raises:
            InvalidArgument, ResourceExhausted: See `Staging.append` and `check_file_name`.
        """
        check_file_name(name, self._header.path.kind, self._header.tuning)
        with self._lock:
            self._staged().append(name, offset, data)

    def commit(self, promised: Sequence[Blob]) -> Checkpoint:
        """Make it durable and visible, if it is what was promised.

        Raises:
            DataLoss: The bytes that came are not those (CHECKPOINT_CORRUPT).
            InvalidArgument: The files are not what a checkpoint is.
            AlreadyExists: The name is taken (CHECKPOINT_EXISTS).
        """
        with self._lock:
            staging = self._staged()
            found = staging.finish()
            _check_promised(found, promised)
            check_files(staging, found, self._header.tuning)
            return self._keeper.publish(self._header, staging, found)

    def discard(self) -> None:
        """Leave nothing behind; harmless after a commit."""
        with self._lock:
            self._ended = True
            if self._staging is not None:
                self._staging.discard()

    def _staged(self) -> Staging:
        # Made with the first bytes, under the lock: nothing to leave behind before.
        if self._ended:
            raise RuntimeError("this write has ended")
        if self._staging is None:
            self._staging = self._keeper.stage()
        return self._staging


def _check_promised(found: Sequence[Blob], promised: Sequence[Blob]) -> None:
    ordered = sorted(promised, key=lambda blob: blob.name)
    if [(b.name, b.size_bytes) for b in found] != [(b.name, b.size_bytes) for b in ordered]:
        message = "names and sizes are not those of the files that arrived"
        raise InvalidArgument("commit.files", message, Reason.MALFORMED_STREAM)
    for ours, theirs in zip(found, ordered, strict=True):
        if ours.sha256 != theirs.sha256:
            message = f"{ours.name} does not have the digest that the commit names"
            raise DataLoss(message, Reason.CHECKPOINT_CORRUPT)


class Keeper:
    """The checkpoints of one folder.

    Raises:
        StoreBusy: Another server has the folder.
    """

    def __init__(
        self, folder: Path, *, checkpoint_bytes_max: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = Store(folder)
        self.catalogue = Catalogue(folder / "catalogue.sqlite", clock)
        self._bytes_max = checkpoint_bytes_max
        self._clock = clock
        # Held from a blob's arrival to its first reference, so that no sweep comes between.
        self._publishing = threading.Lock()

    def close(self) -> None:
        """Close everything."""
        self.catalogue.close()
        self._store.close()

    def begin(self, header: Header) -> Write:
        """Begin to write a checkpoint."""
        return Write(self, header)

    def stage(self) -> Staging:
        """Room for the files of one checkpoint."""
        return self._store.stage(self._bytes_max)

    def publish(self, header: Header, staging: Staging, files: Sequence[Blob]) -> Checkpoint:
        """Move staged files into place and make the checkpoint visible."""
        now_s = self._clock()
        checkpoint = Checkpoint(
            path=header.path,
            base_model=header.base_model,
            tuning=header.tuning,
            step_count=header.step_count,
            create_time_s=now_s,
            expire_time_s=None if header.ttl_seconds is None else now_s + header.ttl_seconds,
            user_metadata=header.user_metadata,
            public=False,
            files=files,
        )
        with self._publishing:
            self._store.publish(staging, files)
            return self.catalogue.add(checkpoint, overwrite=header.overwrite)

    def copy(
        self, source: CheckpointPath, destination: CheckpointPath, ttl_seconds: int | None
    ) -> Checkpoint:
        """Give a checkpoint's files another name."""
        if source.kind is not destination.kind:
            message = f"the original is of kind {source.kind}"
            raise InvalidArgument("destination_path", message, Reason.INVALID_NAME)
        now_s = self._clock()
        with self._publishing:
            copied = replace(
                self.catalogue.get(source),
                path=destination,
                create_time_s=now_s,
                expire_time_s=None if ttl_seconds is None else now_s + ttl_seconds,
                public=False,
            )
            return self.catalogue.add(copied, overwrite=False)

    def set_ttl(self, checkpoint: Checkpoint, ttl_seconds: int | None) -> Checkpoint:
        """`checkpoint` with so long to live from now on; None means for ever."""
        expire_time_s = None if ttl_seconds is None else self._clock() + ttl_seconds
        return replace(checkpoint, expire_time_s=expire_time_s)

    def open(
        self, path: CheckpointPath, names: Collection[str] = ()
    ) -> tuple[Checkpoint, list[tuple[Blob, Iterator[bytes]]]]:
        """A checkpoint and its files (or some), opened: a delete does not disturb the reading.

        Raises:
            NotFound: There is no such checkpoint, or no such file in it (CHECKPOINT_NOT_FOUND).
            DataLoss: A file cannot be opened (CHECKPOINT_CORRUPT); while reading: see `Store.read`.
        """
        with self._publishing:
            found = self.catalogue.get(path)
            present = {blob.name for blob in found.files}
            for name in names:
                if name not in present:
                    message = f"{path} has no file {name[:100]!r}"
                    raise NotFound(message, Reason.CHECKPOINT_NOT_FOUND)
            wanted = [blob for blob in found.files if not names or blob.name in names]
            return found, [(blob, self._store.read(blob)) for blob in wanted]

    def sweep(self) -> None:
        """Remove what expired and what nothing refers to any more."""
        expired = self.catalogue.delete_expired()
        with self._publishing:
            removed = self._store.sweep(self.catalogue.contents)
        if expired or removed:
            _log.info("removed %d expired checkpoints, %d unused blobs", expired, removed)
