"""deploy/ on a real Kubernetes: apply, train, and kill pods while a script trains.

TINSMITH_TEST_KUBECONFIG names the API server, whose nodes have the images of `deploy/overlays/ci`
(docs/deploy.md says how they are built). Without it these tests are skipped, loudly.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kube.cluster import BASE_MODEL, KubeCluster, fresh_namespace, without_names
from tiny_models import write_tiny_model

pytestmark = pytest.mark.timeout(600)

STEPS = 30
GATEWAY = "http://gateway:8080"


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


def metrics_of(cluster: KubeCluster, name: str) -> list[str]:
    """Read from another pod, at the address and the port that Prometheus would find."""
    (pod, *_) = cluster.pods(name)
    found = json.loads(cluster("get", "pod", pod, "--output=json"))
    assert found["metadata"]["annotations"]["prometheus.io/scrape"] == "true"
    port = found["metadata"]["annotations"]["prometheus.io/port"]
    return cluster.fetch(f"http://{found['status']['podIP']}:{port}/metrics").splitlines()


@pytest.mark.parametrize("name", ["training", "checkpoint", "sampler"])
@pytest.mark.usefixtures("undisturbed")  # all pods are there
def test_metrics_are_where_the_pod_says(cluster: KubeCluster, name: str) -> None:
    cluster.wait_ready(name)  # a pod that an earlier test had replaced
    service = f'tinsmith_serving{{service="tinsmith.v1.{name.capitalize()}Service"}} 1.0'
    assert service in metrics_of(cluster, name)


@pytest.mark.usefixtures("undisturbed")
def test_ready_means_that_a_call_would_succeed(cluster: KubeCluster) -> None:
    """Training is not ready without ranks, for all that its port is open; with them it is."""
    cluster.wait_ready("training")
    cluster("scale", "statefulset/trainer", "--replicas=0")
    cluster("wait", "--for=condition=Ready=false", "pod/training-0", "--timeout=120s")
    assert "tinsmith_training_ranks 0.0" in metrics_of(cluster, "training")
    cluster("scale", "statefulset/trainer", "--replicas=1")
    cluster("wait", "--for=condition=Ready", "pod/training-0", "--timeout=120s")
    assert "tinsmith_training_ranks 1.0" in metrics_of(cluster, "training")


@pytest.mark.usefixtures("undisturbed")
def test_the_sampler_computes_with_the_kernels_of_its_image(cluster: KubeCluster) -> None:
    """It has no compiler, and says that it found them."""
    cluster.wait_ready("sampler")
    (pod, *_) = cluster.pods("sampler")
    assert "computing with compiled kernels" in cluster("logs", pod)
    which = "command -v cc gcc || echo none"
    assert cluster("exec", pod, "--", "sh", "-c", which).split() == ["none"]


@pytest.mark.usefixtures("undisturbed")
def test_ranks_know_the_memory_of_their_container(cluster: KubeCluster) -> None:
    """Its limit, of whichever version of control groups the node has, bounds what they take."""
    (pod, *_) = cluster.pods("trainer")
    spec = json.loads(cluster("get", "pod", pod, "--output=json"))["spec"]
    assert spec["containers"][0]["resources"]["limits"]["memory"] == "8Gi"
    module = "tinsmithd.trainer.compute.container"
    script = f"from {module} import free_bytes; print(free_bytes())"
    free = int(cluster("exec", pod, "--", "python", "-P", "-c", script).split()[-1])
    assert 0 < free < 8 * 1024**3


def test_the_gateway_goes_on_with_its_urls_after_a_restart(cluster: KubeCluster) -> None:
    """HTTP for stock SDKs; a signed URL that one pod gave is good at the next one."""
    (first, *_) = cluster.run_script(1)
    cluster.wait_ready("gateway")
    assert cluster.fetch(f"{GATEWAY}/healthz")
    path = f"/api/v1/training_runs/{first['model_id']}/checkpoints/weights/end/archive"
    url = cluster.redirected(GATEWAY + path)
    assert url.startswith(f"{GATEWAY}/")
    cluster("rollout", "restart", "deployment/gateway")
    cluster.wait_ready("gateway")
    assert "adapter_model.safetensors" in cluster.fetch(url)


def test_no_server_is_root_or_writes_beside_its_volumes(cluster: KubeCluster) -> None:
    """The base models are read-only, too."""
    for name in ("training", "checkpoint", "sampler", "gateway", "trainer"):
        (pod, *_) = cluster.pods(name)
        script = "id -u; touch /x 2>/dev/null && echo wrote; test -w /models && echo models; true"
        assert cluster("exec", pod, "--", "sh", "-c", script).split() == ["10001"]


def test_the_logs_have_no_traceback(cluster: KubeCluster) -> None:
    """After all that: what an operator reads is sentences."""
    for name in ("training", "checkpoint", "sampler", "gateway", "trainer"):
        for pod in cluster.pods(name):
            log = cluster("logs", pod)
            assert log
            assert "Traceback" not in log, Path(pod).name + log
