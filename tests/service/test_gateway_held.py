"""Samplers without a name are held while their session lives, by whichever gateway it beats at.

Leases cannot run out here, since their clock stands still: what goes was given back.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from checkpoint_server import Served
from checkpoints import files, messages
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.tinker.held import HeldSamplers

SESSION, OTHER = f"s-{'0' * 32}", f"s-{'1' * 32}"


class Behind:
    """What a gateway has of a cluster that is a Checkpoint server alone."""

    def __init__(self) -> None:
        self.served: Any = None

    async def checkpoint(self) -> Any:
        return self.served.stub

    async def retrying(self, _: str, attempt: Callable[[], Awaitable[Any]], **__: Any) -> Any:
        return await attempt()


class Weights(Served):
    """Its leases do not run out."""

    async def save(self, session: str, seed: int, lease_id: str) -> str:
        path = f"tinsmith://{session}:train:0/sampler_weights/ephemeral-{seed:016x}"
        header = {"ttl": Duration(seconds=86_400), "ephemeral": True, "overwrite": True}
        content = files(seed, optimizer=False)
        await self.stub.WriteCheckpoint(iter(messages(path, content, **header, lease_id=lease_id)))
        return path

    async def becomes(self, *paths: str) -> None:
        """Wait until these are left."""
        async with asyncio.timeout(20):
            while await self.there() != set(paths):
                await asyncio.sleep(0.02)

    async def there(self) -> set[str]:
        listed = await self.stub.ListCheckpoints(pb.ListCheckpointsRequest())
        return {checkpoint.checkpoint_path for checkpoint in listed.checkpoints}

    async def give_back(self, path: str, lease_id: str) -> None:
        lease = pb.Lease(checkpoint_path=path, lease_id=lease_id)
        await self.stub.RenewLeases(pb.RenewLeasesRequest(released=[lease]))

    def gateway(self, **settings: float) -> HeldSamplers:
        behind = Behind()
        behind.served = self
        return HeldSamplers(behind, GatewaySettings(**settings))  # type: ignore[arg-type]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Weights]:
    async with Weights.running(tmp_path) as served:
        yield served


async def test_the_end_of_a_session_gives_its_samplers_back_at_once(served: Weights) -> None:
    """Its own and no others; the newest of a model stays by the service's own rule."""
    held = served.gateway()
    first = await served.save(SESSION, 0, "a")
    others = await served.save(OTHER, 1, "b")
    held.hold(SESSION, first, "a")
    held.hold(OTHER, others, "b")
    newest = await served.save(SESSION, 2, "c")
    others_newest = await served.save(OTHER, 3, "d")
    assert held.sessions() == {SESSION, OTHER}
    held.end(SESSION)
    assert held.sessions() == {OTHER}
    await served.becomes(others, newest, others_newest)
    held.end(OTHER)
    await served.becomes(newest, others_newest)


async def test_a_gateway_that_starts_holds_what_its_sessions_had(served: Weights) -> None:
    """Before it is used, so that the lease of the one before it may end."""
    first = await served.save(SESSION, 0, "of the gateway that died")
    newest = await served.save(SESSION, 1, "b")
    held = served.gateway()
    held.heard(SESSION)
    async with asyncio.timeout(20):
        while first not in {path for _, path in held._all()}:
            await asyncio.sleep(0.02)
    await held._tell()
    await served.give_back(first, "of the gateway that died")
    probe = await served.save(OTHER, 2, "probe")
    last = await served.save(OTHER, 3, "last")
    await served.give_back(probe, "probe")
    await served.becomes(first, newest, last)
    held.end(SESSION)
    await served.becomes(newest, last)


@pytest.mark.parametrize("silent", ["session_idle_s", "sampler_idle_s"])
async def test_what_is_silent_is_given_back(silent: str, served: Weights) -> None:
    """A session that beats no more, and a sampler that nobody samples from."""
    held = served.gateway(**{silent: 0.2})
    first = await served.save(SESSION, 0, "a")
    held.hold(SESSION, first, "a")
    newest = await served.save(SESSION, 1, "b")
    await asyncio.sleep(0.3)
    held.hold(SESSION if silent == "sampler_idle_s" else OTHER, newest, "b")
    await served.becomes(newest)
