"""Reads what a server says when it refuses: one `google.rpc.Status`, wherever it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "tinsmith"
DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True)
class Refusal:
    """What a status says.

    Attributes:
        code: Number of the gRPC status code.
        message: For a person.
        reason: Name of the cause, as in the `ErrorReason` enum without its prefix; may be empty.
        domain: Who says so: `DOMAIN` where it is a Tinsmith server.
        field: The field of the request that is to blame; may be empty.
        request_id: What the server's log calls this failure; may be empty.
        metadata: What else the reason comes with.
        retry_after_s: Seconds after which the same call can succeed; None where it cannot.
    """

    code: int
    message: str
    reason: str
    domain: str
    field: str
    request_id: str
    metadata: Mapping[str, str]
    retry_after_s: float | None


def read_status(status: status_pb2.Status) -> Refusal:
    """Read a status with its details."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, retry):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    metadata = dict(info.metadata)
    delayed = retry.HasField("retry_delay")
    return Refusal(
        status.code,
        status.message,
        info.reason,
        info.domain,
        metadata.pop("field", ""),
        metadata.pop("request_id", ""),
        metadata,
        retry.retry_delay.ToNanoseconds() / 1e9 if delayed else None,
    )


def status_of(error: grpc.RpcError) -> status_pb2.Status | None:
    """The status in what a stub raised, sync or async; None where nobody wrote one."""
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == DETAILS_KEY:
            return status_pb2.Status.FromString(value)
    return None
