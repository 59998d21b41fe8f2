"""The gateway and metrics over HTTPS."""

import asyncio
from pathlib import Path

import pytest

from certificates import Issued
from tinsmithd.config import GatewaySettings
from tinsmithd.gateway import tls as gateway_tls
from tinsmithd.gateway.server import Gateway
from tls_servers import (
    LOOPBACK,
    checkpoint,
    fetched,
    serial_at,
    serving,
    silent,
    training,
)

pytestmark = pytest.mark.usefixtures("looks_at_once")


async def test_a_gateway_speaks_tls_on_both_sides(shown: Issued, tmp_path: Path) -> None:
    """To its callers and to what it stands before; its certificate changes while it runs."""
    own = Issued(tmp_path / "own")
    settings = {**own.settings("tls"), "tls_client_ca_file": str(own.ca)}
    async with serving(training(tmp_path, **settings)) as behind:
        gateway = Gateway(
            GatewaySettings(
                listen_address=LOOPBACK,
                metrics_address=LOOPBACK,
                training_address=f"localhost:{behind.port}",
                **shown.settings("tls"),
                **own.settings("cluster_tls"),
            )
        )
        async with serving(gateway):
            at = f"https://localhost:{gateway.port}"
            status, text = await asyncio.to_thread(fetched, f"{at}/healthz", shown.ca)
            assert (status, '"loading"' in text) == (503, True), text  # no ranks, but an answer
            before = await asyncio.to_thread(serial_at, gateway.port, shown.ca)
            shown.renew()
            assert await asyncio.to_thread(serial_at, gateway.port, shown.ca) != before
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"HTTP" not in await reader.read()
            writer.close()
            page = f"https://localhost:{gateway.metrics_port}/metrics"
            _, text = await asyncio.to_thread(fetched, page, shown.ca)
            for name in ("tls", "cluster_tls"):
                assert f'tinsmith_certificate_left_seconds{{certificate="{name}"}} 3.1' in text


async def test_handshakes_of_a_gateway_are_bounded(
    shown: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a host in number, and each in time, as connections without TLS are."""
    monkeypatch.setattr(gateway_tls, "connections_max", lambda: 8)
    settings = {"listen_address": LOOPBACK, "peer_share_max": 0.5, **shown.settings("tls")}
    async with serving(Gateway(GatewaySettings(**settings))) as gateway:
        reads = [await silent(gateway.port) for _ in range(6)]
        while sum(read.done() for read in reads) < 2:
            await asyncio.sleep(0.01)
        assert sum(read.done() for read in reads) == 2
    usual_s = gateway_tls.HANDSHAKE_S_MAX
    monkeypatch.setattr(gateway_tls, "HANDSHAKE_S_MAX", 0.1)
    async with serving(Gateway(GatewaySettings(**settings))) as gateway:
        await asyncio.gather(*[await silent(gateway.port) for _ in range(4)])
        monkeypatch.setattr(gateway_tls, "HANDSHAKE_S_MAX", usual_s)  # who speaks may be slow
        at = f"https://localhost:{gateway.port}/livez"
        assert (await asyncio.to_thread(fetched, at, shown.ca))[0] == 200


async def test_metrics_speak_tls_and_wait_for_nobody(shown: Issued, tmp_path: Path) -> None:
    """A caller that says nothing keeps no scrape waiting; plain text is refused."""
    settings = {**shown.settings("tls"), "metrics_address": LOOPBACK}
    async with serving(checkpoint(tmp_path, **settings)) as server:
        port = server._rpc.metrics_port
        silent = await asyncio.open_connection("127.0.0.1", port)
        page = f"https://localhost:{port}/metrics"
        status, text = await asyncio.to_thread(fetched, page, shown.ca)
        assert (status, "tinsmith_certificate_left_seconds" in text) == (200, True)
        before = await asyncio.to_thread(serial_at, port, shown.ca)
        shown.renew()
        assert await asyncio.to_thread(serial_at, port, shown.ca) != before
        silent[1].close()


async def test_a_gateway_waits_for_servers_that_it_cannot_trust_yet(
    shown: Issued, tmp_path: Path
) -> None:
    """No caller is to blame, so it says 503, and goes on as soon as somebody mended it."""
    other = Issued(tmp_path / "other")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(other.ca.read_bytes())
    async with serving(training(tmp_path, **shown.settings("tls"))) as behind:
        address = f"localhost:{behind.port}"
        settings = {"listen_address": LOOPBACK, "training_address": address, "request_s_max": 1.0}
        settings |= {"cluster_tls_ca_file": str(ca), **shown.settings("tls")}
        async with serving(Gateway(GatewaySettings(**settings))) as gateway:
            at = f"https://localhost:{gateway.port}"
            asked = f"{at}/api/v1/get_server_capabilities"
            status, text = await asyncio.to_thread(fetched, asked, shown.ca)
            assert status == 503, text
            ca.write_bytes(shown.ca.read_bytes())
            while '"loading"' not in text:
                status, text = await asyncio.to_thread(fetched, f"{at}/healthz", shown.ca)
                assert status == 503, text
