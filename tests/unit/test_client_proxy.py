"""Loopback never goes through a proxy; elsewhere an error says that there is one."""

import asyncio
from collections.abc import Iterator

import grpc
import pytest

import tinsmith
from faults.peer import Peer
from recording_proxy import RecordingProxy
from tinsmith.addresses import channel_options, proxy_note
from tinsmith.cluster import connect

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingProxy]:
    for name in (*VARIABLES, "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with RecordingProxy() as running:
        yield running


@pytest.mark.parametrize("variable", VARIABLES)
def test_loopback_never_uses_a_proxy(
    proxy: RecordingProxy, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the client nor the stubs, whichever variable names it."""
    monkeypatch.setenv(variable, f"http://{proxy.address}")
    peer = Peer()
    try:
        service = tinsmith.ServiceClient(base_url=peer.address, give_up_after_s=5)
        service.create_lora_training_client("base").result(20)
        with connect(peer.address, timeout_s=10) as cluster:
            assert cluster.training.GetModel is not None
        named = tinsmith.ServiceClient(base_url=f"localhost:{peer.port}", give_up_after_s=5)
        named.create_lora_training_client("base").result(20)
        service.close().result(10)
        named.close().result(10)
    finally:
        peer.stop()
    assert proxy.targets == []


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "localhost:1", "a.localhost:1",
                "unix:/tmp/x", "unix:///tmp/x", "ipv4:127.0.0.1:1", "dns:///localhost:1"]
)  # fmt: skip
def test_this_machine_is_known_by_all_its_names(address: str) -> None:
    assert ("grpc.enable_http_proxy", 0) in channel_options(address)


@pytest.mark.parametrize("address", ["10.0.0.1:1", "example.com:1", "localhost.com:1", "[::2]:1"])
def test_others_are_not_this_machine(address: str) -> None:
    assert ("grpc.enable_http_proxy", 0) not in channel_options(address)


@pytest.mark.parametrize("variable", VARIABLES)
def test_elsewhere_the_error_names_the_proxy_and_its_variable(
    proxy: RecordingProxy, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no password, which a proxy's URL may hold; what gRPC says looks like the server's."""
    monkeypatch.setenv(variable, f"http://user:secret@{proxy.address}/")
    service = tinsmith.ServiceClient(base_url="server.invalid:50051", give_up_after_s=0.3)
    with pytest.raises(tinsmith.UnavailableError) as failure:
        service.create_lora_training_client("base").result(30)
    assert proxy.targets[0] == "server.invalid:50051"
    told = f"server.invalid:50051 is reached through the proxy {proxy.address}, which {variable} "
    assert told in str(failure.value)
    assert "secret" not in str(failure.value)
    with pytest.raises(grpc.RpcError) as raw:
        connect("server.invalid:50051", timeout_s=0.5)
    assert told in raw.value.__notes__[0]


@pytest.mark.parametrize("name", ["no_grpc_proxy", "no_proxy"])
@pytest.mark.parametrize(
    "entry", ["server.invalid", "invalid", ".invalid", "other, server.invalid"]
)
def test_no_proxy_is_what_grpc_takes_it_for(
    proxy: RecordingProxy, name: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
    monkeypatch.setenv(name, entry)
    assert proxy_note("server.invalid:1") == ""
    assert proxy_note("else.example:1") != ""

    async def ask() -> None:
        async with grpc.aio.insecure_channel("server.invalid:1") as channel:
            await channel.unary_unary("/a/b")(b"", timeout=1)

    with pytest.raises(grpc.RpcError):
        asyncio.run(ask())
    assert proxy.targets == []


def test_networks_in_no_proxy_count(proxy: RecordingProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
    monkeypatch.setenv("no_proxy", "10.0.0.0/8")
    assert proxy_note("10.1.2.3:1") == ""
    assert "http_proxy" in proxy_note("11.1.2.3:1")
