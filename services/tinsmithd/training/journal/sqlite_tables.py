"""The tables of the journal in SQLite, and what the rarer writes do to them (see `sqlite_rows`).

A change of them is a migration (`sqlite_format`), but for a table or an index that is new.
"""

import json
import sqlite3
import zlib
from typing import Any

from tinsmithd.training.call import encode_work
from tinsmithd.training.journal.records import (
    DELETED_KEPT_MAX,
    STARTS_KEPT_MAX,
    USED_IDS_KEPT_MAX,
    AddModel,
    AddSnapshot,
    CountAttempt,
    CountStart,
    DeleteModel,
    DropAnswers,
    ForgetCalls,
    LoseModel,
    ParkCall,
    Trim,
    UnparkCalls,
    Write,
)
from tinsmithd.training.journal.sqlite_known import Known

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value NOT NULL);
CREATE TABLE IF NOT EXISTS models (
    model_id TEXT PRIMARY KEY, number INTEGER NOT NULL, about TEXT NOT NULL, lost TEXT NOT NULL,
    trimmed_to INTEGER NOT NULL, crc32 INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS calls (
    model_id TEXT NOT NULL, position INTEGER NOT NULL, seq_id INTEGER NOT NULL,
    digest BLOB NOT NULL, payload_bytes INTEGER NOT NULL, attempts INTEGER NOT NULL,
    answer_digest BLOB, answer_bytes INTEGER NOT NULL, composition BLOB NOT NULL,
    crc32 INTEGER NOT NULL, PRIMARY KEY (model_id, position)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS payloads (
    model_id TEXT NOT NULL, position INTEGER NOT NULL, crc32 INTEGER NOT NULL, data BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS payloads_by_place ON payloads (model_id, position);
CREATE TABLE IF NOT EXISTS answers (
    model_id TEXT NOT NULL, position INTEGER NOT NULL, crc32 INTEGER NOT NULL, data BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS answers_by_place ON answers (model_id, position);
CREATE TABLE IF NOT EXISTS snapshots (
    model_id TEXT NOT NULL, position INTEGER NOT NULL, step_count INTEGER NOT NULL,
    folder TEXT NOT NULL, crc32 INTEGER NOT NULL, PRIMARY KEY (model_id, position)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS deleted (
    model_id TEXT PRIMARY KEY, number INTEGER NOT NULL, about TEXT NOT NULL, crc32 INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS parked (
    model_id TEXT NOT NULL, seq_id INTEGER NOT NULL, digest BLOB NOT NULL, data BLOB NOT NULL,
    crc32 INTEGER NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS parked_by_number ON parked (model_id, seq_id);
CREATE TABLE IF NOT EXISTS steps (
    model_id TEXT NOT NULL, position INTEGER NOT NULL, seq_id INTEGER NOT NULL,
    step_count INTEGER NOT NULL, time_s REAL NOT NULL, metrics TEXT NOT NULL,
    crc32 INTEGER NOT NULL, PRIMARY KEY (model_id, position)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS used_ids (
    number INTEGER PRIMARY KEY, model_id TEXT NOT NULL, crc32 INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS requests (model_id TEXT PRIMARY KEY, time_s REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS starts (
    number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, attempts INTEGER NOT NULL,
    crc32 INTEGER NOT NULL
);
"""
CALL = "position, seq_id, digest, payload_bytes, attempts, answer_digest, answer_bytes, composition"
CALL_SEAL = f"seal(model_id, {CALL})"
MODEL = "model_id, number, about, lost, trimmed_to"
DELETED = "model_id, number, about"
USED_ID = "number, model_id"
SNAPSHOT = "position, step_count, folder"
SNAPSHOT_SEAL = f"seal(model_id, {SNAPSHOT})"
PARKED = "seq_id, digest, data"
STEP = "position, seq_id, step_count, time_s, metrics"
STEP_SEAL = f"seal(model_id, {STEP})"
COPIED_BYTES_MAX = 64 * 1024
"""A longer value is not copied to have its checksum taken together with others."""
_TABLES = ("calls", "payloads", "parked", "answers", "snapshots", "steps", "requests", "models")


def seal(*values: object) -> int:
    """CRC-32 over some values, their types and lengths."""
    crc, parts = 0, []
    for value in values:
        kind = value.__class__
        if kind is bytes:
            data: Any = value
            parts.append(b"bytes %d " % len(data))
            if len(data) > COPIED_BYTES_MAX:
                crc = zlib.crc32(data, zlib.crc32(b"".join(parts), crc))
                parts = []
                continue
        else:
            data = repr(value).encode()
            parts.append(b"%s %d " % (kind.__name__.encode(), len(data)))
        parts.append(data)
    return zlib.crc32(b"".join(parts), crc)


def apply(db: sqlite3.Connection, write: Write, known: Known) -> None:
    """Make a write within the current transaction.

    Args:
        db: The tables.
        write: What to write.
        known: What is known of the tables, which is changed with them.
    """
    match write:
        case AddModel():
            values = (write.model_id, write.number, json.dumps(write.about), "", 0)
            db.execute("INSERT INTO models VALUES (?, ?, ?, ?, ?, 0)", values)
            _seal_model(db, write.model_id)
            known.models.add(write.model_id)
        case DeleteModel():
            if write.remember:
                _remember(db, write.model_id)
            if write.keep_id:
                _keep_id(db, write.model_id)
            for table in _TABLES:
                db.execute(f"DELETE FROM {table} WHERE model_id=?", (write.model_id,))
            known.gone(write.model_id)
        case LoseModel():
            lost = (write.why, write.model_id)
            db.execute("UPDATE models SET lost=? WHERE model_id=?", lost)
            _seal_model(db, write.model_id)
        case ParkCall():
            _park_call(db, write, known)
        case UnparkCalls():
            _unpark(db, known, write.model_id, *write.seq_ids)
        case ForgetCalls():
            for table in ("calls", "payloads", "answers"):
                db.executemany(
                    f"DELETE FROM {table} WHERE model_id=? AND position=?",
                    [(write.model_id, position) for position in write.positions],
                )
            known.changed(write.model_id, write.positions)
        case CountAttempt():
            db.execute(
                "UPDATE calls SET attempts=? WHERE model_id=? AND position=?",
                (write.attempts, write.model_id, write.position),
            )
            _seal_calls(db, "position=?", write.model_id, write.position)
            known.changed(write.model_id, [write.position])
        case CountStart():
            _count_start(db, write)
        case AddSnapshot():
            _add_snapshot(db, write)
        case Trim():
            _trim(db, write)
            known.changed_until(write.model_id, write.position)
        case DropAnswers():
            _drop_answers(db, write)
            known.changed_until(write.model_id, write.position)
        case _:
            raise TypeError(type(write).__name__)


def _count_start(db: sqlite3.Connection, write: CountStart) -> None:
    db.execute("DELETE FROM starts WHERE key=?", (write.key,))
    if write.attempts:
        row = (write.key, write.attempts, seal(write.key, write.attempts))
        db.execute("INSERT INTO starts (key, attempts, crc32) VALUES (?, ?, ?)", row)
        db.execute(
            "DELETE FROM starts WHERE number IN "
            "(SELECT number FROM starts ORDER BY number DESC LIMIT -1 OFFSET ?)",
            (STARTS_KEPT_MAX,),
        )


def _remember(db: sqlite3.Connection, model_id: str) -> None:
    db.execute(
        f"INSERT INTO deleted SELECT {DELETED}, seal({DELETED}) FROM models WHERE model_id=?",
        (model_id,),
    )
    db.execute(
        "DELETE FROM deleted WHERE model_id IN "
        "(SELECT model_id FROM deleted ORDER BY number DESC LIMIT -1 OFFSET ?)",
        (DELETED_KEPT_MAX,),
    )


def _keep_id(db: sqlite3.Connection, model_id: str) -> None:
    db.execute(
        f"INSERT INTO used_ids SELECT {USED_ID}, seal({USED_ID}) FROM models WHERE model_id=?",
        (model_id,),
    )
    db.execute(
        "DELETE FROM used_ids WHERE number <= "
        "(SELECT number FROM used_ids ORDER BY number DESC LIMIT 1 OFFSET ?)",
        (USED_IDS_KEPT_MAX,),
    )


def _park_call(db: sqlite3.Connection, write: ParkCall, known: Known) -> None:
    model_id, values = write.model_id, (write.seq_id, write.digest, encode_work(write.work))
    _unpark(db, known, model_id, write.seq_id)
    db.execute(
        "INSERT INTO parked SELECT ?, ?, ?, ?, ? WHERE EXISTS "
        "(SELECT 1 FROM models WHERE model_id=?)",
        (model_id, *values, seal(model_id, *values), model_id),
    )
    if model_id in known.models:
        known.parked[model_id].add(write.seq_id)


def _unpark(db: sqlite3.Connection, known: Known, model_id: str, *seq_ids: int) -> None:
    places = [(model_id, seq_id) for seq_id in seq_ids]
    db.executemany("DELETE FROM parked WHERE model_id=? AND seq_id=?", places)
    known.parked[model_id].difference_update(seq_ids)
    if not known.parked[model_id]:
        del known.parked[model_id]


def _add_snapshot(db: sqlite3.Connection, write: AddSnapshot) -> None:
    db.execute(
        "INSERT OR REPLACE INTO snapshots SELECT ?, ?, ?, ?, 0 "
        "WHERE EXISTS (SELECT 1 FROM models WHERE model_id=?)",
        (*(write.model_id, write.position, write.step_count, write.folder), write.model_id),
    )
    db.execute(
        f"UPDATE snapshots SET crc32={SNAPSHOT_SEAL} WHERE model_id=? AND position=?",
        (write.model_id, write.position),
    )


def _seal_calls(db: sqlite3.Connection, which: str, model_id: str, *positions: int) -> None:
    db.execute(
        f"UPDATE calls SET crc32={CALL_SEAL} WHERE model_id=? AND {which}", (model_id, *positions)
    )


def _seal_model(db: sqlite3.Connection, model_id: str) -> None:
    db.execute(f"UPDATE models SET crc32=seal({MODEL}) WHERE model_id=?", (model_id,))


def _trim(db: sqlite3.Connection, write: Trim) -> None:
    place = (write.model_id, write.position)
    row = db.execute("SELECT trimmed_to FROM models WHERE model_id=?", place[:1]).fetchone()
    new = (*place, 0 if row is None else row[0])  # what is before was trimmed already
    db.execute("UPDATE models SET trimmed_to=max(trimmed_to, ?) WHERE model_id=?", place[::-1])
    _seal_model(db, write.model_id)
    db.execute("DELETE FROM snapshots WHERE model_id=? AND position<?", place)
    db.execute("DELETE FROM payloads WHERE model_id=? AND position<=?", place)
    which = "position<=? AND position>?"
    dropped = "payload_bytes=0, composition=x''"
    db.execute(f"UPDATE calls SET {dropped} WHERE model_id=? AND {which}", new)
    _seal_calls(db, which, *new)
    # The newest call stays, also without an answer: it says which number is next.
    db.execute(
        "DELETE FROM calls WHERE model_id=? AND position<=? AND answer_bytes=0 AND position < "
        "(SELECT max(position) FROM calls WHERE model_id=?)",
        (*place, write.model_id),
    )


def _drop_answers(db: sqlite3.Connection, write: DropAnswers) -> None:
    place = (write.model_id, write.position, write.after)
    which = "position<=? AND position>?"
    db.execute(f"DELETE FROM answers WHERE model_id=? AND {which}", place)
    db.execute(f"UPDATE calls SET answer_bytes=0 WHERE model_id=? AND {which}", place)
    # Of trimmed calls only the newest is of use: it says which number is next.
    db.execute(
        f"DELETE FROM calls WHERE model_id=? AND {which} AND payload_bytes=0 AND position < "
        "(SELECT max(position) FROM calls WHERE model_id=?)",
        (*place, write.model_id),
    )
    _seal_calls(db, which, *place)
