"""Reads what a server says when it refuses."""

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from tinsmith.internal.v1.trainer_link_service_pb2 import Failed
from tinsmith.status import status_of
from tinsmithd.errors import TinsmithError
from tinsmithd.rpc.status import from_status


def reason_and_field(error: grpc.RpcError) -> tuple[str, str]:
    """ErrorInfo's reason and BadRequest's field of an error; fails the test where there is none."""
    status = rpc_status.from_call(error) if isinstance(error, grpc.Call) else _from_aio(error)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for message in (info, bad):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    assert info.domain == "tinsmith", f"no ErrorInfo in {error}"
    assert info.metadata["request_id"]
    assert "Traceback" not in status.message
    return info.reason, bad.field_violations[0].field if bad.field_violations else ""


def _from_aio(error: grpc.RpcError) -> Status:
    status = status_of(error)
    assert status is not None, f"{error.code()} has no details: {error.details()}"
    return status


def error_in(failed: Failed) -> TinsmithError:
    """The error that a rank says; fails the test where it is none of ours."""
    error = from_status(Status.FromString(failed.status))
    assert error is not None, failed
    return error


def limit_values(limits: Message) -> dict[str, float]:
    """Every limit that a service names, spans of time in seconds; what is unsaid is 0."""
    return {
        field.name: value if field.message_type is None else value.ToNanoseconds() / 1e9
        for field in limits.DESCRIPTOR.fields
        for value in [getattr(limits, field.name)]
    }


OF_TENANTS = "tenant_"
"""What limits of tenants begin with: 0 is none of these."""


def unlimited(limits: Message) -> list[str]:
    """Limits that are 0, but for those of tenants."""
    found = limit_values(limits).items()
    return [name for name, value in found if value <= 0 and not name.startswith(OF_TENANTS)]
