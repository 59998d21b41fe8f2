"""Errors of calls and models that several rooms raise in the same words."""

from tinsmithd.errors import (
    DataLoss,
    FailedPrecondition,
    NotFound,
    Reason,
    Unavailable,
)
from tinsmithd.owners import public_id


def shutting_down() -> Unavailable:
    """The error of a call that this process cannot finish."""
    return Unavailable("the server stops", Reason.SHUTTING_DOWN, retry_after_s=1.0)


def model_lost(model_id: str, why: str = "the rank group that held it is gone") -> DataLoss:
    """The error of a model whose state is gone."""
    model_id = public_id(model_id)
    error = DataLoss(
        f"model {model_id} is lost ({why}); create it again from a checkpoint",
        Reason.MODEL_LOST,
        metadata={"model_id": model_id},
    )
    error.logged = why
    return error


def model_not_found(model_id: str) -> NotFound:
    """The error of an id that names no model: there is none, or none for the caller."""
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


def model_restored(seq_id: int, next_seq_id: int) -> FailedPrecondition:
    """The error of a number of before the back-up from which its model goes on."""
    return FailedPrecondition(
        f"the cluster was restored from a back-up, and seq_id {seq_id} is from before that: its "
        "effect may be lost; attach anew (get_training_client) to go on from the back-up's state, "
        "or create a model from a checkpoint",
        Reason.MODEL_RESTORED,
        metadata={"seq_id": str(seq_id), "next_seq_id": str(next_seq_id)},
    )
