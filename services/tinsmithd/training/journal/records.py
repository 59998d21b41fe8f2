"""The journal's vocabulary: what it writes of models and calls, and what it reads.

A `JournalStore` has the bytes: SQLite in production, a simulated disk in the simulator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tinsmithd.training.call import StoredAnswer, Work

DELETED_KEPT_MAX = 1_000
"""Number of deleted models that the journal remembers."""
USED_IDS_KEPT_MAX = 100_000
"""Number of ids that were chosen for models since deleted; the journal remembers the newest."""
CALLS_AT_START = 8
"""Of a model of which no call waits, a start reads so many of the newest; the others when it is
called. Most models of a cluster are at rest."""
STARTS_KEPT_MAX = 1_000
"""Number of creations and checkpoints remembered because ranks died of them."""


class Fenced(Exception):
    """Another process claimed the store: this one must end."""

    def __init__(self) -> None:
        super().__init__("another Training server has taken over")


class StoreUnwritable(Exception):
    """Nobody can write to the store now; reading it works.

    Attributes:
        full: Whether room is what is missing.
    """

    def __init__(self, message: str, *, full: bool) -> None:
        super().__init__(message)
        self.full = full


class StoreDamaged(Exception):
    """The store does not hold what was written."""


# --- what is written --------------------------------------------------------------------------


@dataclass(frozen=True)
class AddModel:
    """A model exists from now on. `about` is what `Model.about` says of it; JSON can hold it."""

    model_id: str
    number: int
    about: Mapping[str, Any]


@dataclass(frozen=True)
class DeleteModel:
    """A model is gone, with everything of it.

    With `remember`, what `AddModel` said of it stays, among the `DELETED_KEPT_MAX` newest of this
    kind: a late repeat of the request that created it must not create another. With `keep_id` its
    id stays, among the `USED_IDS_KEPT_MAX` newest: it was chosen, and must not be again.
    """

    model_id: str
    remember: bool = False
    keep_id: bool = False


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
class ParkCall:
    """A call waits for numbers before its own; `AddCall` of that number takes it from here."""

    model_id: str
    seq_id: int
    digest: bytes
    work: Work


@dataclass(frozen=True)
class UnparkCalls:
    """Calls that waited so took no effect, and their numbers are free again."""

    model_id: str
    seq_ids: Sequence[int]


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
    """Number of rank deaths during this call."""

    model_id: str
    position: int
    attempts: int


@dataclass(frozen=True)
class CountStart:
    """Number of rank deaths while something was put onto them; 0 forgets it.

    The store keeps the `STARTS_KEPT_MAX` that were counted last.
    """

    key: str
    attempts: int


@dataclass(frozen=True)
class AddStep:
    """An optimizer step was applied; of each model the newest `kept_max` are remembered."""

    model_id: str
    step: "StoredStep"
    kept_max: int


@dataclass(frozen=True)
class AddSnapshot:
    """`folder` has the state of a model after the call at `position`."""

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
    """Nobody needs these any more: calls up to `position`, and snapshots before it."""

    model_id: str
    position: int


@dataclass(frozen=True)
class DropAnswers:
    """Nobody may ask again for answers of calls up to `position`; those up to `after` are gone."""

    model_id: str
    position: int
    after: int = 0


Write = (
    AddModel
    | DeleteModel
    | LoseModel
    | AddCall
    | ParkCall
    | UnparkCalls
    | AddAnswer
    | ForgetCalls
    | CountAttempt
    | CountStart
    | AddStep
    | AddSnapshot
    | Trim
    | DropAnswers
)


# --- what is read -----------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredCall:
    """A call, without its payload.

    Attributes:
        payload_bytes: Size of the payload, 0 once it was dropped.
        answer_digest: SHA-256 of the answer; None while there is none.
        answer_bytes: Size of the answer where it is still kept, else 0.
        composition: See `Composition.encode`; empty where the call is never replayed.
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
class ParkedCall:
    """A call that waits for numbers before its own, see `ParkCall`."""

    seq_id: int
    digest: bytes
    work: Work


@dataclass(frozen=True)
class StoredStep:
    """An optimizer step that was applied.

    Attributes:
        position: That of its call in the model's order.
        seq_id: That call's number, or 0.
        step_count: That of the model after it.
        time_s: When, by the wall clock.
        metrics: See `Step` of the contract.
    """

    position: int
    seq_id: int
    step_count: int
    time_s: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class StoredSnapshot:
    """A snapshot that was finished."""

    position: int
    step_count: int
    folder: str


@dataclass(frozen=True)
class StoredModel:
    """A model, as the journal has it; calls and snapshots rise by position.

    Attributes:
        trimmed_to: Up to this position calls may be gone; 0 where all are there.
        last_request_time_s: When its newest call was written, by the wall clock; None where there
            was none, or an older release wrote it.
        parked: Numbers of the calls that wait for those before theirs, see `JournalStore.parked`.
        asleep: No call waits, and `calls` has the newest alone, the newest with a number among
            them: `JournalStore.calls` has all.
    """

    model_id: str
    number: int
    about: Mapping[str, Any]
    lost: str
    trimmed_to: int
    calls: Sequence[StoredCall]
    snapshots: Sequence[StoredSnapshot]
    last_request_time_s: float | None = field(default=None, compare=False)
    parked: Sequence[int] = ()
    asleep: bool = False


@dataclass(frozen=True)
class DeletedModel:
    """A deleted model that the journal remembers."""

    model_id: str
    number: int
    about: Mapping[str, Any]


@dataclass
class Contents:
    """All that a store has when a process claims it; models and ids in the order of creation."""

    cluster_id: str
    epoch: int
    models: Sequence[StoredModel] = field(default_factory=list)
    deleted: Sequence[DeletedModel] = field(default_factory=list)
    starts: Mapping[str, int] = field(default_factory=dict)
    used_ids: Sequence[str] = field(default_factory=list)
    incarnation: int = 0
    """See `training.call.numbers`; 0 where no back-up was restored."""


class JournalStore(Protocol):
    """Keeps commits, whole or not at all; none is durable before an earlier one."""

    async def claim(self) -> Contents:
        """Take the store over from the process that had it, and read it.

        Raises:
            StoreDamaged: Nobody can read it.
        """

    async def commit(self, writes: Sequence[Write]) -> None:
        """Make all of these writes or none; durable, as far as the mode goes, on return.

        Raises:
            Fenced: Another process has claimed the store.
            StoreUnwritable: The disk is full or takes nothing. Nothing was written.
        """

    async def tidy(self) -> None:
        """Do work that it has put off, now that nobody waits for a commit."""

    def nbytes(self) -> int:
        """Bytes that it takes on disk; any thread may ask."""

    async def calls(self, model_id: str, after: int) -> Sequence[StoredCall]:
        """The calls of a model after a position, as they are now.

        Raises:
            Fenced: Another process has claimed the store.
        """

    async def work(self, model_id: str, position: int) -> Work:
        """The payload of a call.

        Raises:
            Fenced: Another process has claimed the store.
            StoreDamaged: It is gone or damaged.
        """

    async def parked(self, model_id: str) -> Sequence[ParkedCall]:
        """The calls that wait for numbers before their own, by number, without damaged ones.

        Raises:
            Fenced: Another process has claimed the store.
        """

    async def answer(self, model_id: str, position: int) -> StoredAnswer:
        """The answer of a call.

        Raises:
            Fenced: Another process has claimed the store.
            StoreDamaged: It is gone or damaged.
        """

    async def steps(
        self, model_id: str, below: int | None, size: int
    ) -> tuple[Sequence[StoredStep], int]:
        """A page of a model's steps, newest first, and how many there are in all.

        Args:
            model_id: Which model.
            below: Only steps at positions below this one; None for all.
            size: Number of steps, at most.

        Raises:
            Fenced: Another process has claimed the store.
            StoreDamaged: They cannot be read.
        """

    async def close(self) -> None:
        """Close it."""
