"""`python -m tinsmithd.rpc.probe`: health as an exit status."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from tinsmith.v1 import checkpoint_service_pb2
from tinsmithd.config import ServerConfig
from tinsmithd.rpc import probe
from tinsmithd.rpc.server import RpcServer

SERVICE = checkpoint_service_pb2.DESCRIPTOR.services_by_name["CheckpointService"].full_name
PATIENT = "--seconds=60"
"""For an answer that comes, be it late."""


@pytest.fixture
async def server() -> AsyncIterator[RpcServer]:
    running = RpcServer(ServerConfig(listen_address="127.0.0.1:0"), SERVICE)
    await running.start()
    yield running
    await running.stop()


async def status(server: RpcServer, *arguments: str) -> int:
    command = [f"127.0.0.1:{server.port}", *arguments, PATIENT]
    return await asyncio.to_thread(probe.main, command)


async def test_it_says_what_health_says(
    server: RpcServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that loads is alive and not ready."""
    assert await status(server) == 0
    assert await status(server, SERVICE) == 1
    assert f"{SERVICE} is NOT_SERVING" in capsys.readouterr().err
    await server.set_serving(True)
    assert await status(server, SERVICE) == 0
    assert await status(server, "no.such.Service") == 1
    assert "NOT_FOUND" in capsys.readouterr().err


async def test_a_server_that_does_not_answer_is_not_alive(
    server: RpcServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether nobody listens there, or whoever does says nothing in time."""
    silent = await asyncio.start_server(lambda *_: asyncio.sleep(60), "127.0.0.1", 0)
    address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    assert await asyncio.to_thread(probe.main, [address, "--seconds=0.3"]) == 1
    assert "DEADLINE_EXCEEDED" in capsys.readouterr().err
    silent.close()
    await server.stop()
    assert await status(server) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


async def test_it_speaks_tls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It knows the server by the authority that it is given, and by that alone."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the probe's TLS was NOT tried: no openssl")
    ours, other = (_certificate(openssl, tmp_path / name) for name in ("ours", "other"))
    credentials = grpc.ssl_server_credentials([(ours[1].read_bytes(), ours[0].read_bytes())])
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    address = f"localhost:{server.add_secure_port('127.0.0.1:0', credentials)}"
    await server.start()
    for arguments, expected in (([f"--ca={ours[0]}"], 0), ([f"--ca={other[0]}"], 1), ([], 1)):
        command = [address, PATIENT, *arguments]
        assert await asyncio.to_thread(probe.main, command) == expected
    assert await asyncio.to_thread(probe.main, [address, "--ca=/absent.pem"]) == 1
    assert "/absent.pem" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        probe.main([address, f"--key={ours[1]}"])
    await server.stop(None)


def _certificate(openssl: str, folder: Path) -> tuple[Path, Path]:
    """A certificate of localhost that is its own authority, and its key."""
    folder.mkdir()
    certificate, key = folder / "tls.crt", folder / "tls.key"
    command = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *command], check=True, capture_output=True, timeout=120)
    return certificate, key


async def test_as_a_command_it_imports_little(server: RpcServer) -> None:
    """It runs every few seconds: no settings, no server, no numpy."""
    program = (
        "import sys\nfrom tinsmithd.rpc import probe\n"
        f"status = probe.main(['127.0.0.1:{server.port}', '{PATIENT}'])\n"
        "heavy = {'pydantic', 'numpy', 'torch', 'tinsmith', 'cryptography'}\n"
        "print(status, sorted(heavy & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", program]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "[]"], done.stdout + done.stderr
