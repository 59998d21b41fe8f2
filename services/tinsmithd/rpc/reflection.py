"""Server reflection that also answers for methods.

grpcio's servicer finds a service, message, enum or field by name but not a method, so that
`grpcurl describe pkg.Service.Method` fails. This one asks again with the last component cut off:
the file that declares the service declares its methods.
"""

from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2 import (
    ServerReflectionRequest,
    ServerReflectionResponse,
)

SERVICE_NAME: str = reflection.SERVICE_NAME


class ReflectionServicer(reflection.aio.ReflectionServicer):  # type: ignore[misc]  # untyped base
    """grpcio's reflection, with method symbols."""

    def _file_containing_symbol(
        self, request: ServerReflectionRequest, fully_qualified_name: str
    ) -> ServerReflectionResponse:
        answer = super()._file_containing_symbol(request, fully_qualified_name)
        parent, _, method = fully_qualified_name.rpartition(".")
        if not answer.HasField("error_response") or not parent:
            return answer
        try:
            service = descriptor_pool.Default().FindServiceByName(parent)
        except KeyError:
            return answer
        if method not in service.methods_by_name:
            return answer
        return super()._file_containing_symbol(request, parent)


def add_reflection(server: grpc.aio.Server, service_names: list[str]) -> None:
    """Serve reflection for the named services and for itself."""
    names: Any = (*service_names, SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(names), server)
