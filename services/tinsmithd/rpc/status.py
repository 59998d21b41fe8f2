"""The one table from domain errors to gRPC statuses, and back for server-to-server calls."""

import logging

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from tinsmith.status import DOMAIN, read_status, status_of
from tinsmithd import errors
from tinsmithd.errors import Reason, TinsmithError
from tinsmithd.reasons import RULES
from tinsmithd.rpc.channels import tls_hint

_CODES: dict[type[TinsmithError], int] = {
    errors.InvalidArgument: code_pb2.INVALID_ARGUMENT,
    errors.Unauthenticated: code_pb2.UNAUTHENTICATED,
    errors.PermissionDenied: code_pb2.PERMISSION_DENIED,
    errors.NotFound: code_pb2.NOT_FOUND,
    errors.AlreadyExists: code_pb2.ALREADY_EXISTS,
    errors.FailedPrecondition: code_pb2.FAILED_PRECONDITION,
    errors.ResourceExhausted: code_pb2.RESOURCE_EXHAUSTED,
    errors.Unavailable: code_pb2.UNAVAILABLE,
    errors.DataLoss: code_pb2.DATA_LOSS,
    errors.Internal: code_pb2.INTERNAL,
}
_CLASSES = {code: cls for cls, code in _CODES.items()}
RETRY_AFTER_S_MAX = 3600.0
"""Maximum delay that another process can ask for, seconds."""

_log = logging.getLogger(__name__)


def to_status(error: TinsmithError, request_id: str) -> status_pb2.Status:
    """Write an error as google.rpc.Status with ErrorInfo, BadRequest and RetryInfo."""
    metadata = {**error.metadata, "request_id": request_id}
    if error.field:
        metadata["field"] = error.field
    details = [
        error_details_pb2.ErrorInfo(reason=str(error.reason), domain=DOMAIN, metadata=metadata)
    ]
    packed = [_pack(d) for d in details]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        packed.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        packed.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    message = error.message
    if isinstance(error, errors.Internal):
        message = f"{message} (request id {request_id})"
    return status_pb2.Status(code=_CODES[type(error)], message=message, details=packed)


def from_status(status: status_pb2.Status) -> TinsmithError | None:
    """Read what `to_status` wrote; None where no Tinsmith server wrote it: the reason is unknown,
    or is one of another code."""
    refusal = read_status(status)
    cls = _CLASSES.get(status.code)
    if cls is None or refusal.domain != DOMAIN or refusal.reason not in set(Reason):
        return None
    reason = Reason(refusal.reason)
    if RULES[reason].status != code_pb2.Code.Name(status.code):
        return None
    if cls is errors.Internal:
        return errors.Internal()  # its message has the other server's request id
    delay_s = refusal.retry_after_s
    return errors.rebuilt(
        cls,
        refusal.message,
        reason,
        field=refusal.field,
        retry_after_s=None if delay_s is None else min(max(delay_s, 0.0), RETRY_AFTER_S_MAX),
        metadata=refusal.metadata,
    )


def from_rpc_error(error: grpc.RpcError, unreachable: Reason) -> TinsmithError:
    """Read another Tinsmith server's error, so that it can be raised here as the same class.

    Args:
        error: What a stub raised.
        unreachable: Reason to give when the server did not answer at all.
    """
    status = status_of(error)
    if status is None:
        code = error.code() if hasattr(error, "code") else None
        why = code.name if code else type(error).__name__
        if hint := tls_hint(error):
            why = f"{why}: {hint}"
        text = f"the {_server(unreachable)} server does not answer ({why})"
        return errors.Unavailable(text, unreachable, retry_after_s=1.0)
    found = from_status(status)
    if isinstance(found, errors.Unauthenticated | errors.PermissionDenied):
        # What is wrong is this process's key, and no caller's: calls wait until it is mended.
        text = f"the {_server(unreachable)} server takes no key of this one: {found.message}"
        _log.error("%s; look at cluster_key_file", text)
        return errors.Unavailable(text, unreachable, retry_after_s=1.0)
    return found or errors.Internal()


def _server(unreachable: Reason) -> str:
    return unreachable.removesuffix("_UNAVAILABLE").capitalize()


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message, deterministic=True)
    return packed
