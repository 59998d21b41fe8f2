"""What is written down of models and calls, and what is read: the journal's vocabulary.

Where the bytes go is a `JournalStore`: SQLite in production, a simulated disk in the simulator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tinsmithd.training.call import StoredAnswer, Work

DELETED_KEPT_MAX = 1_000
"""Models that are remembered after they were deleted."""
STARTS_KEPT_MAX = 1_000
"""Creations and checkpoints that are remembered because ranks died of them."""


class Fenced(Exception):
    """Another process claimed the store: this one must end."""


class StoreUnwritable(Exception):
    """The store cannot be written now; reading it works.

    Attributes:
        full: It is for want of room.
    """

    def __init__(self, message: str, *, full: bool) -> None:
        super().__init__(message)
        self.full = full


class StoreDamaged(Exception):
    """What is read is not what was written."""


# --- what is written --------------------------------------------------------------------------


@dataclass(frozen=True)
class AddModel:
    """A model exists from now on. `about` is what `models` keeps of it; JSON can hold it."""

    model_id: str
    number: int
    about: Mapping[str, Any]


@dataclass(frozen=True)
class DeleteModel:
    """A model is gone, with everything of it.

    With `remember`, what was written of it when it came stays among the `DELETED_KEPT_MAX` newest
    of this kind: a late repeat of the request that created it must not create another.
    """

    model_id: str
    remember: bool = False


@dataclass(frozen=True)
class LoseModel:
    """A model's state is gone for good; why, for a person."""

    model_id: str
    why: str


@dataclass(frozen=True)
class AddCall:
    """A call has its place in the model's order."""

    model_id: str
    position: int
    seq_id: int
    digest: bytes
    work: Work


@dataclass(frozen=True)
class AddAnswer:
    """What came of a call, and in which composition it was computed.

    A call without a composition is never replayed, and its payload goes. With `keep` the answer
    itself stays, until `DropAnswers`; its digest always stays.
    """

    model_id: str
    position: int
    answer: StoredAnswer
    composition: bytes = b""
    keep: bool = True


@dataclass(frozen=True)
class ForgetCalls:
    """Calls that took no effect and whose numbers are free again."""

    model_id: str
    positions: Sequence[int]


@dataclass(frozen=True)
class CountAttempt:
    """The ranks died during this call so many times."""

    model_id: str
    position: int
    attempts: int


@dataclass(frozen=True)
class CountStart:
    """The ranks died so many times while something was put onto them; 0 forgets it.

    The `STARTS_KEPT_MAX` that were counted last are kept.
    """

    key: str
    attempts: int


@dataclass(frozen=True)
class AddSnapshot:
    """The state of a model after the call at `position` is in `folder`."""

    model_id: str
    position: int
    step_count: int
    folder: str

    @classmethod
    def of(cls, model_id: str, snapshot: "StoredSnapshot") -> "AddSnapshot":
        """The write that makes a finished snapshot count."""
        return cls(model_id, snapshot.position, snapshot.step_count, snapshot.folder)


@dataclass(frozen=True)
class Trim:
    """Drop what nobody needs any more: calls up to `position`, and snapshots before it."""

    model_id: str
    position: int


@dataclass(frozen=True)
class DropAnswers:
    """Answers of calls up to `position` are not kept any more."""

    model_id: str
    position: int


Write = (
    AddModel
    | DeleteModel
    | LoseModel
    | AddCall
    | AddAnswer
    | ForgetCalls
    | CountAttempt
    | CountStart
    | AddSnapshot
    | Trim
    | DropAnswers
)


# --- what is read -----------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredCall:
    """A call, without its payload.

    Attributes:
        payload_bytes: Of the payload, 0 once it was dropped.
        answer_digest: SHA-256 of the answer; None while there is none.
        answer_bytes: Of the answer where it is still kept, else 0.
    """

    position: int
    seq_id: int
    digest: bytes
    payload_bytes: int
    attempts: int
    answer_digest: bytes | None
    answer_bytes: int
    composition: bytes


@dataclass(frozen=True)
class StoredSnapshot:
    """A snapshot that was finished."""

    position: int
    step_count: int
    folder: str


@dataclass(frozen=True)
class StoredModel:
    """A model, as it was written down; calls and snapshots rise by position.

    Attributes:
        trimmed_to: Up to this position calls may be gone; 0 where all are there.
        last_request_time_s: When its newest call was written down, by the wall clock; None where
            there was none, or an older release wrote it.
    """

    model_id: str
    number: int
    about: Mapping[str, Any]
    lost: str
    trimmed_to: int
    calls: Sequence[StoredCall]
    snapshots: Sequence[StoredSnapshot]
    last_request_time_s: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class DeletedModel:
    """A model that was deleted and is remembered."""

    model_id: str
    number: int
    about: Mapping[str, Any]


@dataclass
class Contents:
    """All that a store has when it is claimed; models in the order in which they came."""

    cluster_id: str
    epoch: int
    models: Sequence[StoredModel] = field(default_factory=list)
    deleted: Sequence[DeletedModel] = field(default_factory=list)
    starts: Mapping[str, int] = field(default_factory=dict)


class JournalStore(Protocol):
    """Keeps what is committed, whole or not at all.

    `commit` of a later call may not be durable before one of an earlier call.
    """

    async def claim(self) -> Contents:
        """Take the store over from whoever had it, and read it.

        Raises:
            StoreDamaged: It cannot be read.
        """

    async def commit(self, writes: Sequence[Write]) -> None:
        """Write all of this or nothing; durable, as far as the mode goes, when it returns.

        Raises:
            Fenced: The store was claimed by another process.
            StoreUnwritable: The disk is full or cannot be written. Nothing was written.
        """

    async def tidy(self) -> None:
        """Do what it has put off, now that nobody waits for a commit; it may find nothing to do."""

    async def calls(self, model_id: str, after: int) -> Sequence[StoredCall]:
        """The calls of a model after a position, as they are now.

        Raises:
            Fenced: The store was claimed by another process.
        """

    async def work(self, model_id: str, position: int) -> Work:
        """The payload of a call.

        Raises:
            Fenced: The store was claimed by another process.
            StoreDamaged: It is gone or damaged.
        """

    async def answer(self, model_id: str, position: int) -> StoredAnswer:
        """The answer of a call.

        Raises:
            Fenced: The store was claimed by another process.
            StoreDamaged: It is gone or damaged.
        """

    async def close(self) -> None:
        """Close it."""
