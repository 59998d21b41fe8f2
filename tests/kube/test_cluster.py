"""deploy/ on a real Kubernetes: apply, train, and kill pods while a script trains.

TINSMITH_TEST_KUBECONFIG names the API server, whose nodes have the images of `deploy/overlays/ci`
(docs/deploy.md says how they are built). Without it these tests are skipped, loudly.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kube.cluster import KubeCluster, fresh_namespace, without_names
from tiny_models import write_tiny_model

STEPS = 30
BASE_MODEL = "SmolLM2-135M-Instruct"
"""Name of the folder that deploy/base/config.toml names; a tiny random model lies in it here."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeCluster]:
    with fresh_namespace("tinsmith-kube") as found:
        folder = tmp_path_factory.mktemp("models") / BASE_MODEL
        found.deploy(write_tiny_model(folder))
        yield found


@pytest.fixture(scope="module")
def undisturbed(cluster: KubeCluster) -> list[dict[str, Any]]:
    """What the script says when nothing happens to the cluster."""
    lines = cluster.run_script(STEPS)
    assert len(lines) == STEPS + 2
    assert lines[-1]["tokens"] != [[]]
    return without_names(lines)


def test_a_second_run_is_the_same(cluster: KubeCluster, undisturbed: list[dict[str, Any]]) -> None:
    assert without_names(cluster.run_script(STEPS)) == undisturbed


def test_a_script_on_a_laptop_is_the_same(
    cluster: KubeCluster, undisturbed: list[dict[str, Any]]
) -> None:
    """Through forwarded ports, where none of the cluster's names mean anything."""
    with cluster.forwarded() as environment:
        assert without_names(cluster.run_script(STEPS, here=environment)) == undisturbed


@pytest.mark.parametrize(
    "names",
    [["trainer"], ["training"], ["checkpoint", "sampler"], ["training", "trainer", "checkpoint"]],
    ids="+".join,
)
def test_pods_are_killed_while_a_script_trains(
    cluster: KubeCluster, undisturbed: list[dict[str, Any]], names: list[str]
) -> None:
    """The script waits, and every number is that of the run without kills."""
    before = {name: cluster.pods(name) for name in names}
    at = {step: lambda: cluster.kill(*names) for step in (STEPS // 3, STEPS - 1)}
    assert without_names(cluster.run_script(STEPS, at)) == undisturbed
    for name in names:
        assert not set(before[name].values()) & set(cluster.pods(name).values())


def test_a_rollout_loses_nothing(cluster: KubeCluster, undisturbed: list[dict[str, Any]]) -> None:
    """Both are stopped in the ordinary way and start again."""
    at = {10: lambda: cluster("rollout", "restart", "statefulset/training", "statefulset/trainer")}
    assert without_names(cluster.run_script(STEPS, at)) == undisturbed


def test_models_outlive_the_workloads(
    cluster: KubeCluster, undisturbed: list[dict[str, Any]]
) -> None:
    """Everything is deleted but the claims, then applied again, under a script that trains."""

    def replace() -> None:
        cluster("delete", "statefulset,deployment,service", "--all", "--grace-period=1")
        cluster.apply()

    assert without_names(cluster.run_script(STEPS, {15: replace})) == undisturbed


def test_samplers_are_scaled_and_killed(
    cluster: KubeCluster, undisturbed: list[dict[str, Any]]
) -> None:
    """Two samplers are one service; a sample comes from any, whichever of them die."""
    cluster("scale", "deployment/sampler", "--replicas=2")
    cluster("rollout", "status", "deployment/sampler", "--timeout=120s")
    first, _ = cluster.pods("sampler")

    def kill_one() -> None:
        cluster("delete", "pod", first, "--force", "--grace-period=0")

    assert without_names(cluster.run_script(STEPS, {STEPS - 1: kill_one})) == undisturbed


@pytest.mark.parametrize("name", ["training", "checkpoint", "sampler"])
@pytest.mark.usefixtures("undisturbed")  # all pods are there
def test_metrics_are_where_the_pod_says(cluster: KubeCluster, name: str) -> None:
    """Read from another pod, at the address and the port that Prometheus would find."""
    (pod, *_) = cluster.pods(name)
    found = json.loads(cluster("get", "pod", pod, "--output=json"))
    assert found["metadata"]["annotations"]["prometheus.io/scrape"] == "true"
    port = found["metadata"]["annotations"]["prometheus.io/port"]
    url = f"http://{found['status']['podIP']}:{port}/metrics"
    script = f"import urllib.request as r; print(r.urlopen({url!r}, timeout=10).read().decode())"
    (ranks, *_) = cluster.pods("trainer")
    lines = cluster("exec", ranks, "--", "python", "-c", script).splitlines()
    service = f'tinsmith_serving{{service="tinsmith.v1.{name.capitalize()}Service"}} 1.0'
    assert service in lines


def test_no_server_is_root_or_writes_beside_its_volumes(cluster: KubeCluster) -> None:
    """The base models are read-only, too."""
    for name in ("training", "checkpoint", "sampler", "trainer"):
        (pod, *_) = cluster.pods(name)
        script = "id -u; touch /x 2>/dev/null && echo wrote; test -w /models && echo models; true"
        assert cluster("exec", pod, "--", "sh", "-c", script).split() == ["10001"]


def test_the_logs_have_no_traceback(cluster: KubeCluster) -> None:
    """After all that: what an operator reads is sentences."""
    for name in ("training", "checkpoint", "sampler", "trainer"):
        for pod in cluster.pods(name):
            log = cluster("logs", pod)
            assert log
            assert "Traceback" not in log, Path(pod).name + log
