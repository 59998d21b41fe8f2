"""What a journal holds, as plain values: the meaning of each `Write`, without any disk."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinsmithd.training.call import (
    StoredAnswer,
    Work,
    answer_digest,
    decode_answer,
    decode_work,
    encode_answer,
    encode_work,
)
from tinsmithd.training.journal import (
    AddAnswer,
    AddCall,
    AddModel,
    AddSnapshot,
    AddStep,
    CountAttempt,
    CountStart,
    DeletedModel,
    DeleteModel,
    DropAnswers,
    ForgetCalls,
    LoseModel,
    ParkCall,
    ParkedCall,
    StoreDamaged,
    StoredCall,
    StoredModel,
    StoredSnapshot,
    StoredStep,
    Trim,
    UnparkCalls,
    Write,
)
from tinsmithd.training.journal.records import DELETED_KEPT_MAX, USED_IDS_KEPT_MAX

CALLS_AT_START = 2
"""Fewer than in production: so that models are often asleep."""


@dataclass
class Blob:
    """Bytes with their checksum."""

    crc32: int
    data: bytes

    @classmethod
    def of(cls, data: bytes) -> "Blob":
        """Bytes as they are now."""
        return cls(zlib.crc32(data), data)


class ModelTable:
    """All of one model."""

    def __init__(self, number: int, about: str) -> None:
        self.number = number
        self.about = about
        self.lost = ""
        self.calls: dict[int, StoredCall] = {}
        self.payloads: dict[int, Blob] = {}
        self.answers: dict[int, Blob] = {}
        self.snapshots: dict[int, StoredSnapshot] = {}
        self.trimmed_to = 0
        self.parked: dict[int, tuple[bytes, bytes]] = {}
        self.steps: list[StoredStep] = []

    @property
    def from_checkpoint(self) -> bool:
        """Whether the model began as a checkpoint."""
        return bool(json.loads(self.about)["from_checkpoint"])


class Tables:
    """All models."""

    def __init__(self) -> None:
        self.epoch = 0
        self.models: dict[str, ModelTable] = {}
        self.deleted: dict[str, ModelTable] = {}
        self.starts: dict[str, int] = {}
        self.used_ids: dict[str, int] = {}

    def commit(self, writes: Sequence[Write]) -> None:
        """Make all of these."""
        for write in writes:
            self._apply(write)

    def stored_models(self) -> list[StoredModel]:
        """What `claim` reads."""
        found = []
        for model_id, table in _by_number(self.models):
            calls, asleep = _at_start(self.stored_calls(model_id, 0))
            if table.parked:
                calls, asleep = self.stored_calls(model_id, 0), False
            found.append(
                StoredModel(
                    model_id,
                    table.number,
                    json.loads(table.about),
                    table.lost,
                    table.trimmed_to,
                    calls,
                    [snapshot for _, snapshot in sorted(table.snapshots.items())],
                    parked=tuple(sorted(table.parked)),
                    asleep=asleep,
                )
            )
        return found

    def deleted_models(self) -> list[DeletedModel]:
        """What `claim` reads of those that are gone."""
        found = _by_number(self.deleted)[-DELETED_KEPT_MAX:]
        return [
            DeletedModel(model_id, table.number, json.loads(table.about))
            for model_id, table in found
        ]

    def stored_ids(self) -> list[str]:
        """What `claim` reads of ids that are not to be given again."""
        return sorted(self.used_ids, key=self.used_ids.__getitem__)[-USED_IDS_KEPT_MAX:]

    def stored_calls(self, model_id: str, after: int) -> list[StoredCall]:
        """Calls after a position."""
        table = self.models.get(model_id)
        calls = sorted(table.calls.items()) if table else []
        return [call for position, call in calls if position > after]

    def work(self, model_id: str, position: int) -> Work:
        """A payload."""
        return decode_work(self._blob("payloads", model_id, position))

    def parked(self, model_id: str) -> list[ParkedCall]:
        """Calls that wait for those before them."""
        table = self.models.get(model_id)
        parked = sorted(table.parked.items()) if table else []
        return [ParkedCall(seq_id, digest, decode_work(data)) for seq_id, (digest, data) in parked]

    def steps(self, model_id: str, below: int | None, size: int) -> tuple[list[StoredStep], int]:
        """A page of steps."""
        table = self.models.get(model_id)
        every = table.steps[::-1] if table else []
        found = [step for step in every if below is None or step.position < below]
        return found[:size], len(every)

    def answer(self, model_id: str, position: int) -> StoredAnswer:
        """An answer."""
        return decode_answer(self._blob("answers", model_id, position))

    def _blob(self, kind: str, model_id: str, position: int) -> bytes:
        table = self.models.get(model_id)
        blob = getattr(table, kind).get(position) if table else None
        if blob is None or zlib.crc32(blob.data) != blob.crc32:
            raise StoreDamaged(f"call {position} of {model_id} in {kind}")
        data: bytes = blob.data
        return data

    def _apply(self, write: Write) -> None:
        if isinstance(write, AddModel):
            assert write.model_id not in self.models
            self.models[write.model_id] = ModelTable(write.number, json.dumps(write.about))
            return
        if isinstance(write, CountStart):
            self.starts[write.key] = write.attempts
            return
        table = self.models.get(write.model_id)
        if table is None:  # a model that was deleted leaves nothing behind
            return
        match write:
            case DeleteModel():
                del self.models[write.model_id]
                if write.remember:
                    self.deleted[write.model_id] = table
                if write.keep_id:
                    self.used_ids[write.model_id] = table.number
            case LoseModel():
                table.lost = write.why
            case AddCall():
                _add_call(table, write)
            case ParkCall():
                table.parked[write.seq_id] = (write.digest, encode_work(write.work))
            case UnparkCalls():
                for seq_id in write.seq_ids:
                    table.parked.pop(seq_id, None)
            case AddAnswer():
                _add_answer(table, write)
            case ForgetCalls():
                for position in write.positions:
                    for rows in (table.calls, table.payloads, table.answers):
                        rows.pop(position, None)
            case CountAttempt():
                _change(table, write.position, attempts=write.attempts)
            case AddStep():
                assert all(step.position < write.step.position for step in table.steps)
                table.steps = [*table.steps, write.step][-write.kept_max :]
            case AddSnapshot():
                snapshot = StoredSnapshot(write.position, write.step_count, write.folder)
                table.snapshots[write.position] = snapshot
            case Trim():
                _trim(table, write.position)
            case DropAnswers():
                _drop_answers(table, write.position)
            case _:
                raise TypeError(type(write).__name__)


def _at_start(calls: list[StoredCall]) -> tuple[list[StoredCall], bool]:
    """What a start needs of a model's calls, and whether there are others."""
    newest = calls[-CALLS_AT_START:]
    waits = any(call.answer_digest is None for call in calls)
    if waits or len(newest) == len(calls) or not any(call.seq_id for call in newest):
        return calls, False
    return newest, True


def _by_number(tables: Mapping[str, ModelTable]) -> list[tuple[str, ModelTable]]:
    return sorted(tables.items(), key=lambda item: item[1].number)


def _change(table: ModelTable, position: int, **values: Any) -> None:
    if position in table.calls:
        table.calls[position] = replace(table.calls[position], **values)


def _add_call(table: ModelTable, write: AddCall) -> None:
    assert write.position not in table.calls
    payload = Blob.of(encode_work(write.work))
    size = len(payload.data)
    call = StoredCall(write.position, write.seq_id, write.digest, size, 0, None, 0, b"")
    table.calls[write.position] = call
    table.payloads[write.position] = payload
    table.parked.pop(write.seq_id, None)


def _add_answer(table: ModelTable, write: AddAnswer) -> None:
    if write.position not in table.calls:
        return
    answer = Blob.of(encode_answer(write.answer))
    _change(
        table,
        write.position,
        answer_digest=answer_digest(write.answer),
        answer_bytes=len(answer.data) if write.keep else 0,
        composition=write.composition,
    )
    if not write.composition:
        table.payloads.pop(write.position, None)
        _change(table, write.position, payload_bytes=0)
    if write.keep:
        table.answers[write.position] = answer


def _trim(table: ModelTable, end: int) -> None:
    table.trimmed_to = max(table.trimmed_to, end)
    for position in [at for at in table.snapshots if at < end]:
        del table.snapshots[position]
    for position in [at for at in table.payloads if at <= end]:
        del table.payloads[position]
    newest = max(table.calls, default=0)
    for position, call in list(table.calls.items()):
        if position > end:
            continue
        if call.answer_bytes == 0 and position < newest:
            del table.calls[position]
        else:
            _change(table, position, payload_bytes=0, composition=b"")


def _drop_answers(table: ModelTable, end: int) -> None:
    newest = max(table.calls, default=0)
    for position, call in list(table.calls.items()):
        if position <= end:
            table.answers.pop(position, None)
            if call.payload_bytes == 0 and position < newest:
                del table.calls[position]
            else:
                _change(table, position, answer_bytes=0)
