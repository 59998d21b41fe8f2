"""Connections that say nothing, or nothing more than HTTP/2 asks, by the thousand."""

import resource
import socket
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

import checkpoints
from attack.harness import target_of, watching
from attack.raw import Peer
from attack.test_streams import OTHER_HOST, call_from, until
from faults.processes import Process
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub


def test_silent_connections_are_closed_and_leave_room(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """1,000 that say nothing and 2,000 that say no more than HTTP/2 asks, at a server that was
    given 256 descriptors but may take more: it does, others are served, all are had back."""
    folder = tmp_path_factory.mktemp("connections")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    settings = {"data_folder": folder / "data", "handshake_s_max": 1, "connection_idle_s_max": 2}
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        running = stack.enter_context(Process("checkpoint", folder, settings))
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for our own ends
        limits = Path(f"/proc/{running.pid}/limits").read_text()
        opens = next(line for line in limits.splitlines() if line.startswith("Max open files"))
        assert opens.split()[3:5] == [str(hard), str(hard)]
        assert running.says(f"may open {hard} files and connections (was {min(256, hard)})")
        files = Path(f"/proc/{running.pid}/fd")
        before = len(list(files.iterdir()))
        target = target_of("checkpoint", running)
        with watching([target]):
            # More at once only shows how fast the kernel hands them over, one after the other.
            for _ in range(min(1000, hard // 4)):
                stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
            for _ in range(min(2000, hard // 4)):
                stack.enter_context(Peer(target.address))
            assert call_from(target.address, OTHER_HOST) < 10
            until(lambda: len(list(files.iterdir())) <= before + 8)


def test_connections_beyond_what_a_server_takes_leave_its_own_files_alone(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A checkpoint is written while every connection is taken: those leave descriptors to it."""
    folder = tmp_path_factory.mktemp("few")
    settings = {"data_folder": folder / "data", "connections_max": 20}
    with Process("checkpoint", folder, settings) as running, ExitStack() as stack:
        target = target_of("checkpoint", running)
        with grpc.insecure_channel(target.address) as channel:
            stub = CheckpointServiceStub(channel)
            stub.ListCheckpoints(pb.ListCheckpointsRequest())
            for _ in range(60):
                stack.enter_context(Peer(target.address))
            until(lambda: len(list(Path(f"/proc/{running.pid}/fd").iterdir())) >= 20)
            stub.WriteCheckpoint(checkpoints.messages(checkpoints.PATH, checkpoints.files()))
        assert len(list(Path(f"/proc/{running.pid}/fd").iterdir())) < 60
