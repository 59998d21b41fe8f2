"""What a start reads of the journal's tables."""

import contextlib
import json
import logging
import sqlite3
from collections.abc import Sequence
from typing import Any

from tinsmithd.training.journal.records import (
    CALLS_AT_START,
    DeletedModel,
    StoreDamaged,
    StoredCall,
)
from tinsmithd.training.journal.sqlite_tables import CALL, CALL_SEAL, DELETED, USED_ID

_log = logging.getLogger(__name__)


def newest_calls(db: sqlite3.Connection, model_id: str) -> tuple[list[StoredCall], bool] | None:
    """What a start needs of the calls of a model of which none waits, and whether there are others.

    Calls are answered in order, so that where the newest one is, all are.

    Returns:
        Calls by position; None where one waits.

    Raises:
        StoreDamaged: One of them is damaged.
    """
    found: list[StoredCall] = []
    numbered = False
    query = (
        f"SELECT {CALL}, crc32 IS {CALL_SEAL} FROM calls WHERE model_id=? ORDER BY position DESC"
    )
    with contextlib.closing(db.execute(query, (model_id,))) as rows:
        for row in rows:
            if len(found) >= CALLS_AT_START and numbered:
                return found[::-1], True
            call = StoredCall(*good(row, f"a call of {model_id}"))
            if not found and call.answer_digest is None:
                return None
            found.append(call)
            numbered = numbered or call.seq_id > 0
    return found[::-1], False


def deleted(db: sqlite3.Connection) -> list[DeletedModel]:
    """The deleted models that are remembered, without damaged ones."""
    rows = db.execute(
        f"SELECT {DELETED}, crc32 IS seal({DELETED}) FROM deleted ORDER BY number"
    ).fetchall()
    if not all(row[-1] for row in rows):
        # Only a repeat that comes late could miss one, which is no reason not to start.
        _log.error("some of what the journal remembers of deleted models is damaged")
    return [
        DeletedModel(model_id, number, json.loads(about))
        for model_id, number, about, whole in rows
        if whole
    ]


def used_ids(db: sqlite3.Connection) -> list[str]:
    """The chosen ids of deleted models, oldest first, without damaged ones."""
    rows = db.execute(f"SELECT model_id, crc32 IS seal({USED_ID}) FROM used_ids ORDER BY number")
    found = rows.fetchall()
    if not all(whole for _, whole in found):
        _log.error("some of what the journal remembers of chosen ids is damaged")
    return [model_id for model_id, whole in found if whole]


def starts(db: sqlite3.Connection) -> dict[str, int]:
    """What ranks died of at their start, and how often, without what is damaged."""
    rows = db.execute("SELECT key, attempts FROM starts WHERE crc32 IS seal(key, attempts)")
    return dict(rows.fetchall())


def good(row: Sequence[Any], what: str) -> Sequence[Any]:
    """The row without its last column, which says whether the seal is right."""
    if not row[-1]:
        raise StoreDamaged(f"{what} is damaged in the journal")
    return row[:-1]
