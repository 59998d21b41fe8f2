"""Which formats the journal's file had, and how each became the next one.

    1   the first release: `meta` says so; columns had names that were older than the code's
    2   `PRAGMA user_version` says so, too; `meta` has the release that wrote it last

`meta` has the format in both, so that the first release knows that it is not its own.
"""

import sqlite3

from tinsmithd import formats

_RENAMED = (("result_digest", "answer_digest"), ("plan", "composition"))


def _read(db: sqlite3.Connection) -> int:
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found:
        return int(found)
    if db.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone() is None:
        return 0
    row = db.execute("SELECT value FROM meta WHERE name='format_version'").fetchone()
    return 0 if row is None else int(row[0])


def _written_by(db: sqlite3.Connection) -> str:
    row = db.execute("SELECT value FROM meta WHERE name='release'").fetchone()
    return "" if row is None else str(row[0])


def _to_2(db: sqlite3.Connection) -> None:
    for old, new in _RENAMED:
        db.execute(f"ALTER TABLE calls RENAME COLUMN {old} TO {new}")


JOURNAL = formats.SqliteFormat("the journal", (formats.Migration(2, _to_2),), _read, _written_by)
