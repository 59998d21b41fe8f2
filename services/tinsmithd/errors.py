"""The vocabulary of failure: what a Tinsmith server can say no with, and why.

Rules raise one of these; `tinsmithd.rpc.status` is the only place that turns them into a gRPC
status. Each class is a gRPC status code's worth of meaning; `Reason` says exactly what happened,
and its rule (`error_reason.proto`) which class, metadata and delay go with it.

    TinsmithError
    ├─ InvalidArgument      the call is wrong and will always be; `field` names where
    ├─ Unauthenticated      nobody knows who calls
    ├─ PermissionDenied     the caller's key is not for that
    ├─ NotFound             the thing named does not exist (or is not the caller's)
    ├─ AlreadyExists        the name or number is taken by something else
    ├─ FailedPrecondition   right call, wrong state
    ├─ ResourceExhausted    a named limit is reached
    ├─ Unavailable          nothing was done
    └─ DataLoss             stored or held state is gone or damaged
"""

from collections.abc import Mapping

from tinsmithd.reasons import Reason as Reason
from tinsmithd.text import bounded, without_quoted

MESSAGE_BYTES_MAX = 600
FIELD_BYTES_MAX = 200
VALUE_BYTES_MAX = 100
METADATA_ENTRIES_MAX = 8
"""An error is sent in trailers, its message three times and its field twice. gRPC's clients begin
to refuse trailers of 8 KiB, and then the caller learns nothing."""


class TinsmithError(Exception):
    """A refusal with a reason.

    Text that a caller wrote may stand in any of it: all of it is escaped and cut here, before it
    can reach a log, a status or a journal.

    Args:
        message: One sentence for a person.
        reason: The machine-readable cause.
        field: Path of the offending request field, such as
            `data[3].loss_fn_inputs["weights"]`; empty when no field is to blame.
        retry_after_s: How long a caller should wait before the same call can succeed; None
            where waiting does not help.
        metadata: Values that the message also shows, for programs.

    Attributes:
        logged: What a log says of the cause, with nothing in it that a caller chose. Empty: the
            message where the server alone is to blame, and else nothing.
    """

    logged = ""

    def __init__(
        self,
        message: str,
        reason: Reason,
        *,
        field: str = "",
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.message = bounded(message, MESSAGE_BYTES_MAX)
        super().__init__(self.message)
        self.reason = reason
        self.field = field
        self.retry_after_s = retry_after_s
        entries = list((metadata or {}).items())[:METADATA_ENTRIES_MAX]
        self.metadata = {
            bounded(key, VALUE_BYTES_MAX): bounded(value, VALUE_BYTES_MAX) for key, value in entries
        }

    def for_log(self) -> str:
        """As logs have it: its caller alone hears what the caller wrote."""
        said = self.logged
        if not said and isinstance(self, Unavailable | ResourceExhausted | Internal):
            said = without_quoted(self.message)
        field = f" at {without_quoted(self.field)}" if self.field else ""
        return f"{self.reason}{field}: {said}" if said else f"{self.reason}{field}"

    @property
    def field(self) -> str:
        """Path of the field that is to blame; empty where there is none."""
        return self._field

    @field.setter
    def field(self, path: str) -> None:
        self._field = bounded(path, FIELD_BYTES_MAX)


class InvalidArgument(TinsmithError):
    """The request is malformed; `field` says where. Sending it again cannot help."""

    def __init__(
        self,
        field: str,
        message: str,
        reason: Reason = Reason.INVALID_FIELD,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        text = f"{field}: {message}" if field else message
        super().__init__(text, reason, field=field, metadata=metadata)


def rebuilt(
    cls: type[TinsmithError],
    message: str,
    reason: Reason,
    *,
    field: str,
    retry_after_s: float | None,
    metadata: Mapping[str, str],
) -> TinsmithError:
    """An error that was said or written down before, as the one that it was.

    Args:
        cls: Its class.
        message: Its whole message, which begins with the field where there is one.
        reason: Its reason.
        field: Its field.
        retry_after_s: Its delay.
        metadata: Its metadata.
    """
    error: TinsmithError
    if cls is Internal:
        return Internal(message)
    if cls is InvalidArgument:
        error = InvalidArgument("", message, reason, metadata=metadata)
        error.retry_after_s = retry_after_s
    else:
        error = cls(message, reason, retry_after_s=retry_after_s, metadata=metadata)
    error.field = field
    return error


def quota_exceeded(limit: str, most: int, value: int, retry_after_s: float) -> "ResourceExhausted":
    """The refusal of a call that would take its tenant over a limit (QUOTA_EXCEEDED).

    Args:
        limit: Name of the limit, see `keys.LIMIT_NAMES`.
        most: What it is for this tenant.
        value: What there would be with the call.
        retry_after_s: When there may be room, seconds.
    """
    return ResourceExhausted(
        f"{limit} is {most} for this tenant, and would be {value}",
        Reason.QUOTA_EXCEEDED,
        retry_after_s=retry_after_s,
        metadata={"limit": limit, "value": str(value)},
    )


def over_limit(field: str, limit: str, value: int, most: int) -> InvalidArgument:
    """The refusal of a call that is over a named limit by itself (LIMIT_EXCEEDED).

    Args:
        field: What is too much, too many or too long.
        limit: Name of the limit.
        value: What there is.
        most: What is allowed.
    """
    return InvalidArgument(
        field,
        f"{value} is more than {limit} allows: {most}",
        Reason.LIMIT_EXCEEDED,
        metadata={"limit": limit, "value": str(value), "allowed": str(most)},
    )


class Unauthenticated(TinsmithError):
    """The caller shows no key, or none that is good."""


class PermissionDenied(TinsmithError):
    """The caller's key is not for calls of this kind, whatever they are about."""


class NotFound(TinsmithError):
    """The named thing does not exist, or the caller may not know that it does."""


class AlreadyExists(TinsmithError):
    """The name or number is already used with other content."""


class FailedPrecondition(TinsmithError):
    """The request is fine, the state it needs is not there."""


class ResourceExhausted(TinsmithError):
    """A named limit is reached. Nothing was done and the call's number is still free."""


class Unavailable(TinsmithError):
    """The server cannot do it now. Nothing was done and the call's number is still free."""


class DataLoss(TinsmithError):
    """State that was promised is gone or fails its digest."""


class Internal(TinsmithError):
    """A fault of the server itself. The cause is in its log under the request id."""

    def __init__(self, message: str = "internal error") -> None:
        super().__init__(message, Reason.INTERNAL)
