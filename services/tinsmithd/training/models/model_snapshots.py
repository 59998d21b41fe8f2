"""The snapshots of one model: which there are, and which files nobody needs any more.

Two are kept, and the journal behind the older one is dropped: one damaged snapshot costs time and
nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tinsmithd.errors import Reason, ResourceExhausted, TinsmithError
from tinsmithd.training.journal import AddSnapshot, Journal, StoredSnapshot, Trim, Write
from tinsmithd.training.models.snapshot_store import Snapshot, SnapshotDraft, SnapshotStore
from tinsmithd.training.models.staging import Staged


@dataclass(frozen=True)
class SnapshotRule:
    """When a snapshot is due: with the step after so many steps, or after so long."""

    steps: int
    interval_s: float


class ModelSnapshots:
    """The snapshots of one model.

    Args:
        model_id: Whose snapshots.
        journal: What makes a snapshot count.
        store: Where their files are; None where nothing is kept.
        found: Those that the journal has, the older one first.
        trimmed_to: Up to this position the journal may have dropped calls.
    """

    def __init__(
        self,
        model_id: str,
        journal: Journal,
        store: SnapshotStore | None,
        found: Sequence[StoredSnapshot] = (),
        trimmed_to: int = 0,
    ) -> None:
        self._model_id = model_id
        self._journal = journal
        self._store = store
        self._found = list(found)
        self._trimmed_to = trimmed_to
        self._garbage: list[str] = []

    @property
    def are_kept(self) -> bool:
        """Whether there is a store for them."""
        return self._store is not None

    @property
    def newest(self) -> StoredSnapshot | None:
        """The newest one, if there is any."""
        return self._found[-1] if self._found else None

    @property
    def newest_first(self) -> Sequence[StoredSnapshot]:
        """All of them."""
        return self._found[::-1]

    @property
    def trimmed(self) -> bool:
        """Whether the journal alone cannot bring the model back."""
        return bool(self._trimmed_to)

    @property
    def writes(self) -> Sequence[Write]:
        """What makes them count, for a model that is just being created."""
        return [AddSnapshot.of(self._model_id, snapshot) for snapshot in self._found]

    # --- files --------------------------------------------------------------------------------

    async def read(self, snapshot: StoredSnapshot) -> Snapshot:
        """Read one, whole, and verify it.

        Raises:
            StoreDamaged: It is gone, or not what was written.
        """
        assert self._store is not None
        return await self._store.read(snapshot.folder)

    def begin(self, position: int) -> SnapshotDraft:
        """Begin to write the state after the call at this position."""
        assert self._store is not None
        return self._store.begin(self._model_id, position)

    async def copy(
        self, position: int, staged: Staged, *, optimizer: bool, step_count: int
    ) -> StoredSnapshot | None:
        """Write the files of a checkpoint as a snapshot; None where nothing is kept.

        It does not count yet: `start_with` or `replace_with` comes next, or `remove`.

        Raises:
            ResourceExhausted: The disk is full (STORAGE_FULL).
        """
        if self._store is None:
            return None
        draft = self._store.begin(self._model_id, position)
        try:
            async for name, data in staged.pieces():
                await draft.write(name, data)
            folder = await draft.finish(optimizer=optimizer, step_count=step_count)
        except OSError as error:
            await draft.discard()
            message = f"a snapshot cannot be written: {error}"
            raise ResourceExhausted(message, Reason.STORAGE_FULL, retry_after_s=1.0) from error
        except TinsmithError:
            await draft.discard()
            raise
        return StoredSnapshot(position, step_count, folder)

    async def remove(self, snapshot: StoredSnapshot | None) -> None:
        """Remove the files of a snapshot that `copy` wrote and that does not count."""
        if snapshot is not None and self._store is not None:
            await self._store.remove(snapshot.folder)

    # --- which ones count ---------------------------------------------------------------------

    def start_with(self, snapshot: StoredSnapshot | None) -> None:
        """The model begins as this state; see `writes`."""
        self._found = [] if snapshot is None else [snapshot]

    def replace_with(self, snapshot: StoredSnapshot) -> Sequence[Write]:
        """The model continues as this state; returns the writes that make it so."""
        # The files of the others stay until these writes are durable: the journal refers to them.
        self._garbage += [old.folder for old in self._found]
        self._found, self._trimmed_to = [snapshot], snapshot.position
        return [
            AddSnapshot.of(self._model_id, snapshot),
            Trim(self._model_id, snapshot.position),
        ]

    async def add(self, draft: SnapshotDraft, position: int, step_count: int) -> None:
        """Make a snapshot count that was written; the journal drops what it makes needless.

        Raises:
            StoreDamaged: It is not what was written.
            OSError, TinsmithError, Fenced: It cannot be kept.
        """
        assert self._store is not None
        folder = ""
        try:
            folder = await draft.finish(optimizer=True, step_count=step_count)
            await self._store.verify(folder)
            snapshot = StoredSnapshot(position, step_count, folder)
            older = self._found[-1:]
            trim = [Trim(self._model_id, old.position) for old in older]
            await self._journal.commit(AddSnapshot.of(self._model_id, snapshot), *trim)
        except Exception:
            if folder:
                await self._store.remove(folder)
            raise
        self._garbage += [old.folder for old in self._found[:-1]]
        self._found = [*older, snapshot]
        if older:
            self._trimmed_to = older[0].position
        await self._remove_garbage()

    def strike_out(self, snapshot: StoredSnapshot) -> None:
        """One is damaged."""
        self._found.remove(snapshot)
        self._garbage.append(snapshot.folder)

    async def sweep(self) -> None:
        """Remove the files of snapshots to which the journal does not refer any more."""
        if self._garbage:
            await self._journal.flush()
            await self._remove_garbage()

    async def forget(self) -> None:
        """The model is deleted: remove all files."""
        self._garbage += [snapshot.folder for snapshot in self._found]
        await self._remove_garbage()

    async def _remove_garbage(self) -> None:
        if self._store is not None:
            garbage, self._garbage = self._garbage, []
            for folder in garbage:
                await self._store.remove(folder)
