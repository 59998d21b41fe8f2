"""What each server of a cluster says of itself: whether it serves, its version, what it has."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from tinsmith._connection import CHECKPOINT, SAMPLER, TRAINING
from tinsmith._tls_trouble import trouble
from tinsmith.addresses import proxy_note
from tinsmith.channels import TlsFiles
from tinsmith.cli.access import Access
from tinsmith.cli.failures import failure_of
from tinsmith.cli.records import Record, base_model_record, word_of
from tinsmith.errors import TinsmithError, from_rpc_error
from tinsmith.v1 import checkpoint_service_pb2, sampler_service_pb2, training_service_pb2, types_pb2
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmith.v1.training_service_pb2_grpc import TrainingServiceStub

NAMES = {
    TRAINING: "tinsmith.v1.TrainingService",
    SAMPLER: "tinsmith.v1.SamplerService",
    CHECKPOINT: "tinsmith.v1.CheckpointService",
}
"""By which health knows the services."""
ASK_TIMEOUT_S = 5.0
SERVING, NOT_SERVING, UNREACHABLE = "serving", "not serving", "unreachable"


@dataclass
class Server:
    """One server.

    Attributes:
        service: `training`, `sampler` or `checkpoint`.
        address: Its `host:port`.
        health: `SERVING`, `NOT_SERVING`, `UNREACHABLE`, or another word of health's.
        version: Of its program; empty while it is not reached.
        engine: What computes; empty where nothing does.
        base_models: Those that it can be asked for now.
        answer_ms: How long it took to answer, milliseconds.
        problem: What is wrong, for a person; may be empty.
        reason: Its name in docs/errors.md; may be empty.
        capabilities: Its whole answer; None while it is not reached.
    """

    service: str
    address: str
    health: str = UNREACHABLE
    version: str = ""
    engine: str = ""
    base_models: list[Record] = field(default_factory=list)
    answer_ms: float = 0.0
    problem: str = ""
    reason: str = ""
    capabilities: Any = None

    def record(self) -> Record:
        """As `--json` has it."""
        keys = ("service", "address", "health", "version", "engine", "base_models", "problem")
        return {key: getattr(self, key) for key in keys} | {"answer_ms": round(self.answer_ms, 1)}


async def look_at(access: Access, service: str, address: str) -> Server:
    """Ask one server, which may not be there."""
    server = Server(service, address)
    try:
        channel = access.channel(address)
        begun_s = time.perf_counter()
        server.health = await health_of(channel, NAMES[service])
        server.answer_ms = 1000 * (time.perf_counter() - begun_s)
        await _read_capabilities(server, channel)
    except grpc.RpcError as error:
        failed = from_rpc_error(error)
        server.reason = failed.reason
        why = await asyncio.to_thread(trouble, failed.message, address, TlsFiles.of_environment())
        server.problem = why or failure_of(failed, address).message
        if note := proxy_note(address):
            server.problem += f" ({note})"
    except TinsmithError as error:
        server.problem = error.message
    return server


async def health_of(channel: grpc.aio.Channel, name: str) -> str:
    """What `grpc.health.v1` says of a service, as a word.

    Raises:
        grpc.RpcError: Nobody answers.
    """
    # Its messages are these two on the wire; the package that has them is the servers'.
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=StringValue.SerializeToString,
        response_deserializer=Int32Value.FromString,
    )
    response = await check(StringValue(value=name), timeout=ASK_TIMEOUT_S)
    words = {0: "unknown", 1: SERVING, 2: NOT_SERVING, 3: "unknown"}
    return words.get(response.value, str(response.value))


async def _read_capabilities(server: Server, channel: grpc.aio.Channel) -> None:
    stub: Any
    if server.service == TRAINING:
        stub, request = TrainingServiceStub(channel), training_service_pb2.GetCapabilitiesRequest()
    elif server.service == SAMPLER:
        stub = SamplerServiceStub(channel)
        request = sampler_service_pb2.SamplerServiceGetCapabilitiesRequest()  # type: ignore[assignment]
    else:
        stub = CheckpointServiceStub(channel)
        request = checkpoint_service_pb2.CheckpointServiceGetCapabilitiesRequest()  # type: ignore[assignment]
    found = await stub.GetCapabilities(request, timeout=ASK_TIMEOUT_S)
    server.capabilities, server.version = found, found.server_version
    if server.service != CHECKPOINT:
        server.engine = word_of(types_pb2.Engine, found.engine) if found.engine else ""
        server.base_models = [base_model_record(model) for model in found.base_models]
        if server.health != SERVING and not found.base_models:
            server.problem = "it is loading"


async def all_servers(access: Access) -> list[Server]:
    """Every server of a cluster, all asked at once.

    Raises:
        TinsmithError: The Training server, which knows the others, does not answer.
    """
    places = await access.places()
    return list(await asyncio.gather(*(look_at(access, *place) for place in places)))
