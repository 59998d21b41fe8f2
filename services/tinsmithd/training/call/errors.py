"""Errors of calls and models that several rooms raise in the same words."""

from tinsmithd.errors import (
    DataLoss,
    FailedPrecondition,
    NotFound,
    Reason,
    Unavailable,
)


def shutting_down() -> Unavailable:
    """The error of a call that this process cannot finish."""
    return Unavailable("the server stops", Reason.SHUTTING_DOWN, retry_after_s=1.0)


def model_lost(model_id: str, why: str = "the rank group that held it is gone") -> DataLoss:
    """The error of a model whose state is gone."""
    return DataLoss(
        f"model {model_id} is lost ({why}); create it again from a checkpoint",
        Reason.MODEL_LOST,
        metadata={"model_id": model_id},
    )


def model_not_found(model_id: str) -> NotFound:
    """The error of an id that names no model."""
    return NotFound(f"no model {model_id!r}", Reason.MODEL_NOT_FOUND)


def call_not_found(seq_id: int, next_seq_id: int) -> NotFound:
    """The error of a number under which there is no call: nobody sent it, or it had no effect."""
    return NotFound(
        f"no call with seq_id {seq_id} was taken in; send the call itself",
        Reason.CALL_NOT_FOUND,
        metadata={"seq_id": str(seq_id), "next_seq_id": str(next_seq_id)},
    )


def call_poisoned(attempts: int, why: str) -> FailedPrecondition:
    """The error of a call that ended the ranks too often."""
    return FailedPrecondition(
        f"the ranks failed {attempts} times during this call; it is not tried again and changed "
        f"nothing of the model ({why})",
        Reason.CALL_POISONED,
        metadata={"attempts": str(attempts)},
    )
