"""What a lane needs of the model whose calls it keeps in order, and what it says when it cannot."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tinsmithd.errors import (
    DataLoss,
    FailedPrecondition,
    NotFound,
    Reason,
    TinsmithError,
    Unavailable,
)
from tinsmithd.training.call.work import Work
from tinsmithd.training.journal.records import Write

Emit = Callable[[bytes], None]
"""Takes the next part of an answer."""

TakeTurn = Callable[[int], contextlib.AbstractAsyncContextManager[None]]
"""A turn at the trainer that costs so many tokens; entering raises when the lane was closed."""


@dataclass(frozen=True)
class LaneLimits:
    """Bounds of one lane; the names are those of the settings."""

    lane_calls_max: int
    lane_bytes_max: int
    gap_wait_s_max: float
    answers_kept_max: int
    answer_bytes_kept_max: int
    call_attempts_max: int = 2


@dataclass(frozen=True)
class Done:
    """What carrying out a call gave.

    Attributes:
        value: The answer, without its parts.
        error: The answer, where it is an error that changed the model.
        plan: How to make the same change again; empty where there is nothing to make.
        writes: What becomes true together with it.
        engine_s: Seconds that the ranks computed; not part of the answer.
    """

    value: Mapping[str, Any] = field(default_factory=dict)
    error: TinsmithError | None = None
    plan: bytes = b""
    writes: Sequence[Write] = ()
    engine_s: float = 0.0


class Rules(Protocol):
    """What a lane's calls mean: the model's side of it."""

    def check_room(self, nbytes: int) -> None:
        """Refuse a new call of this size when the journal has no room for it.

        Raises:
            ResourceExhausted: See above.
        """

    def wrote(self, position: int, nbytes: int) -> None:
        """A call of this size was handed to the journal."""

    def forgot(self, positions: Sequence[int]) -> None:
        """Calls at these positions were taken back, or are never made again."""

    async def execute(
        self, position: int, seq_id: int, work: Work, emit: Emit, turn: TakeTurn
    ) -> Done:
        """Carry a call out on the ranks.

        Raises:
            Unavailable, ResourceExhausted: Nothing happened, the number is free again.
            TinsmithError: It is refused, and has no effect but what the error says.
            TrainerLost, ModelBroken: Nobody knows what happened.
        """

    async def restore(self, turn: TakeTurn) -> None:
        """Wait for ranks and bring the model to the state after the last recorded call.

        Raises:
            DataLoss: That state cannot be had any more.
            TrainerLost, ModelBroken: The ranks died, or could not hold it.
        """

    @property
    def has_gradients(self) -> bool:
        """Whether gradients wait for a step."""

    async def suspend(self, turn: TakeTurn) -> None:
        """Take the model off the ranks; `restore` brings it back.

        Raises:
            TinsmithError, TrainerLost, ModelBroken: They may have it still.
        """

    def left(self) -> None:
        """The model is not at the ranks any more, and another may have its seat."""

    async def forget(self) -> None:
        """The model is deleted and its lane has ended: leave nothing of it."""

    async def settled(self, position: int, work: Work, turn: TakeTurn) -> None:
        """A call was carried out; the next one waits for this to return."""


@dataclass(frozen=True)
class Call:
    """A call as the lane sees it."""

    digest: bytes
    work: Work
    nbytes: int = 0


def shutting_down() -> Unavailable:
    """The error of a call that this process cannot bring to its end."""
    return Unavailable("the server stops", Reason.SHUTTING_DOWN, retry_after_s=1.0)


def model_lost(model_id: str, why: str = "the trainer that held it is gone") -> DataLoss:
    """The error of a model whose state is gone."""
    return DataLoss(
        f"model {model_id} is lost ({why}); create it again from a checkpoint",
        Reason.MODEL_LOST,
        metadata={"model_id": model_id},
    )


def model_not_found(model_id: str) -> NotFound:
    """The error of an id that names no model."""
    return NotFound(f"no model {model_id!r}", Reason.MODEL_NOT_FOUND)


def call_poisoned(attempts: int, why: str) -> FailedPrecondition:
    """The error of a call that ended the ranks too often."""
    return FailedPrecondition(
        f"the trainer failed {attempts} times during this call; it is not tried again and changed "
        f"nothing of the model ({why})",
        Reason.CALL_POISONED,
        metadata={"attempts": str(attempts)},
    )
