"""What runs on at the gateway after a request shows the newest token of its tenant and scope."""

import asyncio
from pathlib import Path

from issuers import Issuer
from tinsmith.keys import AUTHORIZATION
from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.callers import Doorkeeper, calls_show, part
from tinsmithd.keys import KeyFile
from tinsmithd.rpc.auth import NO_KEY
from tinsmithd.rpc.ring import open_ring
from waiting import until

METHOD = "/tinsmith.v1.CheckpointService/RenewLeases"


async def test_what_runs_on_goes_on_with_the_next_token(tmp_path: Path) -> None:
    """Not with another tenant's, nor with one that may do less, nor back with an older one."""
    keys = KeyFile(tmp_path / "keys.json")
    key = keys.create("alice").text
    with Issuer() as issuer:
        scopes = {"oidc_scope_claim": "groups", "oidc_scopes": {"r": "read-only", "t": "tenant"}}
        settings = issuer.settings(**scopes, keys_file=str(keys.path), cluster_key_file="x")
        ring = open_ring(GatewaySettings(**settings))
        door = Doorkeeper(ring)
        now_s = issuer.claims()["iat"]

        async def enter(text: str) -> None:
            headers = [(b"x-api-key", text.encode())]
            assert await door.enter({"path": "/x", "headers": headers}) is None

        def shown() -> str:
            ((name, value),) = calls_show(NO_KEY, METHOD)
            assert name == AUTHORIZATION
            return str(value).removeprefix("Bearer ")

        first, going_on = issuer.token("bob", groups="t", exp=now_s + 60), asyncio.Event()
        parts: set[str] = set()

        async def running_on() -> str:
            await enter(first)
            parts.add(part())
            assert shown() == first
            await going_on.wait()
            return shown()

        async def request(text: str) -> None:
            await enter(text)
            parts.add(part())

        running = asyncio.create_task(running_on())
        await until(lambda: parts)
        later = issuer.token("bob", groups="t", exp=now_s + 200)
        others = [
            issuer.token("carol", groups="t", exp=now_s + 300),
            issuer.token("bob", groups="r", exp=now_s + 300),
            later,
            issuer.token("bob", groups="t", exp=now_s + 100),
            key,
        ]
        for text in others:
            await asyncio.create_task(request(text))
        going_on.set()
        assert await running == later
        assert len(parts) == 4
