"""A simulated disk with a journal on it.

What is written is safe from the death of a process and not from the loss of power; that comes with
the sync after it. A write holds the lock of the journal from its beginning to the end of its sync,
as SQLite's do.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from sim.loop import PROCESS
from sim.tables import Tables
from tinsmithd.training.call import StoredAnswer, Work
from tinsmithd.training.journal.records import (
    Contents,
    Fenced,
    ParkedCall,
    StoreDamaged,
    StoredCall,
    StoredStep,
    StoreUnwritable,
    Write,
)

if TYPE_CHECKING:
    from sim.snapshots import Folder
    from sim.world import World

Transaction = int | Sequence[Write]
"""A new epoch, or writes."""


class Unclaimable(StoreDamaged):
    """The store cannot be claimed, since nothing can be written."""


class SimDisk:
    """The disk of the machine that the Training server runs on.

    Attributes:
        tables: What is synced.
        pending: Transactions that are written and not synced.
        folders: Snapshots in their places.
        failure: Why nothing can be written now; "full", "broken", or empty.
        slow_s: How much longer than usual a sync takes.
        rotten: Folders that were damaged.
        lock: Held while a transaction is under way.
    """

    def __init__(self, world: "World") -> None:
        self.world = world
        self.rng = world.stream("disk")
        self.tables = Tables()
        self.pending: list[Transaction] = []
        self.folders: dict[str, Folder] = {}
        self.failure = ""
        self.slow_s = 0.0
        self.lock = asyncio.Lock()
        self.folder_count = 0
        self.rotten: set[str] = set()

    @property
    def epoch(self) -> int:
        """The newest that was claimed, whether it is synced or not."""
        claimed = [found for found in self.pending if isinstance(found, int)]
        return claimed[-1] if claimed else self.tables.epoch

    def write(self, transaction: Transaction) -> None:
        """Hand a transaction to the system."""
        self.pending.append(transaction)

    def sync(self) -> None:
        """Make all that is written durable."""
        for transaction in self.pending:
            if isinstance(transaction, int):
                self.tables.epoch = transaction
            else:
                self.tables.commit(transaction)
        self.pending.clear()

    def lose_power(self) -> None:
        """Of what is not synced, some of the first stays."""
        kept = self.rng.randint(0, len(self.pending))
        if self.pending:
            self.world.count("unsynced transactions lost", len(self.pending) - kept)
        del self.pending[kept:]
        self.sync()
        for name in [name for name, folder in self.folders.items() if not folder.synced]:
            if self.rng.random() < 0.5:
                del self.folders[name]

    async def pause(self) -> None:
        """A short access."""
        await asyncio.sleep(self.rng.uniform(0.0001, 0.002))

    async def pause_sync(self) -> None:
        """A sync."""
        await asyncio.sleep(self.rng.uniform(0.001, 0.006) + self.slow_s * self.rng.random())

    def do(self, work: Callable[[], Awaitable[Any]], busy: asyncio.Lock | None = None) -> Any:
        """Have the system do something for the process that asks; it goes with its process."""
        process = PROCESS.get()
        future = asyncio.get_running_loop().create_future()
        task = self.world.spawn(self._do(work, busy, future))
        if process is not None:
            self.world.own(process, task)
        return future

    async def _do(
        self,
        work: Callable[[], Awaitable[Any]],
        busy: asyncio.Lock | None,
        future: "asyncio.Future[Any]",
    ) -> None:
        try:
            if busy is None:
                result = await work()
            else:
                async with busy:
                    result = await work()
        except (Fenced, StoreUnwritable, StoreDamaged, OSError) as error:
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(result)


class SimStore:
    """See `JournalStore`: one process's connection to the journal of a disk."""

    def __init__(self, disk: SimDisk) -> None:
        self._disk = disk
        self._thread = asyncio.Lock()
        self._epoch = 0

    async def claim(self) -> Contents:
        """Take the store over and read it."""
        contents: Contents = await self._disk.do(self._claim, self._thread)
        return contents

    async def commit(self, writes: Sequence[Write]) -> None:
        """Write all of this or nothing."""
        await self._disk.do(lambda: self._commit(writes), self._thread)

    async def tidy(self) -> None:
        """Nothing is put off."""

    def nbytes(self) -> int:
        """It takes no room."""
        return 0

    async def calls(self, model_id: str, after: int) -> Sequence[StoredCall]:
        """The calls of a model after a position."""
        found: Sequence[StoredCall] = await self._read(
            lambda: self._disk.tables.stored_calls(model_id, after)
        )
        return found

    async def work(self, model_id: str, position: int) -> Work:
        """The payload of a call."""
        found: Work = await self._read(lambda: self._disk.tables.work(model_id, position))
        return found

    async def parked(self, model_id: str) -> Sequence[ParkedCall]:
        """The calls that wait for those before them."""
        found: Sequence[ParkedCall] = await self._read(lambda: self._disk.tables.parked(model_id))
        return found

    async def answer(self, model_id: str, position: int) -> StoredAnswer:
        """The answer of a call."""
        found: StoredAnswer = await self._read(lambda: self._disk.tables.answer(model_id, position))
        return found

    async def steps(
        self, model_id: str, below: int | None, size: int
    ) -> tuple[Sequence[StoredStep], int]:
        """A page of a model's steps."""
        found: tuple[Sequence[StoredStep], int] = await self._read(
            lambda: self._disk.tables.steps(model_id, below, size)
        )
        return found

    async def close(self) -> None:
        """Close it."""

    async def _read(self, read: Callable[[], Any]) -> Any:
        async def work() -> Any:
            await self._disk.pause()
            self._check_epoch()
            return read()

        return await self._disk.do(work, self._thread)

    def _check_epoch(self) -> None:
        if self._disk.epoch != self._epoch:
            raise Fenced

    async def _claim(self) -> Contents:
        disk = self._disk
        async with disk.lock:
            await disk.pause()
            if disk.failure:
                raise Unclaimable(f"the journal cannot be used: {disk.failure}")
            self._epoch = disk.epoch + 1
            disk.write(self._epoch)
            await disk.pause_sync()
            disk.sync()
        await disk.pause()
        disk.world.log("claim", self._epoch)
        models, deleted = disk.tables.stored_models(), disk.tables.deleted_models()
        starts, used_ids = dict(disk.tables.starts), disk.tables.stored_ids()
        return Contents("cluster", self._epoch, models, deleted, starts, used_ids)

    async def _commit(self, writes: Sequence[Write]) -> None:
        disk = self._disk
        async with disk.lock:
            await disk.pause()
            self._check_epoch()
            if disk.failure:
                disk.world.count("commits refused by the disk")
                raise StoreUnwritable(f"disk {disk.failure}", full=disk.failure == "full")
            disk.write(writes)
            disk.world.written(self._epoch, writes)
            await disk.pause_sync()
            disk.sync()
