"""What a call can fail with: the classes of Tinker's tree, and Tinsmith's own below them.

TinsmithError (TinkerError)
├─ RequestFailedError              a call was carried to the service and failed there
└─ APIError
   ├─ APIConnectionError           nobody answered
   │  ├─ APITimeoutError           not in time
   │  └─ UnavailableError          not for as long as the client tried
   └─ APIStatusError               refused, with `status_code`
      ├─ BadRequestError 400
      │  ├─ InvalidArgumentError   the call is wrong (also a ValueError); `field` says where
      │  └─ FailedPreconditionError  right call, wrong state
      ├─ AuthenticationError 401 ├─ BillingError 402 ├─ PermissionDeniedError 403
      ├─ NotFoundError 404         there is no such thing
      ├─ ConflictError 409
      │  └─ AlreadyExistsError     the name is taken
      ├─ UnprocessableEntityError 422
      ├─ RateLimitError 429
      │  └─ ResourceExhaustedError a limit is reached
      └─ InternalServerError 500
         ├─ DataLossError          state is gone or damaged
         ├─ UnimplementedError 501 the service, or this client, does not do this
         └─ InternalError          a fault of the service; its log has `request_id`

InvalidArgumentError, FailedPreconditionError, DataLossError and InternalError are also
RequestFailedErrors: that is what Tinker raises for a call that failed on the service.
"""

from typing import Any, Literal

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class TinsmithError(Exception):
    """A call failed.

    Attributes:
        message: What a person reads.
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
        self.message = message
        self.reason = reason
        self.field = field
        self.request_id = request_id
        self.code = code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


TinkerError = TinsmithError


class RequestFailedError(TinsmithError):
    """A call failed on the service.

    Attributes:
        category: "user" where the call is to blame, "server" where the service is.
    """

    category: Literal["unknown", "server", "user"] = "unknown"


class APIError(TinsmithError):
    """The service could not be reached, or refused."""

    request: None = None
    body: None = None


class APIConnectionError(APIError, ConnectionError):
    """Nobody answered."""


class APITimeoutError(APIConnectionError):
    """Nobody answered in time."""


class APIStatusError(APIError):
    """The service refused.

    Attributes:
        status_code: The HTTP status that corresponds to the gRPC code.
    """

    status_code: int = 500
    response: None = None


class BadRequestError(APIStatusError):
    """The call cannot be carried out as it is."""

    status_code = 400


class AuthenticationError(APIStatusError):
    """The service does not know the caller."""

    status_code = 401


class BillingError(APIStatusError):
    """Tinker's; never raised."""

    status_code = 402


class PermissionDeniedError(APIStatusError):
    """The caller may not do that."""

    status_code = 403


class NotFoundError(APIStatusError):
    """There is no such model, checkpoint or base model."""

    status_code = 404


class ConflictError(APIStatusError):
    """The call contradicts what is there."""

    status_code = 409


class UnprocessableEntityError(APIStatusError):
    """Tinker's; here a wrong call is InvalidArgumentError."""

    status_code = 422


class RateLimitError(APIStatusError):
    """Too much at once."""

    status_code = 429


class InternalServerError(APIStatusError):
    """The service is to blame."""


class InvalidArgumentError(BadRequestError, RequestFailedError, ValueError):
    """The call is wrong and always will be; `field` says where."""

    category = "user"


class UnknownInputError(InvalidArgumentError, KeyError):
    """A plain list in `loss_fn_inputs` under a name that says no dtype (Tinker's KeyError)."""


class FailedPreconditionError(BadRequestError, RequestFailedError):
    """The call is right, the state it needs is not there."""

    category = "user"


class AlreadyExistsError(ConflictError):
    """The name is taken."""


class ResourceExhaustedError(RateLimitError):
    """A limit is reached."""


class UnavailableError(APIConnectionError):
    """The service did not answer for as long as the client tried."""


class DataLossError(InternalServerError, RequestFailedError):
    """State is gone or damaged."""

    category = "server"


class UnimplementedError(InternalServerError, NotImplementedError):
    """The service, or this client, does not do this."""

    status_code = 501


class InternalError(InternalServerError, RequestFailedError):
    """A fault of the service."""

    category = "server"


_CLASSES: dict[grpc.StatusCode, type[TinsmithError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: DataLossError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: APITimeoutError,
    grpc.StatusCode.ABORTED: ConflictError,
    grpc.StatusCode.OUT_OF_RANGE: BadRequestError,
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
