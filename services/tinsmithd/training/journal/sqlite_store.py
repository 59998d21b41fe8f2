"""The journal's bytes in one SQLite file: WAL, one commit for each batch.

    <folder>/journal.sqlite

With `synchronous=FULL` a commit survives the loss of power, with NORMAL the death of any process.
Each row has a CRC-32 over its values and its key (`seal`), which every read checks; what SQLite
itself finds damaged is damage, too.
"""

import contextlib
import json
import logging
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tinsmithd import failpoints, formats
from tinsmithd.files import private_folder
from tinsmithd.owners import logged_id
from tinsmithd.training.call import StoredAnswer, Work, decode_answer, decode_work
from tinsmithd.training.journal.groups import nbytes_of
from tinsmithd.training.journal.own_thread import OwnThread
from tinsmithd.training.journal.records import (
    Contents,
    Fenced,
    ParkedCall,
    StoreDamaged,
    StoredCall,
    StoredModel,
    StoredSnapshot,
    StoredStep,
    StoreUnwritable,
    Write,
)
from tinsmithd.training.journal.sqlite_format import JOURNAL
from tinsmithd.training.journal.sqlite_known import Known
from tinsmithd.training.journal.sqlite_reading import (
    deleted,
    good,
    newest_calls,
    starts,
    used_ids,
)
from tinsmithd.training.journal.sqlite_rows import write_all
from tinsmithd.training.journal.sqlite_tables import (
    CALL,
    CALL_SEAL,
    MODEL,
    PARKED,
    SCHEMA,
    SNAPSHOT,
    SNAPSHOT_SEAL,
    STEP,
    STEP_SEAL,
    seal,
)

T = TypeVar("T")

_log = logging.getLogger(__name__)

JOURNAL_FILE = "journal.sqlite"
"""Name of the file in a Training server's data folder."""
BUSY_TIMEOUT_S = 10.0
LOG_BYTES = 4 * 1024 * 1024
"""The store copies the write-ahead log into the file when it is about so long and nobody waits: a
commit that did so would take several times as long as another."""
LOG_PAGES_MAX = 16_384
"""A commit copies it all the same when it has so many pages."""
COMMIT_BYTES = 16 * 1024
"""About what a commit adds to it besides data."""
STATEMENTS_CACHED = 256
"""More than there are texts of statements."""
_UNWRITABLE = {
    sqlite3.SQLITE_FULL: True,
    sqlite3.SQLITE_IOERR: False,
    sqlite3.SQLITE_READONLY: False,
    sqlite3.SQLITE_CANTOPEN: False,
    sqlite3.SQLITE_BUSY: False,
    sqlite3.SQLITE_PERM: False,
}
"""Primary result codes after which a later try may work, and whether room is what is missing."""


class SqliteStore:
    """See `JournalStore`.

    Args:
        folder: Has the file; made when absent.
        sync: Whether a commit survives the loss of power.
    """

    def __init__(self, folder: Path, *, sync: bool) -> None:
        self._folder = folder
        self._sync = sync
        self._thread = OwnThread("journal")
        self._db: sqlite3.Connection | None = None
        self._epoch = 0
        self._log_bytes = 0
        self._known: Known | None = None

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await self._thread.run(function)

    async def claim(self) -> Contents:
        """Take the store over and read it."""
        return await self._in_thread(self._claim)

    async def commit(self, writes: Sequence[Write]) -> None:
        """Write all of this or nothing."""
        await self._in_thread(lambda: self._commit(writes))

    async def tidy(self) -> None:
        """Copy the write-ahead log into the file, once it is long."""
        if self._log_bytes > LOG_BYTES:
            await self._in_thread(self._checkpoint)

    def nbytes(self) -> int:
        """Bytes of the file and of its write-ahead log."""
        found = 0
        for end in ("", "-wal"):
            with contextlib.suppress(OSError):
                found += (self._folder / f"{JOURNAL_FILE}{end}").stat().st_size
        return found

    async def calls(self, model_id: str, after: int) -> Sequence[StoredCall]:
        """The calls of a model after a position."""
        return await self._in_thread(lambda: self._calls(model_id, after))

    async def work(self, model_id: str, position: int) -> Work:
        """The payload of a call."""
        return decode_work(
            await self._in_thread(lambda: self._blob("payloads", model_id, position))
        )

    async def parked(self, model_id: str) -> Sequence[ParkedCall]:
        """The calls that wait for numbers before their own."""
        rows = await self._in_thread(lambda: self._parked(model_id))
        return [ParkedCall(seq_id, digest, decode_work(data)) for seq_id, digest, data in rows]

    async def answer(self, model_id: str, position: int) -> StoredAnswer:
        """The answer of a call."""
        data = await self._in_thread(lambda: self._blob("answers", model_id, position))
        return decode_answer(data)

    async def steps(
        self, model_id: str, below: int | None, size: int
    ) -> tuple[Sequence[StoredStep], int]:
        """A page of a model's steps, newest first, and how many there are in all."""
        return await self._in_thread(lambda: self._steps(model_id, below, size))

    async def close(self) -> None:
        """Close it."""
        if self._db is not None:
            await self._in_thread(self._db.close)
        self._thread.close()

    # --- in the thread ------------------------------------------------------------------------

    def _claim(self) -> Contents:
        try:
            private_folder(self._folder)
            file = self._folder / JOURNAL_FILE
            db = sqlite3.connect(
                file,
                isolation_level=None,
                timeout=BUSY_TIMEOUT_S,
                check_same_thread=False,
                cached_statements=STATEMENTS_CACHED,
            )
            self._db = db
            db.create_function("seal", -1, seal, deterministic=True)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(f"PRAGMA synchronous={'FULL' if self._sync else 'NORMAL'}")
            # Some builds of SQLite overwrite deleted rows with zeros: that would write all payloads
            # once more, to drop them.
            db.execute("PRAGMA secure_delete=FAST")
            db.execute("PRAGMA foreign_keys=ON")
            db.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES_MAX}")
            JOURNAL.look(db, file)
            # A server that had an older format finds the new one together with the higher epoch.
            with _transaction(db):
                JOURNAL.bring_up(db)
                for statement in filter(str.strip, SCHEMA.split(";")):
                    db.execute(statement)
                self._epoch = self._claim_epoch(db)
            meta = dict(db.execute("SELECT name, value FROM meta"))
            return Contents(
                *(meta["cluster_id"], self._epoch, self._models(db), deleted(db), starts(db)),
                used_ids=used_ids(db),
                incarnation=meta.get("incarnation", 0),
            )
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            raise StoreDamaged(f"the journal in {self._folder} cannot be used: {error}") from error

    def _claim_epoch(self, db: sqlite3.Connection) -> int:
        meta = dict(db.execute("SELECT name, value FROM meta"))
        epoch = int(meta.get("epoch", 0)) + 1
        values = {
            "format_version": JOURNAL.known,
            "release": formats.release(),
            "epoch": epoch,
            "cluster_id": meta.get("cluster_id", secrets.token_hex(16)),
        }
        db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())
        return epoch

    def _models(self, db: sqlite3.Connection) -> list[StoredModel]:
        found = []
        times = dict(db.execute("SELECT model_id, time_s FROM requests"))
        parked: dict[str, list[int]] = {}
        for model_id, seq_id in db.execute("SELECT model_id, seq_id FROM parked ORDER BY seq_id"):
            parked.setdefault(model_id, []).append(seq_id)
        for row in db.execute(
            f"SELECT {MODEL}, crc32 IS seal({MODEL}) FROM models ORDER BY number"
        ):
            model_id, number, about, lost, trimmed_to, whole = row
            if not whole:
                raise StoreDamaged(f"model {logged_id(model_id)} is damaged in the journal")
            calls: list[StoredCall] = []
            snapshots: list[StoredSnapshot] = []
            asleep = False
            try:
                snapshots = self._snapshots(model_id)
                calls, asleep = self._newest_calls(model_id)
                if asleep and model_id in parked:
                    calls, asleep = self._calls(model_id, 0), False
            except StoreDamaged as error:  # it concerns this model alone
                lost = lost or f"model {model_id} is lost: {error}"
            content = json.loads(about)
            found.append(
                StoredModel(
                    *(model_id, number, content, lost, trimmed_to, calls, snapshots),
                    last_request_time_s=times.get(model_id),
                    parked=tuple(parked.get(model_id, ())),
                    asleep=asleep,
                )
            )
        self._check_epoch()  # last: rows may be missing because another process has the store
        return found

    def _newest_calls(self, model_id: str) -> tuple[list[StoredCall], bool]:
        """What a start needs of a model's calls, and whether there are others."""
        assert self._db is not None
        try:
            found = newest_calls(self._db, model_id)
        except sqlite3.Error as error:
            raise StoreDamaged(f"the calls of {model_id} cannot be read: {error}") from error
        return (self._calls(model_id, 0), False) if found is None else found

    def _snapshots(self, model_id: str) -> list[StoredSnapshot]:
        assert self._db is not None
        rows = self._db.execute(
            f"SELECT {SNAPSHOT}, crc32 IS {SNAPSHOT_SEAL} FROM snapshots "
            "WHERE model_id=? ORDER BY position",
            (model_id,),
        )
        return [StoredSnapshot(*good(row, f"a snapshot of {model_id}")) for row in rows]

    def _check_epoch(self) -> None:
        assert self._db is not None
        (epoch,) = self._db.execute("SELECT value FROM meta WHERE name='epoch'").fetchone()
        if epoch != self._epoch:
            raise Fenced

    def _calls(self, model_id: str, after: int) -> list[StoredCall]:
        assert self._db is not None
        try:
            rows = self._db.execute(
                f"SELECT {CALL}, crc32 IS {CALL_SEAL} FROM calls "
                "WHERE model_id=? AND position>? ORDER BY position",
                (model_id, after),
            ).fetchall()
            # Last: rows may be missing because another process has the store.
            self._check_epoch()
        except sqlite3.Error as error:
            raise StoreDamaged(f"its calls cannot be read: {error}") from error
        return [StoredCall(*good(row, "a call")) for row in rows]

    def _parked(self, model_id: str) -> list[tuple[int, bytes, bytes]]:
        assert self._db is not None
        rows = self._db.execute(
            f"SELECT {PARKED}, crc32 IS seal(model_id, {PARKED}) FROM parked "
            "WHERE model_id=? ORDER BY seq_id",
            (model_id,),
        ).fetchall()
        self._check_epoch()  # last, as above
        if not all(row[-1] for row in rows):
            _log.error("some calls that waited for model %s are damaged", logged_id(model_id))
        return [row[:-1] for row in rows if row[-1]]

    def _steps(self, model_id: str, below: int | None, size: int) -> tuple[list[StoredStep], int]:
        assert self._db is not None
        end = 2**62 if below is None else below
        try:
            rows = self._db.execute(
                f"SELECT {STEP}, crc32 IS {STEP_SEAL} FROM steps "
                "WHERE model_id=? AND position<? ORDER BY position DESC LIMIT ?",
                (model_id, end, size),
            ).fetchall()
            count = "SELECT count(*) FROM steps WHERE model_id=?"
            (total,) = self._db.execute(count, (model_id,)).fetchone()
            self._check_epoch()  # last, as above
        except sqlite3.Error as error:
            raise StoreDamaged(f"its steps cannot be read: {error}") from error
        if not all(row[-1] for row in rows):  # nothing but people's interest hangs on one
            _log.error("some steps of model %s are damaged", logged_id(model_id))
        found = [
            StoredStep(position, seq_id, step_count, time_s, json.loads(metrics))
            for position, seq_id, step_count, time_s, metrics, good in rows
            if good
        ]
        return found, total

    def _blob(self, table: str, model_id: str, position: int) -> bytes:
        assert self._db is not None
        try:
            row = self._db.execute(
                f"SELECT crc32, data FROM {table} WHERE model_id=? AND position=?",
                (model_id, position),
            ).fetchone()
            self._check_epoch()  # last, as above
        except sqlite3.Error as error:
            raise StoreDamaged(f"{table} cannot be read: {error}") from error
        if row is None or seal(model_id, position, row[1]) != row[0]:
            what = "is gone" if row is None else "is damaged"
            raise StoreDamaged(f"call {position} {what} in {table}")
        return bytes(row[1])

    def _commit(self, writes: Sequence[Write]) -> None:
        assert self._db is not None
        done = False
        try:
            with _transaction(self._db):
                self._check_epoch()
                if not writes:  # somebody wants to know whether writing works
                    self._db.execute("INSERT OR REPLACE INTO meta VALUES ('probe', 0)")
                if self._known is None:
                    self._known = Known(self._db)
                write_all(self._db, writes, self._known)
                failpoints.hit("wal_fsync")
            done = True
            self._log_bytes += COMMIT_BYTES + sum(map(nbytes_of, writes))
        except sqlite3.OperationalError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code not in _UNWRITABLE:
                raise
            raise StoreUnwritable(str(error), full=_UNWRITABLE[code]) from error
        except OSError as error:
            raise StoreUnwritable(str(error), full=True) from error
        finally:
            if not done:
                self._known = None

    def _checkpoint(self) -> None:
        assert self._db is not None
        self._log_bytes = 0
        # Pages that stay, since the disk is full or somebody reads, are copied another time.
        with contextlib.suppress(sqlite3.OperationalError):
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    # IMMEDIATE: the epoch must not change between its check and the commit.
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk may have rolled it back already
            db.execute("ROLLBACK")
        raise
