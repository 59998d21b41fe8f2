"""The catalogue's SQLite file: its tables, its pragmas, and how it is brought up to date.

Opened with WAL and `synchronous=FULL`: a commit is on the disk when it returns, but for those that
a loss of power may undo (`syncing`). SQLite never copies its log into the file by itself: see
`file`, and for what makes up for a damaged log `redo`. The lock is exclusive, so that there is no
shared memory file: a server starts and reads on a disk that is full.

Every row carries a digest over its other columns, since SQLite has none of its own.
"""

import contextlib
import functools
import hashlib
import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tinsmithd import formats
from tinsmithd.checkpoint.catalogue import owned, tallies

_SCHEMA = """
CREATE TABLE checkpoints (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    model_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    expire_time_s REAL,
    record TEXT NOT NULL,
    digest TEXT NOT NULL,
    UNIQUE (model_id, kind, name)
);
CREATE TABLE writers (
    name TEXT NOT NULL UNIQUE,
    epoch INTEGER NOT NULL,
    digest TEXT NOT NULL
);
"""
_REDO = """
CREATE TABLE redo (
    identity TEXT NOT NULL,
    position INTEGER NOT NULL,
    digest TEXT NOT NULL,
    logs INTEGER NOT NULL
);
"""
"""One row, see `redo`: which catalogue it is, and the last commit that is in it. `logs` is there to
be changed, see `begin_log`."""
_FAST = tallies.SCHEMA + owned.INDEXES + owned.BY_MODEL
"""What finds rows: nothing that they do not say, too."""
_FAST_3 = tallies.SCHEMA + owned.INDEXES + owned.BY_PUBLIC_ID_3
"""What format 3 had of it."""
_PRAGMAS = (
    "locking_mode=EXCLUSIVE",
    "journal_mode=WAL",
    "synchronous=FULL",
    "wal_autocheckpoint=0",
    "journal_size_limit=4194304",
    "temp_store=MEMORY",
    "cell_size_check=ON",
    "trusted_schema=OFF",
)


def set_up(db: sqlite3.Connection) -> None:
    """Prepare a connection."""
    db.row_factory = sqlite3.Row
    # Damaged text must reach the digest instead of failing the whole query.
    db.text_factory = functools.partial(str, encoding="utf-8", errors="surrogateescape")
    for pragma in _PRAGMAS:
        db.execute(f"PRAGMA {pragma}").fetchall()


def make_tables(db: sqlite3.Connection, beside: str) -> None:
    """Make the tables of a new file, and those that `beside` is the SQL of."""
    _execute(db, _SCHEMA + _FAST + _REDO + beside)
    identify(db)


def check_tables(db: sqlite3.Connection, beside: str) -> None:
    """Refuse a file that has not exactly the tables, indexes and triggers of `make_tables`.

    Raises:
        ValueError: It has others.
    """
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        fresh.executescript(_SCHEMA + _FAST + _REDO + beside)
        if _tables(db) != _tables(fresh):
            raise ValueError("its tables are not those of this server")


@contextlib.contextmanager
def syncing(db: sqlite3.Connection, *, durable: bool) -> Iterator[None]:
    """Let the transaction in the body of the `with` wait for the disk, or not.

    What is not waited for is in the log, in order: a loss of power may cut the log off before it,
    and the next commit that is waited for keeps it.
    """
    if durable:
        yield
        return
    db.execute("PRAGMA synchronous=NORMAL").fetchall()
    try:
        yield
    finally:
        db.execute("PRAGMA synchronous=FULL").fetchall()


def check_whole(db: sqlite3.Connection) -> None:
    """Let SQLite look at every page and compare indexes with tables: 0.7 s for 100,000 rows.

    Raises:
        sqlite3.DatabaseError, ValueError: Something is wrong.
    """
    # Not quick_check: a damaged index makes checkpoints vanish, and that one does not look.
    (first, *_) = db.execute("PRAGMA integrity_check(1)").fetchall()
    if first[0] != "ok":
        raise ValueError(first[0])


def _tables(db: sqlite3.Connection) -> list[tuple[object, ...]]:
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    return [tuple(row) for row in db.execute(query)]


def digest_of(*values: object) -> str:
    """SHA-256, in hex, of plain values, such as a row's other columns.

    Raises:
        TypeError: One is of a type that no column has.
    """
    text = ", ".join([_JSON.get(type(value), json.dumps)(value) for value in values])
    return hashlib.sha256(f"[{text}]".encode()).hexdigest()


_JSON: Mapping[type, Callable[[Any], str]] = {
    str: json.encoder.encode_basestring_ascii,
    int: int.__repr__,
    type(None): lambda _: "null",
}
"""How the columns of a row are written, as `json.dumps` does it, which takes twice as long for a
list of them."""


def _execute(db: sqlite3.Connection, statements: str) -> None:
    for statement in filter(str.strip, statements.split(";")):
        db.execute(statement.strip())


def identify(db: sqlite3.Connection) -> None:
    """Let the file be of a catalogue of its own for `redo`, in the transaction that is open."""
    row = (secrets.token_hex(16), 0)
    db.execute("DELETE FROM redo")
    db.execute("INSERT INTO redo VALUES (?,?,?,0)", (*row, digest_of(*row)))


def begin_log(db: sqlite3.Connection) -> None:
    """Begin SQLite's log anew, which its file has.

    The next transaction would do that, and wait for the disk once more. From here on nothing of
    what the log had can hide what the file has.
    """
    with syncing(db, durable=False), db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE redo SET logs=logs+1")


def set_position(db: sqlite3.Connection, identity: str, position: int) -> None:
    """Write down the last commit that is in the file, in the transaction that is open."""
    values = (position, digest_of(identity, position))
    db.execute("UPDATE redo SET position=?, digest=?", values)


def _to_2(db: sqlite3.Connection) -> None:
    """Format 1 had a table of files, more columns and no digests."""
    for index in ("files_by_content", "checkpoints_by_expiry"):
        db.execute(f"DROP INDEX {index}")
    for table in ("checkpoints", "files"):
        db.execute(f"ALTER TABLE {table} RENAME TO {table}_1")
    _execute(db, _SCHEMA)
    for row in db.execute("SELECT * FROM checkpoints_1 ORDER BY number").fetchall():
        files = db.execute(
            "SELECT name, size_bytes, sha256 FROM files_1 WHERE number=? ORDER BY name",
            (row["number"],),
        ).fetchall()
        columns = (
            *(row["number"], row["model_id"], row["kind"], row["name"]),
            *(row["expire_time_s"], _record_1(row, files)),
        )
        db.execute(
            "INSERT INTO checkpoints VALUES (?,?,?,?,?,?,?)", (*columns, digest_of(*columns))
        )
    for table in ("files", "checkpoints"):
        db.execute(f"DROP TABLE {table}_1")


def _to_3(db: sqlite3.Connection) -> None:
    """Format 2 had to look at all rows for a page, a sum or what has expired."""
    _execute(db, _FAST_3)
    tallies.count_anew(db)


def _to_4(db: sqlite3.Connection) -> None:
    """Format 3 had no redo, sorted the checkpoints of a model, and did not count them."""
    db.execute("DROP INDEX checkpoints_by_public_id")
    _execute(db, owned.BY_MODEL + _REDO)
    identify(db)
    tallies.count_anew(db)


def _record_1(row: sqlite3.Row, files: list[sqlite3.Row]) -> str:
    return json.dumps(
        {
            "base_model": row["base_model"],
            "lora": json.loads(row["lora"]),
            "step_count": row["step_count"],
            "create_time_s": row["create_time_s"],
            "user_metadata": json.loads(row["user_metadata"]),
            "files": [list(file) for file in files],
        }
    )


CATALOGUE = formats.SqliteFormat(
    "the catalogue",
    (formats.Migration(2, _to_2), formats.Migration(3, _to_3), formats.Migration(4, _to_4)),
)
"""A change of its tables is a migration here."""
