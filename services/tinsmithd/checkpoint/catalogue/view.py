"""A replica's file: what the log says up to a position, as the catalogue's tables.

Nothing in it is true on its own: a file that is damaged, of another version or of another store is
made anew from the store. So it does not wait for the disk: a loss of power may take the last
entries, and takes the position with them.
"""

import contextlib
import itertools
import json
import logging
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from sqlite3 import Connection

from tinsmithd.checkpoint.catalogue import tallies
from tinsmithd.checkpoint.catalogue.file import CatalogueFile, CatalogueUnusable
from tinsmithd.checkpoint.catalogue.rows import Change, insert
from tinsmithd.checkpoint.store import Log, Snapshot
from tinsmithd.errors import DataLoss, Reason
from tinsmithd.formats import FormatUnknown

SCHEMA = """
CREATE TABLE places (
    place TEXT NOT NULL,
    number INTEGER NOT NULL,
    PRIMARY KEY (place, number)
) WITHOUT ROWID;
CREATE INDEX places_by_number ON places (number);
CREATE TABLE view (
    store TEXT NOT NULL,
    position INTEGER NOT NULL,
    log_bytes INTEGER NOT NULL,
    entry TEXT NOT NULL
);
"""
"""Besides the catalogue's: which checkpoints a blob is of, and up to where the log was read: the
position, and the digest of the entry there; that is empty after a snapshot."""
SNAPSHOT_FORMAT = 1
ROWS_AT_ONCE = 1000
SETTLE_BYTES = 64 * 1024
"""Of the store's log: a copy of them in SQLite's has some megabytes."""
_COMPRESSION = 1
_GZIP = 31  # as zlib says it

_log = logging.getLogger(__name__)


class ViewFile(CatalogueFile):
    """A replica's file. What was taken in is copied out of SQLite's log now and then."""

    _nbytes = 0

    def count(self, nbytes: int) -> None:
        """So many bytes of the store's log were taken in."""
        self._nbytes += nbytes
        if self._nbytes >= SETTLE_BYTES:
            self._nbytes = 0
            with contextlib.suppress(sqlite3.Error):  # on a full disk: later
                self.settle()


def open_view(file: Path) -> ViewFile:
    """Open a replica's file, an empty one where there is none or none that can be used.

    Raises:
        CatalogueUnusable: It cannot be made.
    """
    try:
        opened = ViewFile(file, may_be_new=True, beside=SCHEMA, may_be_lost=True)
    except (CatalogueUnusable, FormatUnknown) as error:
        _log.warning("%s: it is made anew from the store", error)
        for path in (file, file.with_name(file.name + "-wal")):
            path.unlink(missing_ok=True)
        opened = ViewFile(file, may_be_new=True, beside=SCHEMA, may_be_lost=True)
    opened.db.execute("PRAGMA synchronous=NORMAL").fetchall()
    opened.count(SETTLE_BYTES)
    return opened


def position_of(db: Connection, store: str) -> tuple[Snapshot, str] | None:
    """Up to where a file has the log of a store, and the digest of the entry there; None where it
    has another one's, or none."""
    row = db.execute("SELECT * FROM view").fetchone()
    if row is None or row["store"] != store:
        return None
    return Snapshot(row["position"], row["log_bytes"]), row["entry"]


def set_position(db: Connection, store: str, at: Snapshot, entry: str = "") -> None:
    """Write down up to where the file has the log, in the transaction that is open.

    Args:
        db: The file.
        store: Whose log.
        at: The position.
        entry: Digest of the entry there.
    """
    db.execute("DELETE FROM view")
    db.execute("INSERT INTO view VALUES (?,?,?,?)", (store, at.position, at.log_bytes, entry))


def rebuild(db: Connection, log: Log, snapshot: Snapshot | None) -> Snapshot:
    """Make a file anew of a snapshot, or empty where there is none; returns its position.

    Raises:
        DataLoss: The snapshot is damaged (CHECKPOINT_CORRUPT).
    """
    with db:
        db.execute("BEGIN IMMEDIATE")
        for table in ("checkpoints", "writers", "tallies", "places", "view", "sqlite_sequence"):
            db.execute(f"DELETE FROM {table}")
        at = Snapshot(0, 0)
        if snapshot is not None:
            with _without_indexes(db):
                _load(db, _lines(snapshot, log.read_snapshot(snapshot)), snapshot)
            tallies.count_anew(db)
            at = snapshot
        set_position(db, log.identity, at)
        return at


def _load(db: Connection, lines: Iterator[bytes], snapshot: Snapshot) -> None:
    try:
        header = json.loads(next(lines))
        if header["format"] > SNAPSHOT_FORMAT or header["position"] != snapshot.position:
            raise ValueError(f"it says {header}")
        count, last = 0, None
        while changes := [json.loads(line) for line in itertools.islice(lines, ROWS_AT_ONCE)]:
            last = changes.pop() if changes[-1][0] == "end" else None
            insert(db, changes)
            count += len(changes)
        if last is None or last[1] != count or next(lines, None) is not None:
            raise ValueError(f"it ends after {count} rows")
        db.execute("DELETE FROM sqlite_sequence")
        values = ("checkpoints", header["sequence"])
        db.execute("INSERT INTO sqlite_sequence VALUES (?,?)", values)
    except (ValueError, KeyError, IndexError, TypeError, StopIteration, zlib.error) as error:
        message = f"the snapshot of the catalogue at {snapshot.position} is damaged: {error}"
        raise DataLoss(message, Reason.CHECKPOINT_CORRUPT) from error


@contextlib.contextmanager
def _without_indexes(db: Connection) -> Iterator[None]:
    """Let many rows come in the body of the `with`; indexes are made when all are there."""
    query = "SELECT name, sql FROM sqlite_master WHERE type='index' AND sql IS NOT NULL"
    indexes = db.execute(query).fetchall()
    for index in indexes:
        db.execute(f"DROP INDEX {index['name']}")
    yield
    for index in indexes:
        db.execute(index["sql"])


def _lines(snapshot: Snapshot, pieces: Iterable[bytes]) -> Iterator[bytes]:
    unpacked, rest = zlib.decompressobj(_GZIP), b""
    for piece in pieces:
        *lines, rest = (rest + unpacked.decompress(piece)).split(b"\n")
        yield from lines


def sequence_of(db: Connection) -> int:
    """The highest number that a checkpoint ever had."""
    query = "SELECT seq FROM sqlite_sequence WHERE name='checkpoints'"
    row = db.execute(query).fetchone()
    return 0 if row is None else int(row["seq"])


class SnapshotWriter:
    """Writes a snapshot while the catalogue goes on changing.

    Rows are read some at a time. So it may have changes from after its position; they are made
    again when the log is read from there, which changes nothing.

    Args:
        reading: Begins a look at the file.
        db: The file.
        at: The position, taken before the first row is read.
        sequence: The highest number then.
    """

    def __init__(
        self,
        reading: Callable[[], contextlib.AbstractContextManager[None]],
        db: Connection,
        at: Snapshot,
        sequence: int,
    ) -> None:
        self._reading = reading
        self._db = db
        self._at = at
        self._sequence = sequence

    def pieces(self) -> Iterator[bytes]:
        """The snapshot."""
        packing = zlib.compressobj(_COMPRESSION, wbits=_GZIP)
        header = {
            "format": SNAPSHOT_FORMAT,
            "position": self._at.position,
            "sequence": self._sequence,
        }
        yield packing.compress(json.dumps(header).encode() + b"\n")
        count = 0
        for rows in itertools.chain(self._writers(), self._checkpoints()):
            count += len(rows)
            yield packing.compress(_text(rows))
        yield packing.compress(_text([("end", count)])) + packing.flush()

    def _writers(self) -> Iterator[Sequence[Change]]:
        with self._reading():
            rows = self._db.execute("SELECT * FROM writers").fetchall()
        yield [("writer", *row) for row in rows]

    def _checkpoints(self) -> Iterator[Sequence[Change]]:
        query = "SELECT * FROM checkpoints WHERE number>? ORDER BY number LIMIT ?"
        last = 0
        while True:
            with self._reading():
                rows = self._db.execute(query, (last, ROWS_AT_ONCE)).fetchall()
            if not rows:
                return
            yield [("put", *row) for row in rows]
            last = rows[-1]["number"]


def _text(changes: Sequence[Change]) -> bytes:
    return b"".join(json.dumps(change).encode() + b"\n" for change in changes)
