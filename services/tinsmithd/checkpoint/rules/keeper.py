"""The rules of the Checkpoint service: how store and catalogue move together.

Everything here blocks on disk; the servicer calls it from threads.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from tinsmithd import failpoints
from tinsmithd.checkpoint.catalogue import (
    Catalogue,
    Checkpoint,
    Ephemeral,
    Writer,
    check_repeat,
    check_stored,
    digest_of,
)
from tinsmithd.checkpoint.rules.clocks import Clocks
from tinsmithd.checkpoint.rules.collector import Collector
from tinsmithd.checkpoint.rules.leases import Leases
from tinsmithd.checkpoint.rules.write import Header, Write
from tinsmithd.checkpoint.store import Blob, Staging, Store, storage_errors
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    ResourceExhausted,
    TinsmithError,
    Unavailable,
)

EXPIRY_GRACE_S = 600.0
"""How long sweeps must have seen a checkpoint expired before they remove its bytes."""
EXPIRED_AT_ONCE = 20
"""Checkpoints that one transaction removes: nobody waits longer for it than some milliseconds."""

_log = logging.getLogger(__name__)


class Keeper:
    """The checkpoints of one folder.

    EXPIRY. The wall clock decides: from its time on an expired checkpoint is not found. Its bytes
    go only when sweeps saw it expired for `EXPIRY_GRACE_S` on end, by the clock that nobody sets.
    So a wall clock that is wrong for a shorter time costs nothing, one that stays ahead costs at
    most as much of a lifetime as it jumped, and one that jumps back only makes checkpoints live
    longer.

    Args:
        store: Where bytes are; closed with the keeper.
        catalogue: What exists; closed with the keeper.
        checkpoint_bytes_max: Maximum number of bytes in the files of one checkpoint.
        lease_s: How long a lease lasts, seconds.
        clocks: The time of day, and one that nobody sets.
    """

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        *,
        checkpoint_bytes_max: int,
        lease_s: float,
        clocks: Clocks,
    ) -> None:
        self._store = store
        self.catalogue = catalogue
        self.shared = store.shared
        self.leases = Leases(catalogue, lease_s, clocks, shared=store.shared)
        self._bytes_max = checkpoint_bytes_max
        self._clocks = clocks
        self._expired_since: dict[int, float] = {}
        # Held from a blob's arrival to its first reference, so that no sweep comes between.
        self._publishing = _lock(store)
        # Held from a lookup until the blobs are open, so that no sweep comes between.
        self._opening = _lock(store)
        self._collector = Collector(store, catalogue, self._publishing, self._opening)

    def close(self) -> None:
        """Close everything once no blob is being moved: the next server may come at once."""
        self._collector.close()
        with self._publishing:
            self.catalogue.close()
            self._store.close()

    def begin(self, header: Header, stored_max: int = 0) -> Write:
        """Begin to write a checkpoint.

        Args:
            header: What it says of itself.
            stored_max: Bytes that its owner may have stored; 0: any number.

        Raises:
            FailedPrecondition: The writer was replaced (STALE_EPOCH).
            InvalidArgument: Its epoch jumps (LIMIT_EXCEEDED).
            ResourceExhausted: Its owner has stored all that he may (QUOTA_EXCEEDED).
        """
        if header.writer is None:
            self.catalogue.refresh()  # a store that is away is said before any byte is taken
        else:
            self.catalogue.admit(header.writer)

        is_there = stored_max and self._is_repeat(header)

        def check(nbytes: int) -> None:
            if not is_there:
                self._check_stored(header.path.owner, nbytes, stored_max)

        check(1)

        def publish(header: Header, staging: Staging, files: Sequence[Blob]) -> Checkpoint:
            return self._publish(header, staging, files, stored_max)

        return Write(header, lambda: self._store.stage(self._bytes_max), publish, check)

    def _is_repeat(self, header: Header) -> bool:
        """Whether a checkpoint is there that a request with this id made."""
        if not header.request_id or header.overwrite:
            return False
        try:
            found = self.catalogue.find(header.path, fresh=False)
        except DataLoss:
            return False
        return found is not None and found.request_id == header.request_id

    def _check_stored(self, owner: str, nbytes: int, stored_max: int) -> None:
        """Refuse so many bytes more than an owner may have stored."""
        if stored_max:
            check_stored(self.catalogue.stored_bytes(owner) + nbytes, stored_max)

    def _publish(
        self, header: Header, staging: Staging, files: Sequence[Blob], stored_max: int
    ) -> Checkpoint:
        now_s = self._clocks.wall()
        checkpoint = Checkpoint(
            path=header.path,
            base_model=header.base_model,
            tuning=header.tuning,
            step_count=header.step_count,
            create_time_s=now_s,
            expire_time_s=None if header.ttl_seconds is None else now_s + header.ttl_seconds,
            user_metadata=header.user_metadata,
            files=files,
            request_id=header.request_id,
            request_digest=header.digest(files),
            ephemeral=_ephemeral(header),
        )
        with self._publishing:
            try:
                with storage_errors():
                    staging.publish(durable=header.durable)
                    failpoints.hit("ckpt_post_rename")
                    added = self.catalogue.add(
                        checkpoint,
                        overwrite=header.overwrite,
                        writer=header.writer,
                        stored_max=stored_max,
                    )
                if [blob.place for blob in added.files] != [blob.place for blob in files]:
                    staging.refused()  # it was there, by the same request
                self.leases.grant(added, header.lease_id)
            except Exception as error:
                if isinstance(error, AlreadyExists | FailedPrecondition) or _is_quota(error):
                    staging.refused()
                if not self.shared:
                    self._collector.suspect(files)
                if isinstance(error, ResourceExhausted | Unavailable):
                    self._give_room_back()
                raise
        failpoints.hit("ckpt_post_commit")
        return added

    def _give_room_back(self) -> None:
        # A full disk must not stay full until the next sweep with what was refused.
        try:
            self._remove_unused(waits=True)
        except (OSError, TinsmithError) as error:
            _log.warning("files of a refused write stay until the next sweep: %s", error)

    def copy(
        self,
        source: CheckpointPath,
        destination: CheckpointPath,
        ttl_seconds: int | None,
        request_id: str = "",
        stored_max: int = 0,
    ) -> Checkpoint:
        """Give a checkpoint's files another name; see `begin` for `stored_max`."""
        if source.kind is not destination.kind:
            message = f"the original is of kind {source.kind}"
            raise InvalidArgument("destination_checkpoint_path", message, Reason.INVALID_NAME)
        now_s = self._clocks.wall()
        digest = digest_of(str(source), str(destination), ttl_seconds)
        with self._publishing:
            if request_id and (found := self.catalogue.find(destination)) is not None:
                check_repeat(found, request_id, digest)  # whatever became of the original
                return found
            original = self.catalogue.get(source)
            self._check_stored(destination.owner, original.size_bytes, stored_max)
            self._make_durable(original)
            copied = replace(
                original,
                path=destination,
                create_time_s=now_s,
                expire_time_s=None if ttl_seconds is None else now_s + ttl_seconds,
                request_id=request_id,
                request_digest=digest,
                ephemeral=None,
            )
            return self.catalogue.add(copied, overwrite=False, stored_max=stored_max)

    def set_ttl(self, checkpoint: Checkpoint, ttl_seconds: int | None) -> Checkpoint:
        """Make a checkpoint ordinary and let it live this long from now on.

        Args:
            checkpoint: As it is.
            ttl_seconds: None means for ever.
        """
        expire_time_s = None if ttl_seconds is None else self._clocks.wall() + ttl_seconds
        return replace(checkpoint, expire_time_s=expire_time_s, ephemeral=None)

    def update(
        self, path: CheckpointPath, change: Callable[[Checkpoint], Checkpoint]
    ) -> Checkpoint:
        """Change a checkpoint, see `Catalogue.update`."""
        self._use(path)

        def change_durably(checkpoint: Checkpoint) -> Checkpoint:
            changed = change(checkpoint)
            if changed.ephemeral is None:
                self._make_durable(checkpoint)
            return changed

        changed = self.catalogue.update(path, change_durably)
        if changed.ephemeral is None:
            self.leases.grant(changed)
        return changed

    def _make_durable(self, checkpoint: Checkpoint) -> None:
        """Sync the files of an ephemeral checkpoint, which an ordinary one is to share."""
        if checkpoint.ephemeral is not None:
            self._store.sync(checkpoint.files)

    def get(self, path: CheckpointPath, lease_id: str = "") -> Checkpoint:
        """Look up one checkpoint, which counts as a use of it; see `Catalogue.get`."""
        self._use(path, lease_id)
        return self.catalogue.get(path, fresh=False)

    def _use(self, path: CheckpointPath, lease_id: str = "") -> None:
        """Renew the lease of who uses a checkpoint, so that no server removes it."""
        self.catalogue.refresh()
        self.leases.renew(path, lease_id)
        self.leases.tell()

    def renew(self, leases: Iterable[tuple[CheckpointPath, str]]) -> Sequence[CheckpointPath]:
        """Renew leases, each a path and an id; returns those paths with nothing there.

        Raises:
            Unavailable: The catalogue cannot be read.
        """
        self.catalogue.refresh()
        unknown = [path for path, lease_id in leases if not self.leases.renew(path, lease_id)]
        self.leases.tell()
        missing = []
        for path in unknown:
            try:
                self.catalogue.get(path, fresh=False)
            except NotFound:
                missing.append(path)
            except DataLoss:
                continue  # there is something, and whoever reads it hears more
        return missing

    def release(self, model_ids: Collection[str], writer: Writer | None) -> Sequence[str]:
        """Note that models are gone; returns the writer's others with ephemeral checkpoints.

        Raises:
            FailedPrecondition: The writer was replaced, and what it knows is old (STALE_EPOCH).
        """
        if writer is not None:
            self.catalogue.admit(writer)
        self.leases.release(model_ids)
        return [] if writer is None else self.leases.kept_models(writer.name)

    def reclaim(self) -> None:
        """Remove ephemeral checkpoints that nobody needs, and their bytes.

        Raises:
            DataLoss, ResourceExhausted, Unavailable, OSError: As `sweep`.
        """
        if removed := self.leases.reclaim():
            if not self.shared:
                with self._publishing:
                    self._remove_unused()
            _log.debug("reclaimed %d ephemeral checkpoints", removed)

    def open(
        self,
        path: CheckpointPath,
        choose: Callable[[Checkpoint], Collection[str]] = lambda found: (),
        lease_id: str = "",
    ) -> tuple[Checkpoint, list[tuple[Blob, Iterator[bytes]]]]:
        """Open a checkpoint's files: deleting it afterwards does not disturb the reading.

        Args:
            path: Which one.
            choose: Names the files that are wanted; no name means all.
            lease_id: Whose lease this renews.

        Raises:
            NotFound: There is no such checkpoint, or no such file in it (CHECKPOINT_NOT_FOUND).
            DataLoss: It is damaged (CHECKPOINT_CORRUPT); while reading: see `Store.read`.
            Unavailable: It cannot be read now (CHECKPOINT_UNAVAILABLE).
        """
        with self._opening:
            found = self.get(path, lease_id)
            names = choose(found)
            present = {blob.name for blob in found.files}
            for name in names:
                if name not in present:
                    message = f"{path} has no file {name[:100]!r}"
                    raise NotFound(message, Reason.CHECKPOINT_NOT_FOUND)
            wanted = [blob for blob in found.files if not names or blob.name in names]
            return found, [(blob, self._store.read(blob)) for blob in wanted]

    def urls(self, checkpoint: Checkpoint, seconds: float) -> Sequence[str]:
        """Where anybody can read each file of a checkpoint for a while; empty: nowhere.

        Raises:
            Unavailable: The store cannot say (CHECKPOINT_UNAVAILABLE).
        """
        return [self._store.url(blob, seconds) for blob in checkpoint.files]

    def sweep(self) -> None:
        """Remove what expired and what nothing refers to any more.

        Raises:
            DataLoss: The catalogue is damaged: nothing is removed on its word.
            ResourceExhausted, Unavailable, OSError: The disk fails.
        """
        now_s = self._clocks.monotonic()
        expired = self.catalogue.expired()
        self._expired_since = {n: self._expired_since.get(n, now_s) for n in expired}
        due = [n for n, since_s in self._expired_since.items() if now_s - since_s >= EXPIRY_GRACE_S]
        removed = sum(
            self.catalogue.delete_expired(due[start : start + EXPIRED_AT_ONCE])
            for start in range(0, len(due), EXPIRED_AT_ONCE)
        )
        self.leases.forget_deleted()
        self._store.forget_deposits()
        self.catalogue.tidy()
        blobs = self._remove_unused()
        if removed or blobs:
            _log.info("removed %d expired checkpoints, %d unused blobs", removed, blobs)

    def _remove_unused(self, *, waits: bool = False) -> int:
        """Remove blobs that nothing refers to; where somebody `waits`, only if that is quick."""
        if self.shared:
            # Such a store finds by itself what may go.
            return 0 if waits else self._store.sweep(self.catalogue.unused)
        return 0 if waits and not self._collector.quick else self._collector.collect()

    def probe(self) -> None:
        """Do nothing, as long as an intact checkpoint could be read.

        Raises:
            DataLoss, Unavailable: It could not.
        """
        self.catalogue.probe()
        self._store.probe()


def _is_quota(error: Exception) -> bool:
    return isinstance(error, ResourceExhausted) and error.reason is Reason.QUOTA_EXCEEDED


def _lock(store: Store) -> contextlib.AbstractContextManager[object]:
    """A lock against sweeps; where several servers sweep none helps, and a grace does."""
    return contextlib.nullcontext() if store.shared else threading.RLock()


def _ephemeral(header: Header) -> Ephemeral | None:
    writer = "" if header.writer is None else header.writer.name
    return Ephemeral(header.ttl_seconds, writer) if header.ephemeral else None
