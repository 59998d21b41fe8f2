"""What must not be lost, in order: models, their calls, answers, and snapshots.

`Journal` puts what is written at the same time into one commit, and says when it is durable.
`records` has what it writes; a `JournalStore` has the bytes.

A store belongs to the process that claimed it last. Each claim has a higher epoch, each commit
carries the epoch of its process, and the store refuses an earlier epoch: a process that was
stopped, replaced, and goes on cannot write.
"""

import asyncio
import errno
import logging
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from typing import ClassVar, TypeVar

from tinsmithd import failpoints, tracing
from tinsmithd.durations import Durations
from tinsmithd.errors import Reason, ResourceExhausted, TinsmithError, Unavailable
from tinsmithd.training.call import StoredAnswer, Work, last_before
from tinsmithd.training.journal.groups import Groups, Handed
from tinsmithd.training.journal.records import (
    AddStep,
    Contents,
    DeleteModel,
    Fenced,
    JournalStore,
    ParkedCall,
    StoredCall,
    StoredStep,
    StoreUnwritable,
    Write,
)

T = TypeVar("T")

CLOSE_POLL_S = 0.01
RETRY_S = 0.5
"""Between two tries to write what must be written, while the disk is full."""

_log = logging.getLogger(__name__)


class Journal:
    """Group commit over a store: what is handed in while one commit runs is in the next ones.

    Attributes:
        store: What it writes to.
        cluster_id: Names this store, for ever.
        epoch: That of this process.
        restored_at: Numbers of calls up to this one are of before the back-up that was restored; 0
            where none was.
        fenced: Set once another process has the store; this one cannot write any more.
        writable: False while writing fails; the journal tries again until it works.
        commits: How long the commits took.
    """

    keeps: ClassVar[bool] = True
    """Whether anybody can read again what was written."""

    def __init__(self, store: JournalStore) -> None:
        self.store = store
        self.cluster_id = ""
        self.epoch = self.restored_at = 0
        self.fenced = asyncio.Event()
        self.writable = True
        self.commits = Durations()
        self._waiting = Groups()
        self._under_way: Sequence[Handed] = ()
        self._wake = asyncio.Event()
        self._busy = False
        self._writer: asyncio.Task[None] | None = None
        self._retry: asyncio.TimerHandle | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on disk; another thread may ask."""
        return self.store.nbytes()

    async def open(self) -> Contents:
        """Claim the store; from now on `commit` works."""
        contents = await self.store.claim()
        self.cluster_id, self.epoch = contents.cluster_id, contents.epoch
        self.restored_at = last_before(contents.incarnation)
        self._writer = asyncio.create_task(self._write(), name="journal")
        return contents

    async def failed(self) -> None:
        """Wait until this process cannot write any more.

        Raises:
            Fenced: Another process has the store.
            Exception: Something unexpected.
        """
        assert self._writer is not None
        await asyncio.shield(self._writer)
        raise Fenced

    async def calls(self, model_id: str) -> Sequence[StoredCall]:
        """All calls of a model, see `JournalStore.calls`."""
        return await self._read(self.store.calls(model_id, 0))

    async def work(self, model_id: str, position: int) -> Work:
        """See `JournalStore.work`."""
        return await self._read(self.store.work(model_id, position))

    async def parked(self, model_id: str) -> Sequence[ParkedCall]:
        """See `JournalStore.parked`."""
        return await self._read(self.store.parked(model_id))

    async def answer(self, model_id: str, position: int) -> StoredAnswer:
        """See `JournalStore.answer`."""
        return await self._read(self.store.answer(model_id, position))

    async def steps(
        self, model_id: str, below: int | None, size: int
    ) -> tuple[Sequence[StoredStep], int]:
        """See `JournalStore.steps`."""
        return await self._read(self.store.steps(model_id, below, size))

    async def _read(self, reading: Awaitable[T]) -> T:
        try:
            return await reading
        except Fenced:
            self._wake.set()  # the writer finds out, too, and ends this process
            raise

    async def flush(self) -> None:
        """Wait until all earlier commits are durable.

        Raises:
            Fenced: Another process has the store.
        """
        earlier = [handed.settled for handed in (*self._under_way, *self._waiting)]
        if earlier:
            await asyncio.wait(earlier)
        if self.fenced.is_set():
            raise Fenced

    async def close(self) -> None:
        """Write what waits, as far as the disk takes it, and close the store."""
        while self.writable and not self.fenced.is_set() and (self._waiting or self._busy):
            await asyncio.sleep(CLOSE_POLL_S)
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        await self.store.close()

    def commit(self, *writes: Write, must: bool = False) -> "asyncio.Future[None]":
        """Make some writes, all of them or none; the future is done when they are durable.

        Args:
            writes: In order, of one model; they come after those of its owner's earlier commits.
            must: What they say has happened already: try until they succeed.

        Raises (the future):
            ResourceExhausted: There is no room (STORAGE_FULL); never with `must`.
            Unavailable: The disk cannot be written (STORAGE_FULL); never with `must`.
            Fenced: Another process has the store.
        """
        handed = Handed(writes, must)
        if self.fenced.is_set():
            handed.end(Fenced())
        else:
            self._waiting.add(handed)
            self._wake.set()
        return handed.done

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            group = self._under_way = self._waiting.take()
            self._busy = True
            begun_s, begun_ns = time.perf_counter(), tracing.now_ns()
            try:
                failpoints.hit("wal_append")
                await self.store.commit([write for handed in group for write in handed.writes])
            except Fenced:
                self._fence(group)
                return
            except StoreUnwritable as error:
                self._refuse(group, error)
                continue
            except OSError as error:
                self._refuse(group, StoreUnwritable(str(error), full=error.errno == errno.ENOSPC))
                continue
            finally:
                self._busy, self._under_way = False, ()
            self.commits.add(time.perf_counter() - begun_s)
            if not self.writable:
                _log.info("the journal can be written again")
            self.writable = True
            marks = [handed.mark for handed in group]
            tracing.batch("journal commit", "journal write", begun_ns, marks)
            for handed in group:
                handed.end()
            if self._waiting:
                self._wake.set()
            else:
                await self.store.tidy()

    def _fence(self, group: Sequence[Handed]) -> None:
        _log.error("another Training server has taken the journal over; this one must end")
        self.fenced.set()
        for handed in [*group, *self._waiting]:
            handed.end(Fenced())
        self._waiting.clear()

    def _refuse(self, group: Sequence[Handed], error: StoreUnwritable) -> None:
        if self.writable:
            _log.error("the journal cannot be written: %s", error)
        self.writable = False
        self._waiting.put_back(group)
        # All of them: what did not fit into this group would wait for the next try to hear it.
        for handed in self._waiting.keep_only(lambda handed: handed.must):
            handed.end(_refusal(error))
        # Try again even where nothing waits: somebody has to find out that it works again.
        if self._retry is not None:
            self._retry.cancel()
        self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._wake.set)


def _refusal(error: StoreUnwritable) -> TinsmithError:
    message = f"the call cannot be written: {error}"
    if error.full:
        return ResourceExhausted(message, Reason.STORAGE_FULL, retry_after_s=1.0)
    return Unavailable(message, Reason.STORAGE_UNAVAILABLE, retry_after_s=1.0)


class NoJournal(Journal):
    """Keeps nothing: models live as long as the processes that hold them."""

    keeps = False

    def __init__(self) -> None:
        """There is no store."""
        self.cluster_id, self.epoch, self.restored_at = "", 0, 0
        self.writable = True
        self.commits = Durations()
        self.fenced = asyncio.Event()
        self._steps: dict[str, deque[StoredStep]] = {}

    @property
    def nbytes(self) -> int:
        """None."""
        return 0

    async def open(self) -> Contents:
        """Nothing is there."""
        return Contents("", 0)

    def commit(self, *writes: Write, must: bool = False) -> "asyncio.Future[None]":
        """Done at once; of all writes only steps are remembered, in memory."""
        for write in writes:
            if isinstance(write, AddStep):
                new: deque[StoredStep] = deque(maxlen=write.kept_max)
                self._steps.setdefault(write.model_id, new).append(write.step)
            elif isinstance(write, DeleteModel):
                self._steps.pop(write.model_id, None)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    async def steps(
        self, model_id: str, below: int | None, size: int
    ) -> tuple[Sequence[StoredStep], int]:
        """Those of this process."""
        every = self._steps.get(model_id, ())
        found = [step for step in reversed(every) if below is None or step.position < below]
        return found[:size], len(every)

    async def failed(self) -> None:
        """Never."""
        await asyncio.Event().wait()

    async def flush(self) -> None:
        """Nothing waits."""

    async def close(self) -> None:
        """Nothing to close."""
