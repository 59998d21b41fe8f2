"""What may be stored: the files of a state, checked. Nothing that runs when it is read."""

from collections.abc import Collection, Sequence

from tinsmithd.checkpoint.store import Staging
from tinsmithd.domain import CheckpointKind, Tuning
from tinsmithd.errors import InvalidArgument, Reason
from tinsmithd.state import files as state_files
from tinsmithd.state.checks import StateInvalid


def check_file_name(field: str, name: str, kind: CheckpointKind, tuning: Tuning) -> None:
    """Refuse a file that a checkpoint of this kind does not have.

    Args:
        field: Where the name came.
        name: That of the file.
        kind: As the header says.
        tuning: As the header says.

    Raises:
        InvalidArgument: See above (INVALID_NAME).
    """
    allowed = [*state_files.required_files(tuning), *state_files.optional_files(tuning)]
    if kind is CheckpointKind.TRAINING:
        # Absent where no step was made yet.
        allowed.append(state_files.OPTIMIZER_FILE)
    if name not in allowed:
        message = f"a {kind} checkpoint has {', '.join(allowed)}, not {name[:100]!r}"
        raise InvalidArgument(field, message, Reason.INVALID_NAME)


def followed_names(kind: CheckpointKind, tuning: Tuning) -> Sequence[str]:
    """The files of a checkpoint that may be large, in the order in which they are written."""
    weights, _, _ = state_files.required_files(tuning)
    return [weights, *[state_files.OPTIMIZER_FILE] * (kind is CheckpointKind.TRAINING)]


def check_length(field: str, name: str, size_bytes: int) -> None:
    """Refuse bytes that make a file longer than one of its name may be.

    Args:
        field: Where they came.
        name: That of the file.
        size_bytes: Its length.

    Raises:
        InvalidArgument: See above (LIMIT_EXCEEDED).
    """
    most = state_files.bytes_max(name)
    if most is not None and size_bytes > most:
        message = f"{name} has more than {most} bytes"
        metadata = {"limit": "bytes", "value": str(size_bytes)}
        raise InvalidArgument(field, message, Reason.LIMIT_EXCEEDED, metadata=metadata)


def check_files(
    staging: Staging,
    names: Collection[str],
    kind: CheckpointKind,
    tuning: Tuning,
    step_count: int,
) -> None:
    """Refuse files that are not what their names and the checkpoint's header say.

    Args:
        staging: Has them.
        names: Those of all of them.
        kind: As the header says.
        tuning: As the header says.
        step_count: As the header says.

    Raises:
        InvalidArgument: A file is wrong; `field` says which, and where in it.
    """
    try:
        about = state_files.parse(names, staging.open, tuning).about
        if about.step_count != step_count:
            message = f"{about.step_count}, but the header says {step_count}"
            raise StateInvalid(state_files.STATE_FILE, "step_count", message)
        if kind is CheckpointKind.TRAINING and about.has_optimizer != (step_count > 0):
            message = f"it is {about.has_optimizer} after {step_count} steps"
            raise StateInvalid(state_files.STATE_FILE, "has_optimizer", message)
    except StateInvalid as error:
        raise _refusal(error) from error


def _refusal(error: StateInvalid) -> InvalidArgument:
    separator = "." if error.field and not error.field.startswith("[") else ""
    field = f'commit.files["{error.file}"]{separator}{error.field}'
    return InvalidArgument(field, error.message, error.reason, metadata=error.metadata)
