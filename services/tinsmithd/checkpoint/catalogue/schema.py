"""The catalogue's SQLite file: its tables, how it is opened, checked and brought up to date.

Opened with WAL and `synchronous=FULL`: a commit is on the disk when it returns, but for those that
a loss of power may undo (`syncing`). Every other commit is also copied from the log into the file
at once (`wal_autocheckpoint=1`), because SQLite takes a damaged log for one that ends earlier and
would forget commits without a word; a damaged file it reports. The lock is exclusive, so that there
is no shared memory file: a server starts and reads on a disk that is full.

Every row carries a digest over its other columns, since SQLite has none of its own.
"""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

SCHEMA_VERSION = 2
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
_PRAGMAS = (
    "locking_mode=EXCLUSIVE",
    "journal_mode=WAL",
    "synchronous=FULL",
    "wal_autocheckpoint=1",
    "temp_store=MEMORY",
    "cell_size_check=ON",
    "trusted_schema=OFF",
)


class CatalogueUnusable(Exception):
    """The catalogue cannot be read, so that nothing can be served; the message says what to do."""


def open_file(file: Path, *, may_be_new: bool) -> sqlite3.Connection:
    """Open the catalogue, whole and of this version; an empty one where there is none.

    Args:
        file: SQLite's file.
        may_be_new: False where an empty catalogue can only be one that was lost.

    Raises:
        CatalogueUnusable: It is damaged, lost, or of a later version.
    """
    db = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
    try:
        _prepare(db, may_be_new=may_be_new)
    except (sqlite3.DatabaseError, ValueError) as error:
        db.close()
        why = " ".join(str(error).split())  # SQLite's own words may be many lines
        raise CatalogueUnusable(
            f"the catalogue {file} cannot be used: {why}; restore it from a backup, or try"
            " sqlite3's .recover on a copy"
        ) from error
    return db


def _prepare(db: sqlite3.Connection, *, may_be_new: bool) -> None:
    db.row_factory = sqlite3.Row
    # Damaged text must reach the digest instead of failing the whole query.
    db.text_factory = lambda data: data.decode(errors="surrogateescape")
    for pragma in _PRAGMAS:
        db.execute(f"PRAGMA {pragma}").fetchall()
    check_whole(db)
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        if not may_be_new:
            raise ValueError("it is empty, and there are stored files that it should know")
        db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
    elif version == 1:
        _migrate_1(db)
    elif version != SCHEMA_VERSION:
        raise ValueError(f"it has schema {version}, this server knows {SCHEMA_VERSION}")
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        fresh.executescript(_SCHEMA)
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
    for pragma in ("synchronous=NORMAL", "wal_autocheckpoint=0"):
        db.execute(f"PRAGMA {pragma}").fetchall()
    try:
        yield
    finally:
        for pragma in ("synchronous=FULL", "wal_autocheckpoint=1"):
            db.execute(f"PRAGMA {pragma}").fetchall()


def check_whole(db: sqlite3.Connection) -> None:
    """Let SQLite look at every page and compare indexes with tables: 0.1 s for 100,000 rows.

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
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _migrate_1(db: sqlite3.Connection) -> None:
    """Version 1 had a table of files, more columns and no digests."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        for index in ("files_by_content", "checkpoints_by_expiry"):
            db.execute(f"DROP INDEX {index}")
        for table in ("checkpoints", "files"):
            db.execute(f"ALTER TABLE {table} RENAME TO {table}_1")
        for statement in filter(str.strip, _SCHEMA.split(";")):
            db.execute(statement.strip())
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
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


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
