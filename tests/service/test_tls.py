"""TLS between processes, through the wire: who is let in where, and how certificates change."""

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from certificates import Issued
from tinsmith import v1 as pb
from tinsmith.internal.v1 import trainer_link_service_pb2 as link_pb
from tinsmith.internal.v1.trainer_link_service_pb2_grpc import TrainerLinkServiceStub
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmithd.checkpoint_client import CheckpointClient, Patience
from tinsmithd.config import TrainingConfig
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import NotFound, Unavailable
from tinsmithd.keys import KeyFile, Scope
from tinsmithd.rpc import link_secret
from tinsmithd.rpc.auth import NO_KEY, ClusterKey
from tinsmithd.sampler import server as sampler
from tinsmithd.tls import of_cluster
from tls_servers import (
    LOOPBACK,
    SERVERS,
    checkpoint,
    health,
    serial_at,
    serving,
    silent,
    training,
)

pytestmark = pytest.mark.usefixtures("looks_at_once")
ABSENT = CheckpointPath.parse("tinsmith://nobody/weights/none")


@pytest.mark.parametrize("name", SERVERS)
async def test_a_server_refuses_plain_text(
    name: str, shown: Issued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has a certificate; health and reflection speak TLS as well."""
    monkeypatch.setattr(sampler, "load_engine", lambda _: None)  # of a model that takes long
    async with serving(SERVERS[name](tmp_path, **shown.settings("tls"))) as server:
        assert await health(server.port, None) == "UNAVAILABLE"
        assert await health(server.port, shown.credentials()) == "OK"
        stranger = Issued(tmp_path / "stranger")
        assert await health(server.port, stranger.credentials()) == "UNAVAILABLE"
        target = f"localhost:{server.port}"
        async with grpc.aio.secure_channel(target, shown.credentials()) as channel:
            ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
            call = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            found = (await call.read()).list_services_response.service
        assert any(each.name.startswith("tinsmith.v1.") for each in found)


async def test_callers_are_asked_for_a_certificate(shown: Issued, tmp_path: Path) -> None:
    """Where authorities are named: none and a foreign one are refused, whatever is asked for."""
    clients, stranger = Issued(tmp_path / "clients"), Issued(tmp_path / "stranger")
    settings = {**shown.settings("tls"), "tls_client_ca_file": str(clients.ca)}
    async with serving(checkpoint(tmp_path, **settings)) as server:
        assert await health(server.port, None) == "UNAVAILABLE"
        assert await health(server.port, shown.credentials()) == "UNAVAILABLE"
        assert await health(server.port, shown.credentials(stranger)) == "UNAVAILABLE"
        assert await health(server.port, shown.credentials(clients)) == "OK"


async def test_a_connection_that_says_nothing_is_closed(shown: Issued, tmp_path: Path) -> None:
    """Before its handshake, and in the midst of one, as without TLS."""
    settings = {**shown.settings("tls"), "handshake_s_max": 0.2}
    async with serving(checkpoint(tmp_path, **settings)) as server:
        halves = [await silent(server.port), await silent(server.port, b"\x16\x03\x01\x02\x00\x01")]
        await asyncio.gather(*halves)
        # Where there is little processor a true handshake may take longer than this, too.
        async with asyncio.timeout(60):
            while await health(server.port, shown.credentials()) != "OK":
                pass


async def test_a_program_of_others_speaks_with_it(shown: Issued, tmp_path: Path) -> None:
    """Reflection and a call, with the certificate that is asked for."""
    settings = {**shown.settings("tls"), "tls_client_ca_file": str(shown.ca)}
    async with serving(checkpoint(tmp_path, **settings)) as server:
        url = f"https://localhost:{server.port}"

        async def curl(*arguments: str) -> tuple[int, str]:
            trust = ("--protocol", "grpc", "--cacert", str(shown.ca))
            pair = ("--cert", str(shown.certificate), "--key", str(shown.key))
            process = await asyncio.create_subprocess_exec(
                *(Path(sys.executable).with_name("buf"), "curl", *trust, *pair, *arguments),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            out, _ = await process.communicate()
            return process.returncode or 0, out.decode()

        status, text = await curl("--list-services", url)
        assert (status, "tinsmith.v1.CheckpointService" in text) == (0, True), text
        method = f"{url}/tinsmith.v1.CheckpointService/GetCheckpoint"
        status, text = await curl("-d", f'{{"checkpointPath": "{ABSENT}"}}', method)
        assert (status, "no checkpoint" in text) == (8 * 5, True), text


async def get(client: CheckpointClient) -> str:
    """What comes of asking for a checkpoint that is not there."""
    try:
        await client.get(ABSENT)
    except NotFound:
        return "answered"
    except Unavailable as error:
        return error.message
    raise AssertionError


def client_of(
    issued: Issued, port: int, ca: Path | None = None, key: ClusterKey = NO_KEY
) -> CheckpointClient:
    """A server's client, with that server's own settings."""
    certificates_ = of_cluster(TrainingConfig(**issued.settings("cluster_tls", ca)))
    # By its address: of a name that has two of them an error tells of the last that was tried.
    return CheckpointClient(f"127.0.0.1:{port}", Patience(), key, certificates=certificates_)


async def test_servers_know_each_other_by_their_names(tmp_path: Path) -> None:
    """At the port that is theirs: a certificate, and a name of it, are asked for."""
    own = Issued(tmp_path / "own")
    known = Issued(tmp_path / "known", own.authority, ("spiffe://cluster/training",))
    other = Issued(tmp_path / "other", own.authority, ("spiffe://cluster/console",))
    stranger = Issued(tmp_path / "stranger", None, ("spiffe://cluster/training",))
    settings = own.settings("cluster_tls") | {
        "cluster_address": LOOPBACK,
        "cluster_names": "spiffe://cluster/sampler, spiffe://cluster/training",
    }
    async with serving(checkpoint(tmp_path, **settings)) as server:
        port = server._cluster.port
        came = {}
        for name, who in {"known": known, "other": other, "stranger": stranger}.items():
            client = client_of(who, port, own.ca)
            came[name] = await get(client)
            await client.close()
        assert came["known"] == "answered"
        assert "PERMISSION_DENIED" in came["other"]
        assert "or not know the certificate that was shown" in came["stranger"]
        # No health there, and nothing without a certificate; clients have the other port.
        assert await health(port, own.credentials(known)) == "UNIMPLEMENTED"
        assert await health(port, own.credentials()) == "UNAVAILABLE"
        assert await health(port, None) == "UNAVAILABLE"
        assert await health(server.port, None) == "OK"


async def test_at_their_own_port_servers_show_a_key_too(tmp_path: Path) -> None:
    """Where there are keys a certificate alone is not enough."""
    own = Issued(tmp_path / "own")
    keys = KeyFile(tmp_path / "keys.json")
    good = tmp_path / "cluster.key"
    good.write_text(keys.create(scope=Scope.SERVER).text)
    settings = own.settings("cluster_tls") | {
        "cluster_address": LOOPBACK,
        "keys_file": str(keys.path),
    }
    async with serving(checkpoint(tmp_path, **settings)) as server:
        for key, came in ((NO_KEY, "takes no key of this one"), (good, "answered")):
            shown = key if isinstance(key, ClusterKey) else ClusterKey(str(key), "x")
            client = client_of(own, server._cluster.port, key=shown)
            assert came in await get(client)
            await client.close()


async def test_ranks_attach_with_certificate_and_secret(tmp_path: Path) -> None:
    """Neither is enough."""
    own = Issued(tmp_path / "own")
    rank, stranger = Issued(tmp_path / "rank", own.authority), Issued(tmp_path / "stranger")
    async with serving(training(tmp_path, **own.settings("cluster_tls"))) as server:
        secret = link_secret.read(tmp_path / "journal" / link_secret.FILE_NAME, "x")

        async def attach(credentials: grpc.ChannelCredentials, shown: str) -> str:
            target = f"localhost:{server.link_port}"
            async with grpc.aio.secure_channel(target, credentials) as channel:
                call = TrainerLinkServiceStub(channel).Attach(metadata=link_secret.shown(shown))
                with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                    await call.write(link_pb.AttachRequest(loading=link_pb.Loading(message="it")))
                    await call.done_writing()
                return str((await call.code()).name)

        assert await attach(own.credentials(rank), secret) == "OK"
        assert await attach(own.credentials(rank), "x" * 32) == "UNAUTHENTICATED"
        assert await attach(own.credentials(), secret) == "UNAVAILABLE"
        assert await attach(own.credentials(stranger), secret) == "UNAVAILABLE"


async def test_a_certificate_is_replaced_under_a_call(shown: Issued, tmp_path: Path) -> None:
    """The stream goes on where it was, and who connects then sees the new one."""
    async with serving(checkpoint(tmp_path, **shown.settings("tls"))) as server:
        target, credentials = f"localhost:{server.port}", shown.credentials()
        async with grpc.aio.secure_channel(target, credentials) as channel:
            stub = CheckpointServiceStub(channel)
            watch = stub.WatchCheckpoints(pb.WatchCheckpointsRequest())
            assert await watch.read() == pb.WatchCheckpointsResponse()
            before = await asyncio.to_thread(serial_at, server.port, shown.ca)
            shown.renew()
            after = await asyncio.to_thread(serial_at, server.port, shown.ca)
            assert before != after
            assert await asyncio.to_thread(serial_at, server.port, shown.ca) == after
            # A whole new authority: the connection that is there outlives that, too.
            other = Issued(tmp_path / "other")
            shown.authority = other.authority
            shown.renew()
            assert await health(server.port, credentials) == "UNAVAILABLE"
            assert await health(server.port, other.credentials()) == "OK"
            assert not watch.done()
            request = pb.GetCheckpointRequest(checkpoint_path=str(ABSENT))
            with pytest.raises(grpc.aio.AioRpcError) as absent:
                await stub.GetCheckpoint(request)
            assert absent.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_servers_own_certificate_is_replaced_under_its_calls(tmp_path: Path) -> None:
    """Calls that begin then show the new one; one under way goes on with the old one."""
    own = Issued(tmp_path / "own")
    caller = Issued(tmp_path / "caller", own.authority, ("spiffe://cluster/old",))
    settings = own.settings("cluster_tls") | {
        "cluster_address": LOOPBACK,
        "cluster_names": "spiffe://cluster/old",
    }
    async with serving(checkpoint(tmp_path, **settings)) as server:
        client = client_of(caller, server._cluster.port, own.ca)
        watch = client.watch("base")
        assert await anext(watch) is None
        going_on = asyncio.ensure_future(anext(watch))
        assert await get(client) == "answered"
        caller.renew(("spiffe://cluster/new",))
        assert "PERMISSION_DENIED" in await get(client)
        caller.renew(("spiffe://cluster/old",))
        assert await get(client) == "answered"
        assert not going_on.done()
        going_on.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await going_on
        await client.close()
