"""The bytes in which the journal keeps what a call asks for, and what came of it.

Both are JSON in front of bytes as they came over the wire, which nothing here parses.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from tinsmithd import errors
from tinsmithd.domain import AdamParams, CheckpointPath
from tinsmithd.errors import Reason, TinsmithError
from tinsmithd.saves import SaveOptions
from tinsmithd.training.call.answer import CallKind, StoredAnswer
from tinsmithd.training.call.work import (
    ComputeWork,
    LoadWork,
    RefusedWork,
    SaveWork,
    StepWork,
    Work,
)

_LENGTH = struct.Struct("<I")
_json = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def encode_work(work: Work) -> bytes:
    """The bytes of what a call asks for."""
    match work:
        case ComputeWork():
            head = {
                "backward": work.backward,
                "lengths": list(work.lengths),
                "sizes": [len(work.loss), *map(len, work.data)],
            }
            return _join(work.kind, head, [work.loss, *work.data])
        case StepWork():
            return _join(work.kind, vars(work.adam))
        case SaveWork():
            options = {**dataclasses.asdict(work.options), "path": str(work.options.path)}
            return _join(work.kind, options)
        case LoadWork():
            return _join(work.kind, {"path": str(work.path), "optimizer": work.optimizer})
        case RefusedWork():
            return _join(work.kind, _error_to_json(work.error))


def decode_work(data: bytes) -> Work:
    """Read what `encode_work` wrote."""
    kind, head, body = _split(data)
    if kind == ComputeWork.kind:
        loss, *rest = _cut(body, head["sizes"])
        return ComputeWork(loss, rest, head["lengths"], head["backward"])
    if kind == StepWork.kind:
        return StepWork(AdamParams(**head))
    if kind == SaveWork.kind:
        return SaveWork(SaveOptions(**{**head, "path": CheckpointPath.parse(head["path"])}))
    if kind == LoadWork.kind:
        return LoadWork(CheckpointPath.parse(head["path"]), head["optimizer"])
    if kind == RefusedWork.kind:
        return RefusedWork(_error_from_json(head))
    raise ValueError(f"no kind of call {kind!r}")


def encode_answer(answer: StoredAnswer) -> bytes:
    """The bytes of an answer; equal answers give equal bytes."""
    if answer.error is not None:
        return _join("error", _error_to_json(answer.error))
    head = {"value": answer.value, "sizes": [len(output) for output in answer.outputs]}
    if answer.kind is not None:
        head["call"] = str(answer.kind)
    return _join("value", head, answer.outputs)


def decode_answer(data: bytes) -> StoredAnswer:
    """Read what `encode_answer` wrote."""
    kind, head, body = _split(data)
    if kind == "error":
        return StoredAnswer(error=_error_from_json(head))
    call_kind = CallKind(head["call"]) if "call" in head else None
    return StoredAnswer(_cut(body, head["sizes"]), head["value"], kind=call_kind)


def answer_digest(answer: StoredAnswer) -> bytes:
    """SHA-256 of what a replay must give again: of an error its class and reason, not its words."""
    if answer.error is not None:
        error = answer.error
        return hashlib.sha256(f"{type(error).__name__} {error.reason}".encode()).digest()
    # Without the kind, which is the call's and not of what came of it.
    return hashlib.sha256(encode_answer(StoredAnswer(answer.outputs, answer.value))).digest()


def _join(kind: str, head: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    text = _json({"kind": kind, **head}).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *blobs])


def _split(data: bytes) -> tuple[str, dict[str, Any], memoryview]:
    (length,) = _LENGTH.unpack_from(data)
    start = _LENGTH.size
    head = json.loads(data[start : start + length])
    return head.pop("kind"), head, memoryview(data)[start + length :]


def _cut(body: memoryview, sizes: Sequence[int]) -> list[bytes]:
    blobs, start = [], 0
    for size in sizes:
        blobs.append(bytes(body[start : start + size]))
        start += size
    if start != len(body):
        raise ValueError(f"{len(body)} bytes follow, expected {start}")
    return blobs


def _error_to_json(error: TinsmithError) -> dict[str, Any]:
    return {
        "class": type(error).__name__,
        "message": error.message,
        "reason": str(error.reason),
        "field": error.field,
        "retry_after_s": error.retry_after_s,
        "metadata": error.metadata,
    }


def _error_from_json(values: Mapping[str, Any]) -> TinsmithError:
    return errors.rebuilt(
        getattr(errors, values["class"]),
        values["message"],
        Reason(values["reason"]),
        field=values["field"],
        retry_after_s=values["retry_after_s"],
        metadata=values["metadata"],
    )
