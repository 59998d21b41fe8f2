"""The tables of the journal in SQLite, and what each write does to them.

Two columns keep names that are older than ours: `result_digest` is an answer's digest, `plan` a
call's composition.
"""

import json
import sqlite3
import time
import zlib

from tinsmithd.training.call import ComputeWork, answer_digest, encode_answer, encode_work
from tinsmithd.training.journal.records import (
    DELETED_KEPT_MAX,
    STARTS_KEPT_MAX,
    USED_IDS_KEPT_MAX,
    AddAnswer,
    AddCall,
    AddModel,
    AddSnapshot,
    AddStep,
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

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value NOT NULL);
CREATE TABLE IF NOT EXISTS models (
    model_id TEXT PRIMARY KEY, number INTEGER NOT NULL, about TEXT NOT NULL, lost TEXT NOT NULL,
    trimmed_to INTEGER NOT NULL, crc32 INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS calls (
    model_id TEXT NOT NULL, position INTEGER NOT NULL, seq_id INTEGER NOT NULL,
    digest BLOB NOT NULL, payload_bytes INTEGER NOT NULL, attempts INTEGER NOT NULL,
    result_digest BLOB, answer_bytes INTEGER NOT NULL, plan BLOB NOT NULL, crc32 INTEGER NOT NULL,
    PRIMARY KEY (model_id, position)
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
CALL = "position, seq_id, digest, payload_bytes, attempts, result_digest, answer_bytes, plan"
CALL_SEAL = f"seal(model_id, {CALL})"
MODEL = "model_id, number, about, lost, trimmed_to"
DELETED = "model_id, number, about"
USED_ID = "number, model_id"
SNAPSHOT = "position, step_count, folder"
SNAPSHOT_SEAL = f"seal(model_id, {SNAPSHOT})"
PARKED = "seq_id, digest, data"
STEP = "position, seq_id, step_count, time_s, metrics"
STEP_SEAL = f"seal(model_id, {STEP})"
_TABLES = ("calls", "payloads", "parked", "answers", "snapshots", "steps", "requests", "models")


def nbytes_of(write: Write) -> int:
    """Roughly the bytes that a write adds to the log, besides a few pages."""
    if isinstance(write, AddCall | ParkCall) and isinstance(write.work, ComputeWork):
        return write.work.nbytes
    return sum(map(len, write.answer.outputs)) if isinstance(write, AddAnswer) else 0


def seal(*values: object) -> int:
    """CRC-32 over some values, their types and lengths."""
    crc = 0
    for value in values:
        data = value if isinstance(value, bytes) else repr(value).encode()
        crc = zlib.crc32(f"{type(value).__name__} {len(data)} ".encode(), crc)
        crc = zlib.crc32(data, crc)
    return crc


def apply(db: sqlite3.Connection, write: Write) -> None:
    """Make a write within the current transaction."""
    match write:
        case AddModel():
            values = (write.model_id, write.number, json.dumps(write.about), "", 0)
            db.execute("INSERT INTO models VALUES (?, ?, ?, ?, ?, 0)", values)
            _seal_model(db, write.model_id)
        case DeleteModel():
            if write.remember:
                _remember(db, write.model_id)
            if write.keep_id:
                _keep_id(db, write.model_id)
            for table in _TABLES:
                db.execute(f"DELETE FROM {table} WHERE model_id=?", (write.model_id,))
        case LoseModel():
            lost = (write.why, write.model_id)
            db.execute("UPDATE models SET lost=? WHERE model_id=?", lost)
            _seal_model(db, write.model_id)
        case AddCall():
            _add_call(db, write)
        case ParkCall():
            _park_call(db, write)
        case UnparkCalls():
            _unpark(db, write.model_id, *write.seq_ids)
        case AddAnswer():
            _add_answer(db, write)
        case ForgetCalls():
            for table in ("calls", "payloads", "answers"):
                db.executemany(
                    f"DELETE FROM {table} WHERE model_id=? AND position=?",
                    [(write.model_id, position) for position in write.positions],
                )
        case CountAttempt():
            db.execute(
                "UPDATE calls SET attempts=? WHERE model_id=? AND position=?",
                (write.attempts, write.model_id, write.position),
            )
            _seal_calls(db, "position=?", write.model_id, write.position)
        case CountStart():
            _count_start(db, write)
        case AddStep():
            _add_step(db, write)
        case AddSnapshot():
            db.execute(
                "INSERT OR REPLACE INTO snapshots SELECT ?, ?, ?, ?, 0 "
                "WHERE EXISTS (SELECT 1 FROM models WHERE model_id=?)",
                (
                    *(write.model_id, write.position, write.step_count, write.folder),
                    write.model_id,
                ),
            )
            db.execute(
                f"UPDATE snapshots SET crc32={SNAPSHOT_SEAL} WHERE model_id=? AND position=?",
                (write.model_id, write.position),
            )
        case Trim():
            _trim(db, write)
        case DropAnswers():
            _drop_answers(db, write)


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


def _add_call(db: sqlite3.Connection, write: AddCall) -> None:
    payload = encode_work(write.work)
    # A model that was deleted meanwhile must leave nothing behind.
    db.execute(
        "INSERT INTO calls SELECT ?, ?, ?, ?, ?, 0, NULL, 0, x'', 0 "
        "WHERE EXISTS (SELECT 1 FROM models WHERE model_id=?)",
        (
            *(write.model_id, write.position, write.seq_id, write.digest, len(payload)),
            write.model_id,
        ),
    )
    _seal_calls(db, "position=?", write.model_id, write.position)
    # Only people read it, so it has no seal. A trim removes the call, but not this.
    db.execute(
        "INSERT OR REPLACE INTO requests SELECT model_id, ? FROM models WHERE model_id=?",
        (time.time(), write.model_id),
    )
    _add_blob(db, "payloads", write.model_id, write.position, payload)
    _unpark(db, write.model_id, write.seq_id)


def _park_call(db: sqlite3.Connection, write: ParkCall) -> None:
    model_id, values = write.model_id, (write.seq_id, write.digest, encode_work(write.work))
    _unpark(db, model_id, write.seq_id)
    db.execute(
        "INSERT INTO parked SELECT ?, ?, ?, ?, ? WHERE EXISTS "
        "(SELECT 1 FROM models WHERE model_id=?)",
        (model_id, *values, seal(model_id, *values), model_id),
    )


def _unpark(db: sqlite3.Connection, model_id: str, *seq_ids: int) -> None:
    places = [(model_id, seq_id) for seq_id in seq_ids]
    db.executemany("DELETE FROM parked WHERE model_id=? AND seq_id=?", places)


def _add_answer(db: sqlite3.Connection, write: AddAnswer) -> None:
    answer = encode_answer(write.answer)
    kept_bytes = len(answer) if write.keep else 0
    db.execute(
        "UPDATE calls SET result_digest=?, answer_bytes=?, plan=? WHERE model_id=? AND position=?",
        (
            answer_digest(write.answer),
            kept_bytes,
            write.composition,
            write.model_id,
            write.position,
        ),
    )
    if not write.composition:  # it is never replayed
        place = (write.model_id, write.position)
        db.execute("DELETE FROM payloads WHERE model_id=? AND position=?", place)
        db.execute("UPDATE calls SET payload_bytes=0 WHERE model_id=? AND position=?", place)
    _seal_calls(db, "position=?", write.model_id, write.position)
    if write.keep:
        _add_blob(db, "answers", write.model_id, write.position, answer)


def _add_blob(
    db: sqlite3.Connection, table: str, model_id: str, position: int, data: bytes
) -> None:
    db.execute(
        f"INSERT INTO {table} SELECT ?, ?, ?, ? "
        "WHERE EXISTS (SELECT 1 FROM calls WHERE model_id=? AND position=?)",
        (model_id, position, seal(model_id, position, data), data, model_id, position),
    )


def _seal_calls(db: sqlite3.Connection, which: str, model_id: str, position: int) -> None:
    db.execute(
        f"UPDATE calls SET crc32={CALL_SEAL} WHERE model_id=? AND {which}", (model_id, position)
    )


def _seal_model(db: sqlite3.Connection, model_id: str) -> None:
    db.execute(f"UPDATE models SET crc32=seal({MODEL}) WHERE model_id=?", (model_id,))


def _add_step(db: sqlite3.Connection, write: AddStep) -> None:
    model_id, step = write.model_id, write.step
    values = (model_id, step.position, step.seq_id, step.step_count, step.time_s)
    values += (json.dumps(dict(step.metrics)),)  # type: ignore[assignment]
    db.execute(
        "INSERT OR REPLACE INTO steps SELECT ?, ?, ?, ?, ?, ?, ? WHERE EXISTS "
        "(SELECT 1 FROM models WHERE model_id=?)",
        (*values, seal(*values), model_id),
    )
    db.execute(
        "DELETE FROM steps WHERE model_id=? AND position <= "
        "(SELECT position FROM steps WHERE model_id=? ORDER BY position DESC LIMIT 1 OFFSET ?)",
        (model_id, model_id, write.kept_max),
    )


def _trim(db: sqlite3.Connection, write: Trim) -> None:
    place = (write.model_id, write.position)
    db.execute("UPDATE models SET trimmed_to=max(trimmed_to, ?) WHERE model_id=?", place[::-1])
    _seal_model(db, write.model_id)
    db.execute("DELETE FROM snapshots WHERE model_id=? AND position<?", place)
    db.execute("DELETE FROM payloads WHERE model_id=? AND position<=?", place)
    db.execute("UPDATE calls SET payload_bytes=0, plan=x'' WHERE model_id=? AND position<=?", place)
    _seal_calls(db, "position<=?", *place)
    # The newest call stays, also without an answer: it says which number is next.
    db.execute(
        "DELETE FROM calls WHERE model_id=? AND position<=? AND answer_bytes=0 AND position < "
        "(SELECT max(position) FROM calls WHERE model_id=?)",
        (*place, write.model_id),
    )


def _drop_answers(db: sqlite3.Connection, write: DropAnswers) -> None:
    place = (write.model_id, write.position)
    db.execute("DELETE FROM answers WHERE model_id=? AND position<=?", place)
    db.execute("UPDATE calls SET answer_bytes=0 WHERE model_id=? AND position<=?", place)
    # Of trimmed calls only the newest is of use: it says which number is next.
    db.execute(
        "DELETE FROM calls WHERE model_id=? AND position<=? AND payload_bytes=0 AND position < "
        "(SELECT max(position) FROM calls WHERE model_id=?)",
        (*place, write.model_id),
    )
    _seal_calls(db, "position<=?", *place)
