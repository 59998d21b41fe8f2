"""What a call on a model asks for, and what came of it: plain values that can be written down.

`encode` and `decode` are the form in which the journal keeps a call; `Outcome` is what it answers.
Both are JSON in front of the bytes as they came over the wire, which are never parsed here.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tinsmithd import errors
from tinsmithd.domain import AdamParams, CheckpointPath
from tinsmithd.errors import Internal, InvalidArgument, Reason, TinsmithError

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class ComputeWork:
    """Forward, or forward and backward.

    Attributes:
        loss: The loss, as the wire has it.
        data: One datum each, as the wire has it.
        lengths: Tokens of each datum.
        backward: Whether gradients are added.
    """

    kind: ClassVar[str] = "compute"

    loss: bytes
    data: Sequence[bytes]
    lengths: Sequence[int]
    backward: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return sum(map(len, self.data))


@dataclass(frozen=True)
class StepWork:
    """One optimizer step."""

    kind: ClassVar[str] = "optim_step"

    adam: AdamParams


@dataclass(frozen=True)
class SaveOptions:
    """How a checkpoint is to be kept.

    Attributes:
        request_id: Of the call, so that the Checkpoint server knows it again when it is made again
            after a crash, or sent again; empty in calls that an older release wrote down.
        lease_id: The caller's lease on what is ephemeral.
    """

    path: CheckpointPath
    ttl_seconds: int | None
    overwrite: bool
    user_metadata: Mapping[str, str]
    request_id: str = ""
    ephemeral: bool = False
    lease_id: str = ""


@dataclass(frozen=True)
class SaveWork:
    """Save the model as a checkpoint."""

    kind: ClassVar[str] = "save"

    options: SaveOptions


@dataclass(frozen=True)
class LoadWork:
    """Replace the model's state by a checkpoint's."""

    kind: ClassVar[str] = "load"

    path: CheckpointPath
    optimizer: bool


@dataclass(frozen=True)
class RefusedWork:
    """A call that was found wrong: it only uses up its number."""

    kind: ClassVar[str] = "refused"

    error: TinsmithError


Work = ComputeWork | StepWork | SaveWork | LoadWork | RefusedWork


@dataclass(frozen=True)
class Outcome:
    """What a call answers.

    Attributes:
        parts: Results of one datum each, as the wire has them; void with an error.
        value: The rest of the answer; JSON can hold it.
        error: Set in place of a value.
    """

    parts: Sequence[bytes] = ()
    value: Mapping[str, Any] = field(default_factory=dict)
    error: TinsmithError | None = None


def changes_model(work: Work) -> bool:
    """Whether carrying it out leaves the ranks with another state than before."""
    return isinstance(work, StepWork | LoadWork) or (
        isinstance(work, ComputeWork) and work.backward
    )


def encode(work: Work) -> bytes:
    """Write a call down."""
    match work:
        case ComputeWork():
            head = {
                "backward": work.backward,
                "lengths": list(work.lengths),
                "sizes": [len(work.loss), *map(len, work.data)],
            }
            return _join(work.kind, head, [work.loss, *work.data])
        case StepWork():
            return _join(work.kind, dataclasses.asdict(work.adam))
        case SaveWork():
            options = {**dataclasses.asdict(work.options), "path": str(work.options.path)}
            return _join(work.kind, options)
        case LoadWork():
            return _join(work.kind, {"path": str(work.path), "optimizer": work.optimizer})
        case RefusedWork():
            return _join(work.kind, _error_to_json(work.error))


def decode(data: bytes) -> Work:
    """Read a call that `encode` wrote."""
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


def encode_outcome(outcome: Outcome) -> bytes:
    """Write an answer down; equal answers give equal bytes."""
    if outcome.error is not None:
        return _join("error", _error_to_json(outcome.error))
    head = {"value": outcome.value, "sizes": [len(part) for part in outcome.parts]}
    return _join("value", head, outcome.parts)


def decode_outcome(data: bytes) -> Outcome:
    """Read an answer that `encode_outcome` wrote."""
    kind, head, body = _split(data)
    if kind == "error":
        return Outcome(error=_error_from_json(head))
    return Outcome(_cut(body, head["sizes"]), head["value"])


def digest_of(outcome: Outcome) -> bytes:
    """SHA-256 of what a replay must give again: of an error its class and reason, not its words."""
    if outcome.error is not None:
        error = outcome.error
        return hashlib.sha256(f"{type(error).__name__} {error.reason}".encode()).digest()
    return hashlib.sha256(encode_outcome(outcome)).digest()


def _join(kind: str, head: Mapping[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    text = json.dumps({"kind": kind, **head}, sort_keys=True, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *parts])


def _split(data: bytes) -> tuple[str, dict[str, Any], memoryview]:
    (length,) = _LENGTH.unpack_from(data)
    start = _LENGTH.size
    head = json.loads(data[start : start + length])
    return head.pop("kind"), head, memoryview(data)[start + length :]


def _cut(body: memoryview, sizes: Sequence[int]) -> list[bytes]:
    parts, start = [], 0
    for size in sizes:
        parts.append(bytes(body[start : start + size]))
        start += size
    if start != len(body):
        raise ValueError(f"{len(body)} bytes follow, expected {start}")
    return parts


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
    cls: Any = getattr(errors, values["class"])
    if cls is Internal:
        return Internal(values["message"])
    reason = Reason(values["reason"])
    rest = {"metadata": values["metadata"]}
    if cls is InvalidArgument:
        # The message has the field in front already.
        error: TinsmithError = InvalidArgument("", values["message"], reason, **rest)
        error.field = values["field"]
        return error
    error = cls(values["message"], reason, retry_after_s=values["retry_after_s"], **rest)
    error.field = values["field"]
    return error
