"""What goes wrong, as one sentence, a hint, and an exit status. The statuses are in docs/cli.md."""

from collections.abc import Mapping
from dataclasses import dataclass

from tinsmith.errors import (
    AlreadyExistsError,
    APIConnectionError,
    AuthenticationError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    TinsmithError,
    UnimplementedError,
)

DONE, WRONG, USAGE, AWAY, ABSENT, STATE, FORBIDDEN = range(7)
"""0: done. 1: it failed, or what was looked at is not well. 2: the command line, or an argument of
the call. 3: nobody answers. 4: there is no such thing. 5: not in this state, or a limit is reached.
6: no key, or one that may not."""
INTERRUPTED, BROKEN_PIPE = 130, 141
"""128 and the number of the signal, as shells have it."""


@dataclass(frozen=True)
class Failure:
    """What a person, or a program with `--json`, is told.

    Attributes:
        message: One sentence.
        hint: What to do about it; may be empty.
        status: The exit status.
        reason: Name of the cause in docs/errors.md; may be empty.
        field: The argument that is to blame; may be empty.
        request_id: What the server's log calls it; may be empty.
    """

    message: str
    hint: str = ""
    status: int = WRONG
    reason: str = ""
    field: str = ""
    request_id: str = ""


class Failed(Exception):
    """A command cannot go on; carries its `Failure`."""

    def __init__(self, message: str, hint: str = "", status: int = WRONG) -> None:
        super().__init__(message)
        self.failure = Failure(message, hint, status)


_STATUSES: Mapping[type[TinsmithError], int] = {
    InvalidArgumentError: USAGE,
    APIConnectionError: AWAY,
    NotFoundError: ABSENT,
    AlreadyExistsError: STATE,
    FailedPreconditionError: STATE,
    RateLimitError: STATE,
    AuthenticationError: FORBIDDEN,
    PermissionDeniedError: FORBIDDEN,
    UnimplementedError: WRONG,
}
_HINTS: Mapping[str, str] = {
    "MODEL_NOT_FOUND": "`tinsmith models ls` lists those that there are",
    "CHECKPOINT_NOT_FOUND": "`tinsmith checkpoints ls` lists those that there are",
    "BASE_MODEL_NOT_FOUND": "`tinsmith status` names those that are served",
    "CHECKPOINT_EXISTS": "choose another name, or delete that one first",
    "WRONG_CHECKPOINT_KIND": "only checkpoints of kind sampler are sampled from; "
    "`tinsmith checkpoints ls --kind sampler` lists them",
    "STORAGE_FULL": "`tinsmith checkpoints ls` shows what takes room, `rm` and `ttl` make some",
    "FORKED": "",
}
_AWAY_HINT = (
    "`tinsmith up` starts a cluster here, `--address` or TINSMITH_ADDRESS names another one; "
    "`tinsmith doctor` looks for what is wrong"
)
_LAST = "last error: UNKNOWN: "


def failure_of(error: TinsmithError, address: str) -> Failure:
    """What to tell of a call that failed.

    Args:
        error: How.
        address: Of the cluster.
    """
    status = next((s for kind, s in _STATUSES.items() if isinstance(error, kind)), WRONG)
    message, hint = error.message, _HINTS.get(error.reason, "")
    if status == AWAY and not error.reason:
        why = message.rpartition(_LAST)[2].strip()
        message, hint = f"{address} does not answer: {why}", _AWAY_HINT
    elif status == FORBIDDEN and not hint:
        hint = "TINSMITH_API_KEY holds the key that is sent"
    elif status == WRONG and error.request_id:
        hint = f"the server's log says more under request id {error.request_id}"
    return Failure(message, hint, status, error.reason, error.field, error.request_id)
