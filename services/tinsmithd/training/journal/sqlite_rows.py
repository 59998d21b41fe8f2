"""Makes writes: what every call writes is gathered into few statements for a whole commit.

SQLite lets go of the interpreter's lock at each row of each statement, and while the event loop is
busy a thread waits for milliseconds to have it back. So rows are put together here, with their
seals, from what is known without asking (`Known`), and many of them go into one statement.
"""

import functools
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any

from tinsmithd.training.call import answer_digest, encode_answer, encode_work
from tinsmithd.training.journal.records import AddAnswer, AddCall, AddStep, Write
from tinsmithd.training.journal.sqlite_known import Known, Unanswered
from tinsmithd.training.journal.sqlite_tables import apply, seal

ROWS_EACH = (64, 16, *range(15, 0, -1))
"""Numbers of rows that a statement may have: few texts, which SQLite reads once each."""

Row = tuple[Any, ...]
Place = tuple[str, int]
"""A model's id, and a position."""


def write_all(db: sqlite3.Connection, writes: Sequence[Write], known: Known) -> None:
    """Make some writes, in order, within the current transaction.

    Args:
        db: The tables.
        writes: What to write.
        known: What is known of the tables; not true any more when this raises.
    """
    _Rows(db, known).write(writes)


@functools.cache
def _text(verb: str, table: str, columns: int, rows: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return f"{verb} INTO {table} VALUES {', '.join([row] * rows)}"


class _Rows:
    """The rows of one commit that are not in the tables yet."""

    def __init__(self, db: sqlite3.Connection, known: Known) -> None:
        self._db = db
        self._known = known
        self._gather: dict[type, Callable[[Any], None]] = {
            AddCall: self._add_call,
            AddAnswer: self._add_answer,
            AddStep: self._add_step,
        }
        self._forget()

    def _forget(self) -> None:
        self._calls: dict[Place, Row] = {}
        self._answered: dict[Place, Row] = {}
        self._payloads: dict[Place, Row] = {}
        self._no_payload: list[Place] = []
        self._unparked: list[Place] = []
        self._answers: list[Row] = []
        self._steps: dict[Place, Row] = {}
        self._steps_kept_max: dict[str, int] = {}
        self._asked: dict[str, float] = {}

    def write(self, writes: Sequence[Write]) -> None:
        for write in writes:
            gather = self._gather.get(type(write))
            if gather is not None:
                gather(write)
            else:
                self._flush()
                apply(self._db, write, self._known)
        self._flush()

    def _flush(self) -> None:
        self._put("INSERT", "calls", [*self._calls.values()])
        self._put("REPLACE", "calls", [*self._answered.values()])
        self._put("INSERT", "payloads", [*self._payloads.values()])
        self._put("INSERT", "answers", self._answers)
        self._put("REPLACE", "steps", [*self._steps.values()])
        self._put("REPLACE", "requests", [*self._asked.items()])
        for table, column, places in (
            ("payloads", "position", self._no_payload),
            ("parked", "seq_id", self._unparked),
        ):
            if places:
                gone = f"DELETE FROM {table} WHERE model_id=? AND {column}=?"
                self._db.executemany(gone, places)
        for model_id, kept_max in self._steps_kept_max.items():
            self._drop_steps(model_id, kept_max)
        self._forget()

    def _put(self, verb: str, table: str, rows: Sequence[Row]) -> None:
        start = 0
        for each in ROWS_EACH:
            while len(rows) - start >= each:
                values = [value for row in rows[start : start + each] for value in row]
                self._db.execute(_text(verb, table, len(rows[0]), each), values)
                start += each

    # --- what every call writes ---------------------------------------------------------------

    def _add_call(self, write: AddCall) -> None:
        model_id, place = write.model_id, (write.model_id, write.position)
        if model_id not in self._known.models:
            return  # a model that was deleted meanwhile must leave nothing behind
        payload = encode_work(write.work)
        call = Unanswered(write.seq_id, write.digest, len(payload))
        self._known.wrote(model_id, write.position, call)
        self._calls[place] = _row(place, call)
        self._payloads[place] = (*place, seal(*place, payload), payload)
        # Only people read it, so it has no seal. A trim removes the call, but not this.
        self._asked[model_id] = time.time()
        if write.seq_id in self._known.parked.get(model_id, ()):
            self._known.parked[model_id].discard(write.seq_id)
            self._unparked.append((model_id, write.seq_id))

    def _add_answer(self, write: AddAnswer) -> None:
        place = (write.model_id, write.position)
        call = self._known.answered(*place)
        if call is None:
            return
        answer = encode_answer(write.answer)
        payload_bytes = call.payload_bytes
        if not write.composition:  # it is never replayed
            payload_bytes = 0
            if self._payloads.pop(place, None) is None:
                self._no_payload.append(place)
        call = Unanswered(call.seq_id, call.digest, payload_bytes, call.attempts)
        kept_bytes = len(answer) if write.keep else 0
        row = _row(place, call, answer_digest(write.answer), kept_bytes, write.composition)
        (self._calls if place in self._calls else self._answered)[place] = row
        if write.keep:
            self._answers.append((*place, seal(*place, answer), answer))

    def _add_step(self, write: AddStep) -> None:
        model_id, step = write.model_id, write.step
        if model_id not in self._known.models:
            return
        # Counted and not looked for: a step of a model costs the same however many it made before.
        count, newest = self._known.steps_of(model_id)
        place = (model_id, step.position)
        if step.position > newest:
            count, newest = count + 1, step.position
        elif place not in self._steps:
            query = "SELECT count(*) FROM steps WHERE model_id=? AND position=?"
            count += 1 - self._db.execute(query, place).fetchone()[0]
        self._known.has_steps(model_id, count, newest)
        if count > write.kept_max:
            self._steps_kept_max[model_id] = write.kept_max
        values = (*place, step.seq_id, step.step_count, step.time_s, json.dumps(dict(step.metrics)))
        self._steps[place] = (*values, seal(*values))

    def _drop_steps(self, model_id: str, kept_max: int) -> None:
        count, newest = self._known.steps_of(model_id)
        dropped = self._db.execute(
            "DELETE FROM steps WHERE model_id=? AND position IN "
            "(SELECT position FROM steps WHERE model_id=? ORDER BY position LIMIT ?)",
            (model_id, model_id, count - kept_max),
        ).rowcount
        self._known.has_steps(model_id, count - dropped, newest)


def _row(
    place: Place,
    call: Unanswered,
    digest: bytes | None = None,
    answer_bytes: int = 0,
    composition: bytes = b"",
) -> Row:
    """A row of `calls`."""
    values = (
        *place,
        *(call.seq_id, call.digest, call.payload_bytes, call.attempts),
        *(digest, answer_bytes, composition),
    )
    return (*values, seal(*values))
