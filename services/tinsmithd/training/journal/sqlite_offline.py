"""The journal's file without a server: for back-ups. One is copied while a server writes to it."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tinsmithd import formats
from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.training.call import RefusedWork, StoredAnswer, last_before
from tinsmithd.training.journal.records import AddAnswer, AddCall, ForgetCalls, StoredSnapshot
from tinsmithd.training.journal.sqlite_format import JOURNAL
from tinsmithd.training.journal.sqlite_known import Known
from tinsmithd.training.journal.sqlite_rows import write_all
from tinsmithd.training.journal.sqlite_tables import (
    CALL_SEAL,
    MODEL,
    SCHEMA,
    SNAPSHOT,
    SNAPSHOT_SEAL,
    seal,
)

EPOCHS_MIN = 1_000
"""How far a restored journal's epoch is ahead at least, and another one for each minute since: no
server that had the journal since the back-up started so often."""
EPOCHS_MAX = 500_000
"""How far at most, a year of minutes, however old the back-up is or wrong a clock: the Checkpoint
server refuses an epoch that no restarts explain (`checkpoint.writer_epoch_step_max`)."""
INCARNATIONS_SINCE_S = 1_767_225_600
"""2026 in seconds since 1970: incarnations count seconds from there, so that two restores of one
back-up are two."""
WAIT_S = 30.0


def copy_journal(file: Path, place: Path) -> None:
    """Copy a journal as it is at one moment, also while a server writes to it.

    Raises:
        FormatUnknown: A later release wrote it.
        sqlite3.Error: There is none, or nobody can read it.
    """
    with _opened(file) as db:
        formats.check_known(f"the journal {file}", JOURNAL.read(db), JOURNAL.known)
        place.unlink(missing_ok=True)
        formats.copy_database(db, place)


def snapshots_in(file: Path) -> Mapping[str, Sequence[StoredSnapshot]]:
    """The snapshots that a journal counts, by model, the older one first; models without any too.

    Raises:
        sqlite3.Error, ValueError: It cannot be read, or is damaged.
    """
    found: dict[str, list[StoredSnapshot]] = {}
    with _opened(file) as db:
        for model_id, good in db.execute(f"SELECT model_id, crc32 IS seal({MODEL}) FROM models"):
            if not good:
                raise ValueError(f"model {model_id} is damaged in the journal")
            found[model_id] = []
        rows = db.execute(
            f"SELECT model_id, {SNAPSHOT}, crc32 IS {SNAPSHOT_SEAL} FROM snapshots "
            "ORDER BY model_id, position"
        )
        for model_id, position, step_count, folder, good in rows:
            if good and model_id in found:
                found[model_id].append(StoredSnapshot(position, step_count, folder))
    return found


def forget_snapshot(file: Path, model_id: str, snapshot: StoredSnapshot) -> None:
    """Strike a snapshot out of a copied journal; a newer one must be there."""
    with _opened(file) as db:
        place = (model_id, snapshot.position)
        db.execute("DELETE FROM snapshots WHERE model_id=? AND position=?", place)


def problems_in(file: Path) -> Sequence[str]:
    """What is damaged in a journal, for a person; all of it is read."""
    found: list[str] = []
    with _opened(file) as db:
        found += [text for (text,) in db.execute("PRAGMA integrity_check(5)") if text != "ok"]
        blob = "seal(model_id, position, data)"
        sealed = {"models": f"seal({MODEL})", "payloads": blob, "answers": blob}
        if JOURNAL.read(db) == JOURNAL.known:  # columns had other names before
            sealed |= {"calls": CALL_SEAL, "snapshots": SNAPSHOT_SEAL}
        for table, expected in sealed.items():
            (count,) = db.execute(
                f"SELECT count(*) FROM {table} WHERE crc32 IS NOT {expected}"
            ).fetchone()
            if count:
                found.append(f"{count} damaged row(s) in {table} of the journal")
    return found


def begin_incarnation(file: Path, age_s: float) -> None:
    """Make a restored journal one of its own, see `training.call.numbers`.

    Calls without an answer are struck out: nobody was told what came of them. The epoch rises, so
    that whoever had the journal before can write nowhere any more.

    Args:
        file: The journal; no server has it.
        age_s: Seconds since the back-up was taken.
    """
    with _opened(file) as db:
        formats.check_known(f"the journal {file}", JOURNAL.read(db), JOURNAL.known)
        db.execute("BEGIN IMMEDIATE")
        JOURNAL.bring_up(db)
        for statement in filter(str.strip, SCHEMA.split(";")):
            db.execute(statement)
        meta = dict(db.execute("SELECT name, value FROM meta"))
        number = max(meta.get("incarnation", 0) + 1, int(time.time()) - INCARNATIONS_SINCE_S)
        times = db.execute("SELECT model_id, time_s FROM requests").fetchall()
        db.execute("DELETE FROM parked")
        known = Known(db)
        _strike_out_unanswered(db, known)
        newest = "SELECT model_id, (SELECT max(position) FROM calls WHERE calls.model_id="
        for model_id, position in db.execute(f"{newest}models.model_id) FROM models").fetchall():
            _skip_to(db, known, model_id, (position or 0) + 1, last_before(number))
        db.execute("DELETE FROM requests")  # nobody called: people read these times
        db.executemany("INSERT INTO requests VALUES (?, ?)", times)
        values = {
            "format_version": JOURNAL.known,
            "release": formats.release(),
            "incarnation": number,
            "epoch": meta["epoch"] + min(EPOCHS_MIN + int(max(age_s, 0) // 60), EPOCHS_MAX),
        }
        db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())
        db.execute("COMMIT")


def _strike_out_unanswered(db: sqlite3.Connection, known: Known) -> None:
    query = "SELECT model_id, position FROM calls WHERE answer_digest IS NULL"
    places = db.execute(query).fetchall()
    write_all(db, [ForgetCalls(model_id, [position]) for model_id, position in places], known)


def _skip_to(
    db: sqlite3.Connection, known: Known, model_id: str, position: int, seq_id: int
) -> None:
    """Use a number for nothing, so that the next one follows it."""
    error = FailedPrecondition("the cluster was restored from a back-up", Reason.MODEL_RESTORED)
    call = AddCall(model_id, position, seq_id, b"restored", RefusedWork(error))
    answer = AddAnswer(model_id, position, StoredAnswer(error=error), keep=False)
    write_all(db, [call, answer], known)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    address = f"{file.absolute().as_uri()}?mode=rw"
    db = sqlite3.connect(address, uri=True, isolation_level=None, timeout=WAIT_S)
    with contextlib.closing(db):
        db.create_function("seal", -1, seal, deterministic=True)
        yield db
