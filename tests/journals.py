"""Journals for tests: on SQLite and on the simulated disk, and what to write into them."""

import asyncio
import contextlib
import random
import sqlite3
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from sim.disk import SimDisk, SimStore
from tinsmithd.training.call import (
    ComputeWork,
    StoredAnswer,
    Work,
    answer_digest,
    encode_answer,
    encode_work,
)
from tinsmithd.training.journal import SqliteStore
from tinsmithd.training.journal import records as j

DATUM_BYTES = 1900
"""Two payloads, or two answers, fill a page of the file: most flips of its bits hit something."""


class SqliteDisk:
    """A folder with a journal in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def store(self) -> SqliteStore:
        return SqliteStore(self.folder, sync=False)

    @contextlib.asynccontextmanager
    async def full(self, store: SqliteStore) -> AsyncIterator[None]:
        """There is no room meanwhile."""
        assert store._db is not None
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        (most,) = store._db.execute("PRAGMA max_page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count={pages}")
        yield
        store._db.execute(f"PRAGMA max_page_count={most}")

    def rows(self) -> int:
        """How much is kept of models."""
        with contextlib.closing(sqlite3.connect(self.folder / "journal.sqlite")) as db:
            tables = ("models", "calls", "payloads", "answers", "snapshots")
            counts = [db.execute(f"SELECT count(*) FROM {table}").fetchone() for table in tables]
        return sum(count for (count,) in counts)

    def tamper(self, statement: str) -> None:
        """Change the file behind the store's back."""
        with contextlib.closing(sqlite3.connect(self.folder / "journal.sqlite")) as db, db:
            assert db.execute(statement).rowcount > 0


class Sim:
    """As much of the simulator's world as its disk needs, on any event loop."""

    def __init__(self, folder: Path) -> None:
        world: Any = self
        self._disk = SimDisk(world)

    def store(self) -> SimStore:
        return SimStore(self._disk)

    @contextlib.asynccontextmanager
    async def full(self, store: SimStore) -> AsyncIterator[None]:
        self._disk.failure = "full"
        yield
        self._disk.failure = ""

    def rows(self) -> int:
        return len(self._disk.tables.models)

    def stream(self, name: str) -> random.Random:
        return random.Random(name)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        return asyncio.get_running_loop().create_task(work)

    def log(self, *event: object) -> None: ...

    def count(self, what: str, times: int = 1) -> None: ...

    def written(self, epoch: int, writes: object) -> None: ...


def work(position: int) -> Work:
    return ComputeWork(b"loss", [bytes([position]) * DATUM_BYTES], [position], True)


def answer(position: int) -> StoredAnswer:
    return StoredAnswer([bytes([100 + position]) * DATUM_BYTES], {"loss": position / 7})


def call(position: int, model_id: str = "a") -> j.AddCall:
    return j.AddCall(model_id, position, position + 10, b"%02d" % position * 16, work(position))


def record(position: int, model_id: str = "a", *, keep: bool = True) -> j.AddAnswer:
    return j.AddAnswer(model_id, position, answer(position), b"composition", keep)


def stored(position: int, **changes: Any) -> j.StoredCall:
    """What is to be found of a call with a kept answer."""
    values = {
        "position": position,
        "seq_id": position + 10,
        "digest": b"%02d" % position * 16,
        "payload_bytes": len(encode_work(work(position))),
        "attempts": 0,
        "answer_digest": answer_digest(answer(position)),
        "answer_bytes": len(encode_answer(answer(position))),
        "composition": b"composition",
    }
    return j.StoredCall(**{**values, **changes})


OPEN = {"answer_digest": None, "answer_bytes": 0, "composition": b""}
"""A call without answer."""
TRIMMED = {"payload_bytes": 0, "composition": b""}


async def begun(disk: Any, *writes: j.Write) -> j.JournalStore:
    """A store that was claimed, with the models `a` and `b`."""
    store: j.JournalStore = disk.store()
    await store.claim()
    await store.commit([j.AddModel("b", 2, {"r": 4}), j.AddModel("a", 1, {"base": "ü"}), *writes])
    return store


async def model(disk: Any, store: j.JournalStore, model_id: str = "a") -> j.StoredModel:
    """What the next process finds of a model."""
    await store.close()
    following = disk.store()
    contents = await following.claim()
    await following.close()
    (found,) = [found for found in contents.models if found.model_id == model_id]
    return found
