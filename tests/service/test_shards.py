"""A cluster of several Training servers: a tenant has its models at one, and clients find it."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

import tinsmith
from faults.peer import Peer, refuse
from limits.held import refusal_of
from scale.servers import Keys, Server
from tinsmith import v1 as pb
from tinsmith.cluster import connect
from tinsmith.status import status_of
from tinsmithd.config import ConfigError, TrainingConfig
from tinsmithd.shards import shard_of

SHARDS = ("one:50051", "two:50051", "three:50051")
TENANTS = [f"tenant-{number}" for number in range(8)]


def test_tenants_are_spread_and_few_of_them_move() -> None:
    """About a third each; with a fourth server a quarter moves, all of it there."""
    owners = [f"tenant-{number}" for number in range(3000)]
    before = {owner: shard_of(owner, SHARDS) for owner in owners}
    assert all(850 < count < 1150 for count in Counter(before.values()).values())
    after = {owner: shard_of(owner, (*SHARDS, "four:50051")) for owner in owners}
    moved = {owner for owner in owners if before[owner] != after[owner]}
    assert 650 < len(moved) < 850
    assert {after[owner] for owner in moved} == {"four:50051"}
    assert shard_of("one", SHARDS) == shard_of("one", SHARDS[::-1])


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The first of three; the others are not there."""
    folder = tmp_path_factory.mktemp("shard")
    keys = Keys(folder, *TENANTS)
    settings = {"shard_addresses": ", ".join(SHARDS), "shard_address": SHARDS[0]}
    with Server("training", folder, keys, **settings) as server:
        yield server


def test_a_server_says_where_a_tenants_models_are_and_takes_no_others(shard: Server) -> None:
    """All calls on models of a tenant of another server are refused with its address."""
    places = {tenant: shard_of(tenant, SHARDS) for tenant in TENANTS}
    assert len(set(places.values())) > 1
    for tenant, place in places.items():
        shown = shard.shown(tenant)
        said = shard.stub.GetCapabilities(pb.GetCapabilitiesRequest(), metadata=shown)
        assert said.training_address == ("" if place == SHARDS[0] else place)
        calls: list[tuple[str, Any]] = [
            ("GetModel", pb.GetModelRequest(model_id="m")),
            ("ListModels", pb.ListModelsRequest()),
            ("CreateModel", pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=2))),
            ("OptimStep", pb.OptimStepRequest(model_id="m", seq_id=1)),
            ("DeleteModel", pb.DeleteModelRequest(model_id="m")),
        ]
        for name, request in calls:
            if place == SHARDS[0] and name == "ListModels":
                assert getattr(shard.stub, name)(request, metadata=shown).total_size == 0
                continue
            with pytest.raises(grpc.RpcError) as refused:
                getattr(shard.stub, name)(request, metadata=shown)
            reason = refusal_of(refused.value).reason
            assert (reason == "OTHER_SHARD") == (place != SHARDS[0]), (tenant, name, reason)
            assert (place in str(status_of(refused.value))) == (place != SHARDS[0])


def test_several_addresses_may_lead_to_one_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A tenant of any of them has its models there."""
    folder = tmp_path_factory.mktemp("two")
    keys = Keys(folder, *TENANTS)
    own = set(SHARDS[:2])
    settings = {"shard_addresses": ", ".join(SHARDS), "shard_address": ", ".join(own)}
    with Server("training", folder, keys, **settings) as server:
        for tenant in TENANTS:
            place = shard_of(tenant, SHARDS)
            said = server.stub.GetCapabilities(
                pb.GetCapabilitiesRequest(), metadata=server.shown(tenant)
            )
            assert said.training_address == ("" if place in own else place)


@pytest.mark.parametrize(
    ("addresses", "own", "wrong"),
    [
        ("one:50051, two:5005l", "one:50051", "shard_addresses"),
        ("one:50051 two:50051", "one:50051", "shard_addresses"),
        ("one:50051, two", "one:50051", "shard_addresses"),
        ("one:50051, one:50051", "one:50051", "shard_addresses"),
        ("one:50051, two:50051", "three:50051", "shard_address"),
        ("one:50051, two:50051", "one:50051, three:50051", "shard_address"),
        ("one:50051, two:50051", "", "shard_address"),
        ("", "one:50051", "shard_address"),
    ],
)
def test_a_typo_in_the_list_stops_the_server(addresses: str, own: str, wrong: str) -> None:
    """A share of all tenants would be sent to nowhere, for as long as they wait."""
    with pytest.raises(ConfigError, match=f"training.{wrong}:"):
        TrainingConfig(shard_addresses=addresses, shard_address=own)
    TrainingConfig(shard_addresses="a:1, https://b:2, :3", shard_address="a:1, :3")


def test_an_administrator_lists_what_is_here(shard: Server) -> None:
    """Who sees all asks each server."""
    assert not shard.stub.ListModels(pb.ListModelsRequest(), metadata=shard.shown()).total_size


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    """Two servers of one cluster; the models are at the second."""
    found = [Peer(), Peer()]
    yield found
    for peer in found:
        peer.stop()


def test_a_client_goes_where_it_is_sent(peers: list[Peer]) -> None:
    """By a refusal of a call, or by the capabilities, whichever comes first."""
    first, second = peers
    where = f"127.0.0.1:{second.port}"

    async def elsewhere(context: Any) -> None:
        await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "OTHER_SHARD", address=where)

    first.servicer.create_faults.append(elsewhere)
    with tinsmith.ServiceClient(base_url=first.address) as service:
        service.create_lora_training_client("base", rank=2).result(60)
    assert len(second.servicer.created) == 1
    first.servicer.capabilities.training_address = f":{second.port}"
    with connect(first.address) as cluster:
        cluster.training.CreateModel(pb.CreateModelRequest())
    assert len(second.servicer.created) == 2
    assert len(first.servicer.created) == 1
