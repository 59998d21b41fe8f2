"""What a call can fail with.

TinsmithError
├─ InvalidArgumentError    the call is wrong (also a ValueError); `field` says where
├─ NotFoundError           there is no such thing
├─ AlreadyExistsError      the name is taken
├─ FailedPreconditionError right call, wrong state
├─ ResourceExhaustedError  a limit is reached
├─ UnavailableError        the service did not answer for as long as the client tried
├─ DataLossError           state is gone or damaged
├─ UnimplementedError      the service does not know this call
└─ InternalError           a fault of the service; its log has `request_id`
"""

from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class TinsmithError(Exception):
    """A call failed.

    Attributes:
        reason: Name of the cause, as in the `ErrorReason` enum without its prefix; may be empty.
        field: The field of the request that is to blame; may be empty.
        request_id: What the server's log calls this failure; may be empty.
        code: The gRPC status code, or None for what the client itself found.
        retry_after_s: Seconds after which the same call can succeed, where the server says so.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        field: str = "",
        request_id: str = "",
        code: grpc.StatusCode | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.request_id = request_id
        self.code = code
        self.retry_after_s = retry_after_s


class InvalidArgumentError(TinsmithError, ValueError):
    """The call is wrong and always will be; `field` says where."""


class NotFoundError(TinsmithError):
    """There is no such model, checkpoint or base model."""


class AlreadyExistsError(TinsmithError):
    """The name is taken."""


class FailedPreconditionError(TinsmithError):
    """The call is right, the state it needs is not there."""


class ResourceExhaustedError(TinsmithError):
    """A limit is reached."""


class UnavailableError(TinsmithError, ConnectionError):
    """The service did not answer for as long as the client tried."""


class DataLossError(TinsmithError):
    """State is gone or damaged."""


class UnimplementedError(TinsmithError, NotImplementedError):
    """The service, or this client, does not do this."""


class InternalError(TinsmithError):
    """A fault of the service."""


# Tinker's names, so that `except tinker.RateLimitError` works. Connection failures and refusals
# are one family here, so the general names all mean the base class.
TinkerError = TinsmithError
APIError = TinsmithError
APIStatusError = TinsmithError
RequestFailedError = TinsmithError
APIConnectionError = UnavailableError
BadRequestError = InvalidArgumentError
UnprocessableEntityError = InvalidArgumentError
ConflictError = AlreadyExistsError
RateLimitError = ResourceExhaustedError
InternalServerError = InternalError


_CLASSES: dict[grpc.StatusCode, type[TinsmithError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: DataLossError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
}


def from_rpc_error(error: grpc.RpcError) -> TinsmithError:
    """What a stub raised, as one of the classes above. Works with sync and async stubs."""
    code: grpc.StatusCode = error.code()
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == _DETAILS_KEY:
            for detail in status_pb2.Status.FromString(value).details:
                for message in (info, retry):
                    if detail.Is(message.DESCRIPTOR):
                        detail.Unpack(message)
    delay: Duration = retry.retry_delay
    return _CLASSES.get(code, InternalError)(
        error.details() or code.name,
        reason=info.reason,
        field=info.metadata.get("field", ""),
        request_id=info.metadata.get("request_id", ""),
        code=code,
        retry_after_s=delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
    )


def unsupported(parameter: str, why: str) -> UnimplementedError:
    """The error for a part of Tinker's API that Tinsmith does not have."""
    return UnimplementedError(f"{parameter}: {why}", field=parameter)
