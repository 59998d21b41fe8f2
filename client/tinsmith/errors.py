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

from collections.abc import Mapping
from typing import Any, Literal

import grpc

from tinsmith.status import read_status, status_of


class TinsmithError(Exception):
    """A call failed.

    Attributes:
        message: What a person reads.
        reason: Name of the cause, as in the `ErrorReason` enum without its prefix; may be empty.
        field: The field of the request that is to blame; may be empty.
        request_id: What the server's log calls this failure; may be empty.
        code: The gRPC status code, or None for what the client itself found.
        retry_after_s: Seconds after which the same call can succeed, where the server says so.
        metadata: Values that the message also shows, such as `limit` and `value`.
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
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field
        self.request_id = request_id
        self.code = code
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        return self.message


TinkerError = TinsmithError


class RequestFailedError(TinsmithError):
    """A call failed on the service.

    Attributes:
        category: "user" where the call is to blame, "server" where the service is.
    """

    category: Literal["unknown", "server", "user"] = "unknown"

    def __init__(
        self,
        message: str,
        *args: Any,
        category: Literal["unknown", "server", "user"] | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message, *args, **details)
        self.category = type(self).category if category is None else category


class APIError(TinsmithError):
    """The service could not be reached, or refused.

    Attributes:
        request: What Tinker's programs give it; None in what this client raises.
        body: Likewise.
    """

    def __init__(
        self, message: str, request: Any = None, *, body: Any = None, **details: Any
    ) -> None:
        super().__init__(message, **details)
        self.request = request
        self.body = body


class APIConnectionError(APIError, ConnectionError):
    """Nobody answered."""

    def __init__(self, message: str = "Nobody answered.", **details: Any) -> None:
        super().__init__(message, **details)


class APITimeoutError(APIConnectionError):
    """Nobody answered in time."""

    def __init__(self, message: str = "Nobody answered in time.", **details: Any) -> None:
        super().__init__(message, **details)


class APIResponseValidationError(APIError):
    """An answer cannot be read."""

    def __init__(
        self,
        message: str = "The answer cannot be read.",
        *,
        response: Any = None,
        body: Any = None,
        **details: Any,
    ) -> None:
        super().__init__(message, body=body, **details)
        self.response = response
        self.status_code: int = getattr(response, "status_code", 500)


class APIStatusError(APIError):
    """The service refused.

    Attributes:
        status_code: The HTTP status that corresponds to the gRPC code.
        response: What Tinker's programs give it; None in what this client raises.
    """

    status_code: int = 500

    def __init__(
        self, message: str, response: Any = None, body: Any = None, **details: Any
    ) -> None:
        super().__init__(message, body=body, **details)
        self.response = response
        if type(self) is APIStatusError:
            self.status_code = getattr(response, "status_code", self.status_code)


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
    message = error.details() or code.name
    cls = _CLASSES.get(code, InternalError)
    status = status_of(error)
    if status is None:
        return cls(message, code=code)
    refusal = read_status(status)
    return cls(
        message,
        reason=refusal.reason,
        field=refusal.field,
        request_id=refusal.request_id,
        code=code,
        retry_after_s=refusal.retry_after_s,
        metadata=refusal.metadata,
    )


class ExperimentalWarning(FutureWarning):
    """A part of the API may still change."""


def unsupported(parameter: str, why: str) -> UnimplementedError:
    """The error for a part of Tinker's API that Tinsmith does not have."""
    return UnimplementedError(f"{parameter}: {why}", field=parameter)
