"""Servers with TLS, in the process of a test, and what connects to them."""

import asyncio
import contextlib
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.config import CheckpointConfig, SamplerConfig, TrainingConfig
from tinsmithd.sampler.server import SamplerServer
from tinsmithd.training.server import TrainingServer

LOOPBACK = "127.0.0.1:0"


def checkpoint(folder: Path, **settings: Any) -> CheckpointServer:
    given = {"listen_address": LOOPBACK, "stop_grace_s": 1, "data_folder": str(folder / "blobs")}
    return CheckpointServer(CheckpointConfig(**{**given, **settings}))


def training(folder: Path, **settings: Any) -> TrainingServer:
    given = {"listen_address": LOOPBACK, "link_address": LOOPBACK, "stop_grace_s": 1}
    given |= {"data_folder": str(folder / "journal"), "checkpoint_target": "127.0.0.1:1"}
    return TrainingServer(TrainingConfig(**{**given, **settings}))


def sampling(folder: Path, **settings: Any) -> SamplerServer:
    given = {"listen_address": LOOPBACK, "base_model": str(folder), "stop_grace_s": 1}
    return SamplerServer(SamplerConfig(**{**given, **settings}))


SERVERS: Mapping[str, Callable[..., Any]] = {
    "checkpoint": checkpoint,
    "training": training,
    "sampler": sampling,
}


@contextlib.asynccontextmanager
async def serving(server: Any) -> AsyncIterator[Any]:
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def health(port: int, credentials: grpc.ChannelCredentials | None) -> str:
    """The code of a health check, "OK" where it was answered; one connection, one attempt."""
    target = f"localhost:{port}"
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = (
        grpc.aio.insecure_channel(target, options=options)
        if credentials is None
        else grpc.aio.secure_channel(target, credentials, options=options)
    )
    async with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "OK"


async def silent(port: int, first: bytes = b"") -> Any:
    """A connection that says no more than that, and reads until it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first)

    async def until_closed() -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    return asyncio.create_task(until_closed())


def serial_at(port: int, ca: Path) -> str:
    """The serial number of what a port shows to a new connection."""
    context = ssl.create_default_context(cafile=ca)
    with (
        socket.create_connection(("127.0.0.1", port), 60) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        return str((secure.getpeercert() or {})["serialNumber"])


def fetched(url: str, ca: Path) -> tuple[int, str]:
    """Status and text of a page."""
    context = ssl.create_default_context(cafile=ca)
    try:
        with urllib.request.urlopen(url, timeout=60, context=context) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
