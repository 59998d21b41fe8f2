"""Promises of the gateway: what is under way is bounded."""

import asyncio

import pytest

from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.promises import Promises
from tinsmithd.gateway.tinker.samples.completions import Completions
from tinsmithd.gateway.tinker.samples.weights import SamplingSession, Weights


async def test_results_under_way_are_bounded_by_what_their_names_carry() -> None:
    """And their room is there again once they have ended."""
    settings = GatewaySettings(received_bytes_max=1000, body_bytes_max=200, peer_share_max=1)
    promises = Promises(settings, asyncio.Event())
    until = asyncio.Event()

    async def result() -> dict[str, str]:
        await until.wait()
        return {}

    promises.start("a" * 600, result())
    with pytest.raises(Problem) as refused:
        promises.start("b" * 600, result())
    assert refused.value.status == 429
    until.set()
    assert await promises.wait("a" * 600, 5) is not None
    promises.start("b" * 600, result())
    assert await promises.wait("b" * 600, 5) is not None


async def test_who_has_many_samples_has_its_own_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another caller's poll still tells which are done."""
    now = ["alice"]
    for module in ("promises", "kept", "samples.completions"):
        monkeypatch.setattr(f"tinsmithd.gateway.tinker.{module}.part", lambda: now[0])
    found = Completions(Promises(GatewaySettings(), asyncio.Event()))
    session = SamplingSession.read(Weights("base").sampler_id("s-" + "0" * 32, 0))
    target = {"target": {"sampling_session_id": session.sampler_id}, "timeout": 0}
    found.note(session, 0, "sample-one")
    now[0] = "bob"
    for number in range(200):
        found.note(session, number, f"sample-{number}-{'x' * 30_000}")
    with pytest.raises(Problem) as forgotten:
        await found.poll(target, 1)
    assert forgotten.value.status == 410
    now[0] = "alice"
    (told,) = (await found.poll(target, 1))["completions"]
    assert told["request_id"] == "sample-one"
