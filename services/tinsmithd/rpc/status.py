"""The one table from domain errors to gRPC statuses, and back for server-to-server calls."""

from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from tinsmithd import errors
from tinsmithd.errors import Reason, TinsmithError

_CODES: dict[type[TinsmithError], int] = {
    errors.InvalidArgument: code_pb2.INVALID_ARGUMENT,
    errors.NotFound: code_pb2.NOT_FOUND,
    errors.AlreadyExists: code_pb2.ALREADY_EXISTS,
    errors.FailedPrecondition: code_pb2.FAILED_PRECONDITION,
    errors.ResourceExhausted: code_pb2.RESOURCE_EXHAUSTED,
    errors.Unavailable: code_pb2.UNAVAILABLE,
    errors.DataLoss: code_pb2.DATA_LOSS,
    errors.Internal: code_pb2.INTERNAL,
}
_CLASSES = {code: cls for cls, code in _CODES.items()}
DOMAIN = "tinsmith"
DETAILS_KEY = "grpc-status-details-bin"


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


def from_rpc_error(error: grpc.RpcError, unreachable: Reason) -> TinsmithError:
    """Read another Tinsmith server's error, so that it can be raised here as the same class.

    Args:
        error: What a stub raised.
        unreachable: Reason to give when the server did not answer at all.
    """
    status = None
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == DETAILS_KEY:
            status = status_pb2.Status.FromString(value)
    if status is None:
        code = error.code() if hasattr(error, "code") else None
        server = unreachable.removesuffix("_UNAVAILABLE").capitalize()
        text = (
            f"the {server} server does not answer ({code.name if code else type(error).__name__})"
        )
        return errors.Unavailable(text, unreachable, retry_after_s=1.0)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, retry):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    cls = _CLASSES.get(status.code, errors.Internal)
    if cls is errors.Internal or info.domain != DOMAIN or info.reason not in set(Reason):
        return errors.Internal()
    kept = {k: v for k, v in info.metadata.items() if k not in ("request_id", "field")}
    if cls is errors.InvalidArgument:
        rebuilt: TinsmithError = errors.InvalidArgument(
            "", status.message, Reason(info.reason), metadata=kept
        )
    else:
        rebuilt = cls(status.message, Reason(info.reason), metadata=kept)
    rebuilt.field = info.metadata.get("field", "")
    if retry.HasField("retry_delay"):
        rebuilt.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return rebuilt


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message, deterministic=True)
    return packed
