"""Whose names metrics have: as many as settings say, of tenants alone, and never a key."""

import asyncio
import json
import urllib.request
from pathlib import Path

import grpc
from prometheus_client.parser import text_string_to_metric_families

from tinsmith import v1 as pb
from tinsmith.keys import AUTHORIZATION, SCHEME
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmithd.keys import KeyFile
from tinsmithd.tenants import THE_REST
from tls_servers import checkpoint, serving

TENANTS = [f"tenant-{number}" for number in range(12)]


async def text_of(port: int) -> str:
    """What a scrape gives, which needs no key."""

    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
            return str(response.read().decode())

    return await asyncio.to_thread(read)


def labels_of(text: str, name: str, label: str) -> dict[str, float]:
    """Sums of a series by a label."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                value = sample.labels[label]
                found[value] = found.get(value, 0.0) + sample.value
    return found


async def test_hostile_tenants_make_no_more_series_than_settings_say(tmp_path: Path) -> None:
    """Twelve tenants and callers without keys, who say all kinds of things; four names."""
    keys = KeyFile(tmp_path / "keys.json")
    made = {tenant: keys.create(tenant) for tenant in TENANTS}
    settings = {
        "keys_file": str(keys.path),
        "metrics_address": "127.0.0.1:0",
        "metrics_tenants": "tenant-7, nobody",
        "metrics_tenants_max": 2,
    }
    async with serving(checkpoint(tmp_path, **settings)) as server:
        channel = grpc.aio.insecure_channel(f"localhost:{server.port}")
        stub = CheckpointServiceStub(channel)

        async def ask(key: str, *more: tuple[str, str]) -> str:
            shown = [(AUTHORIZATION, f"{SCHEME} {key}"), *more]
            try:
                await stub.ListCheckpoints(pb.ListCheckpointsRequest(), metadata=shown)
            except grpc.aio.AioRpcError as error:
                return str(error.code().name)
            return "OK"

        quiet = await text_of(server._rpc.metrics_port)
        for tenant in TENANTS:
            assert await ask(made[tenant].text) == "OK"
        for number in range(20):
            assert await ask(f"tml-guess-{number}") == "UNAUTHENTICATED"
            lie = ("tinsmith-owner", f"made-up-{number}")
            assert await ask(made["tenant-3"].text, lie) == "PERMISSION_DENIED"
        text = await text_of(server._rpc.metrics_port)
        await channel.close()
    calls = labels_of(text, "tinsmith_tenant_calls_total", "tenant")
    assert calls == {"tenant-0": 1, "tenant-1": 1, "tenant-7": 1, THE_REST: 9}
    refused = labels_of(text, "tinsmith_keys_refusals_total", "reason")
    assert refused == {"UNAUTHENTICATED": 20, "PERMISSION_DENIED": 20}
    assert labels_of(quiet, "tinsmith_keys_refusals_total", "reason") == dict.fromkeys(refused, 0)
    stored = labels_of(text, "tinsmith_checkpoint_tenant_stored_bytes", "tenant")
    assert stored.keys() <= {"tenant-0", "tenant-1", "tenant-7", "nobody"}
    # No series is new but those of tenants: everything else was there before the first call.
    assert names_in(text) - names_in(quiet) == {
        ("tinsmith_tenant_calls_total", tenant) for tenant in calls
    } | {("tinsmith_checkpoint_tenant_stored_bytes", each) for each in stored} - names_in(quiet)
    words = [made[tenant].text for tenant in TENANTS]
    words += [made[tenant].record.key_id for tenant in TENANTS]
    words += ["guess", "made-up", "tenant-3"]
    assert not [word for word in words if word in text]


def names_in(text: str) -> set[tuple[str, str]]:
    """Every series: its name, and its tenant or else all labels."""
    return {
        (sample.name, sample.labels.get("tenant") or json.dumps(sample.labels, sort_keys=True))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_tenants_have_no_names_unless_settings_say_so(tmp_path: Path) -> None:
    """Nor is there a series of theirs."""
    async with serving(checkpoint(tmp_path, metrics_address="127.0.0.1:0")) as server:
        async with grpc.aio.insecure_channel(f"localhost:{server.port}") as channel:
            await CheckpointServiceStub(channel).ListCheckpoints(pb.ListCheckpointsRequest())
        text = await text_of(server._rpc.metrics_port)
    assert "tenant" not in text


async def test_a_damaged_file_of_keys_is_seen_though_nobody_calls(tmp_path: Path) -> None:
    """And that it was mended."""
    keys = KeyFile(tmp_path / "keys.json")
    keys.create("alice")
    settings = {"keys_file": str(keys.path), "metrics_address": "127.0.0.1:0"}

    def readable(text: str) -> tuple[bool, bool]:
        lines = text.splitlines()
        return "tinsmith_keys_readable 1.0" in lines, "tinsmith_keys 1.0" in lines

    async with serving(checkpoint(tmp_path, **settings)) as server:
        port, whole = server._rpc.metrics_port, keys.path.read_bytes()
        assert readable(await text_of(port)) == (True, True)
        keys.path.write_bytes(whole[:40])
        assert readable(await text_of(port)) == (False, False)
        keys.path.write_bytes(whole)
        assert readable(await text_of(port)) == (True, True)
