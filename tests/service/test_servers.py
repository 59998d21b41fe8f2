"""What all servers have outside: health, reflection, channelz, a graceful stop, strict settings."""

import hashlib
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import programs
from clusters import RunningCluster
from tinsmith.v1 import checkpoint_service_pb2, checkpoint_service_pb2_grpc
from tinsmithd.checkpoint.store.spool import KEPT_BYTES

SERVICES = {
    "training": ("tinsmith.v1.TrainingService", "ForwardBackward"),
    "sampler": ("tinsmith.v1.SamplerService", "Sample"),
    "checkpoint": ("tinsmith.v1.CheckpointService", "ReadCheckpoint"),
}


@pytest.fixture(params=SERVICES)
def server(cluster: RunningCluster, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Name and address of each server."""
    return request.param, cluster.addresses[request.param]


def reflect(address: str, **request: str) -> reflection_pb2.ServerReflectionResponse:
    with grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(**request)
        return next(iter(stub.ServerReflectionInfo(iter([asked]))))


def test_health_is_answered_per_service(server: tuple[str, str]) -> None:
    """The empty name is the process, the service's name is the service, others are unknown."""
    name, address = server
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICES[name][0]):
            found = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
            assert found.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refusal:
            stub.Check(health_pb2.HealthCheckRequest(service="absent"), timeout=60)
        assert refusal.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_and_describes_services_and_methods(server: tuple[str, str]) -> None:
    """`grpcurl list` and `grpcurl describe`, of methods and messages too."""
    name, address = server
    service, method = SERVICES[name]
    listed = reflect(address, list_services="").list_services_response.service
    assert service in {entry.name for entry in listed}
    for symbol in (service, f"{service}.{method}", "tinsmith.v1.Tensor", "tinsmith.v1.Tensor.ints"):
        answer = reflect(address, file_containing_symbol=symbol)
        files = answer.file_descriptor_response.file_descriptor_proto
        assert files, symbol
        assert FileDescriptorProto.FromString(files[0]).package == "tinsmith.v1"
    for symbol in (f"{service}.Absent", "absent"):
        answer = reflect(address, file_containing_symbol=symbol)
        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_channelz_is_on(server: tuple[str, str]) -> None:
    """A live server can be looked into."""
    with grpc.insecure_channel(server[1]) as channel:
        stub = channelz_pb2_grpc.ChannelzStub(channel)
        assert stub.GetServers(channelz_pb2.GetServersRequest(), timeout=60).server


def variables_of(name: str, **settings: str) -> dict[str, str]:
    """What gives a server its settings."""
    return {f"TINSMITH_{name.upper()}_{key.upper()}": value for key, value in settings.items()}


def refused(name: str, folder: Path, **settings: str) -> str:
    """What a server says that does not start."""
    done = programs.run(f"tinsmithd.{name}", folder=folder, **variables_of(name, **settings))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_an_unknown_setting_stops_a_server(name: str, tmp_path: Path) -> None:
    """One line that names the key, no stack trace, an exit status that is not 0."""
    error = refused(name, tmp_path, base_modle="x")
    assert f"TINSMITH_{name.upper()}_BASE_MODLE: unknown key" in error


def test_a_taken_port_is_one_line(cluster: RunningCluster, tmp_path: Path) -> None:
    """No stack trace, and the address."""
    taken = cluster.addresses["checkpoint"]
    settings = {"listen_address": taken, "link_address": "127.0.0.1:0"}
    assert f"cannot listen on {taken}" in refused("training", tmp_path, **settings)


def test_sigterm_lets_calls_finish(tmp_path: Path) -> None:
    """A write that is under way is answered; new calls are not taken; the process ends with 0."""
    content = b"{}".ljust(KEPT_BYTES + 1)  # more than stays in memory until the commit
    port_file = tmp_path / "port"
    settings = {
        "listen_address": "127.0.0.1:0",
        "data_folder": str(tmp_path / "data"),
        "port_file": str(port_file),
    }
    env = programs.variables(**variables_of("checkpoint", **settings))
    with (
        programs.Logged(tmp_path / "log", "tinsmithd.checkpoint", env=env) as process,
        grpc.insecure_channel(f"127.0.0.1:{process.port_in(port_file)}") as channel,
    ):
        stub = checkpoint_service_pb2_grpc.CheckpointServiceStub(channel)
        stub.ListCheckpoints(checkpoint_service_pb2.ListCheckpointsRequest(), timeout=60)

        def requests() -> Iterator[checkpoint_service_pb2.WriteCheckpointRequest]:
            header = checkpoint_service_pb2.WriteCheckpointHeader(
                checkpoint_path="tinsmith://run/weights/one", base_model="tiny"
            )
            yield checkpoint_service_pb2.WriteCheckpointRequest(header=header)
            piece = checkpoint_service_pb2.CheckpointPiece(
                file_name="adapter_config.json", data=content, crc32=zlib.crc32(content)
            )
            yield checkpoint_service_pb2.WriteCheckpointRequest(piece=piece)
            # Sent is not yet received, and a call that the server has not seen would be a new one.
            while not any((tmp_path / "data" / "staging").iterdir()):
                time.sleep(0.01)
            process.signal(signal.SIGTERM)
            time.sleep(0.5)
            file = checkpoint_service_pb2.CheckpointFile(
                name="adapter_config.json",
                size_bytes=len(content),
                sha256=hashlib.sha256(content).digest(),
            )
            commit = checkpoint_service_pb2.WriteCheckpointCommit(files=[file])
            yield checkpoint_service_pb2.WriteCheckpointRequest(commit=commit)

        with pytest.raises(grpc.RpcError) as refusal:
            stub.WriteCheckpoint(requests(), timeout=60)
        # Its own answer (no adapter among the files), not that of a connection that was cut.
        assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert process.wait() == 0
