"""deploy/: who reaches whom where a network plugin enforces the policies."""

from pathlib import Path

import pytest

from kube.manifests import (
    OVERLAYS,
    WORKLOADS,
    WRITER,
    Manifest,
    environment_of,
    find,
    load,
    manifests_of_base,
    ports_of,
    render,
    render_with,
)
from kube.policies import Labels, labels_of, lets_through
from tinsmithd.config import SECTIONS, CheckpointConfig, SamplerConfig, TrainingConfig

PODS = (*WORKLOADS, WRITER)
USER, ELSEWHERE = "a pod of the user", "a pod of another namespace"
SOME_PORT = 40_123
"""What the store of ranks, gloo and NCCL open to each other."""
GRPC = {"training": 50051, "sampler": 50052, "checkpoint": 50053}
CALLS = {
    *((USER, name, port) for name, port in GRPC.items()),
    (USER, "gateway", 8080),
    *(("gateway", name, port) for name, port in GRPC.items()),
    ("training", "checkpoint", 50053),
    ("sampler", "checkpoint", 50053),
    ("trainer", "training", 50054),
    ("trainer", "trainer", 29500),
    ("trainer", "trainer", SOME_PORT),
    *((who, name, 9090) for who in (USER, ELSEWHERE) for name in (*GRPC, "gateway")),
}
"""All that there is: who calls whom at which port."""


def labels(name: str) -> Labels | None:
    return {USER: {"app": "mine"}, ELSEWHERE: None}.get(name, labels_of(name))


def calls(manifests: list[Manifest]) -> set[tuple[str, str, int]]:
    """All that the policies let through, of pods of all kinds, at the ports that are there and one
    that is not."""
    listening = {name: ports_of(manifests, name).values() for name in WORKLOADS}
    return {
        (source, target, port)
        for source in (*PODS, USER, ELSEWHERE)
        for target in PODS
        for port in (*listening.get(target, ()), SOME_PORT)
        if lets_through(manifests, labels(source), labels(target), port)
    }


@pytest.mark.parametrize("overlay", ["base", *OVERLAYS, "ci", "ci-nodes"])
def test_pods_reach_whom_they_call_and_nobody_else(overlay: str) -> None:
    """Everything is denied but what the servers do; ranks alone reach the rank link and ranks."""
    assert calls(manifests_of_base() if overlay == "base" else render(overlay)) == CALLS


@pytest.mark.parametrize("name", PODS)
def test_pods_resolve_names_and_reach_nothing_outside(name: str) -> None:
    """The ports of a pod of another namespace that the cluster's DNS has, and no other."""
    manifests = manifests_of_base()
    reached = [
        port
        for port in (53, 80, 443, 5353, 8080, 9090, 50051, SOME_PORT)
        if lets_through(manifests, labels(name), None, port)
    ]
    assert reached == [53, 5353]


def test_servers_reach_an_issuer_of_tokens_and_nobody_else_does(tmp_path: Path) -> None:
    """At one port of whoever it is; between pods nothing changes."""
    manifests = render_with("cpu", ["oidc"], tmp_path)
    found = [name for name in PODS if lets_through(manifests, labels(name), None, 443)]
    assert sorted(found) == sorted([*GRPC, "gateway"])
    assert calls(manifests) == CALLS


def test_with_tls_servers_call_checkpoint_at_a_port_of_their_own(tmp_path: Path) -> None:
    """Where nobody else is let in; it is where their settings say."""
    manifests = render_with("cpu", ["tls", "keys"], tmp_path)
    port = ports_of(manifests, "checkpoint")["cluster"]
    assert calls(manifests) == CALLS | {
        (name, "checkpoint", port) for name in ("training", "sampler")
    }
    checkpoint = load(CheckpointConfig, environment_of(manifests, "checkpoint"))
    assert isinstance(checkpoint, CheckpointConfig)
    assert checkpoint.cluster_address == f"0.0.0.0:{port}"
    for name in ("training", "sampler"):
        config = load(SECTIONS[name], environment_of(manifests, name))
        assert isinstance(config, TrainingConfig | SamplerConfig)
        assert config.checkpoint_target == f"checkpoint:{port}"
    (found,) = [
        each
        for each in find(manifests, "Service", "checkpoint")["spec"]["ports"]
        if each["name"] == "cluster"
    ]
    assert (found["port"], found["targetPort"]) == (port, "cluster")


def test_node_ports_let_everyone_in_where_clients_call(tmp_path: Path) -> None:
    """And nowhere else: not to the rank link, nor to ranks. Each leads to its server."""
    manifests = render_with("cpu", ["node-ports"], tmp_path)
    outside = {(ELSEWHERE, name, port) for name, port in (*GRPC.items(), ("gateway", 8080))}
    found = calls(manifests)
    assert found >= CALLS | outside
    # A policy that names no peer names all of them; who may not open a connection still does not.
    assert {(name, port) for _, name, port in found - CALLS} == {call[1:] for call in outside}
    assert {source for source, _, _ in found - CALLS} == {ELSEWHERE}
    for _, name, port in outside:
        spec = find(manifests, "Service", f"{name}-outside")["spec"]
        own = find(manifests, "Service", name)["spec"]
        (taken,) = spec["ports"]
        assert (spec["type"], spec["selector"]) == ("NodePort", own["selector"])
        assert (taken["port"], taken["targetPort"]) == (port, own["ports"][0]["targetPort"])
        assert 30_000 <= taken["nodePort"] < 32_768
        own_says = own.get("publishNotReadyAddresses")
        assert spec.get("publishNotReadyAddresses") == own_says
