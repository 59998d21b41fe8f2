"""deploy/overlays/ci-nodes on a real Kubernetes: one rank group of four ranks in two pods.

As test_cluster.py; figures are printed, since how long something takes is the machine's affair.
"""

import json
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from kube import pod_processes
from kube.cluster import BASE_MODEL, KubeCluster, fresh_namespace, without_names
from tiny_models import write_tiny_model

pytestmark = pytest.mark.timeout(600)

STEPS = 80
"""Enough that the script still trains when the kubelet, some seconds later, has ended a pod."""
PODS = ("trainer-0", "trainer-1")
KILLED_AT = 5
RANKS = 2
"""In each pod."""
SCRIPT = Path(pod_processes.__file__)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeCluster]:
    with fresh_namespace("tinsmith-nodes") as found:
        folder = tmp_path_factory.mktemp("models") / BASE_MODEL
        found.deploy(write_tiny_model(folder), "ci-nodes")
        yield found


@pytest.fixture(scope="module")
def undisturbed(cluster: KubeCluster) -> list[dict[str, Any]]:
    """What the script says when nothing happens to the cluster."""
    lines = cluster.run_script(STEPS)
    assert len(lines) == STEPS + 2
    return without_names(lines)


def ranks_of(cluster: KubeCluster, pod: str, *arguments: str) -> dict[str, float]:
    """The ranks' process ids in a pod, and when each started, seconds of the machine's clock."""
    said = cluster("exec", "-i", pod, "--", "python", "-", *arguments, text=SCRIPT.read_text())
    found: dict[str, float] = json.loads(said)
    return found


def times_of(cluster: KubeCluster, pod: str, words: str, *arguments: str) -> list[float]:
    """When a pod's log said something, seconds of the machine's clock."""
    lines = cluster("logs", pod, "--timestamps", *arguments).splitlines()
    said = [line.partition(" ") for line in lines]
    return [seconds(when) for when, _, text in said if words in text]


def seconds(stamp: str) -> float:
    """A time of Kubernetes, to the microsecond at most."""
    whole = re.sub(r"(\.\d{6})\d*", r"\1", stamp)
    return datetime.fromisoformat(whole.replace("Z", "+00:00")).timestamp()


def test_two_pods_are_one_group(cluster: KubeCluster, undisturbed: list[dict[str, Any]]) -> None:
    """Four ranks compute, two in each pod, and the same again gives the same bits."""
    assert len(undisturbed) == STEPS + 2
    for pod in PODS:
        assert len(ranks_of(cluster, pod)) == RANKS
    attached = f"rank group attached: {BASE_MODEL}, {len(PODS) * RANKS} rank(s)"
    assert times_of(cluster, "training-0", attached)
    assert without_names(cluster.run_script(STEPS)) == undisturbed


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_is_killed(
    cluster: KubeCluster,
    undisturbed: list[dict[str, Any]],
    pod: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The ranks of the other pod end and wait for its successor; the script waits with them."""
    before = cluster.pods("trainer")

    def kill() -> None:
        cluster("delete", "pod", pod, "--force", "--grace-period=0")

    began_s = time.time()
    assert without_names(cluster.run_script(STEPS, {KILLED_AT: kill})) == undisturbed
    took_s = time.time() - began_s
    after = cluster.pods("trainer")
    assert {name for name in PODS if before[name] != after[name]} == {pod}
    lost = times_of(cluster, "training-0", "rank group detached")
    assert any(began_s < when < began_s + took_s for when in lost), "it died while they trained"
    with capsys.disabled():
        print(f"\nkilled {pod}: {STEPS} steps in {took_s:.1f} s")


@pytest.mark.parametrize("pod", PODS)
def test_a_rank_is_killed(
    cluster: KubeCluster,
    undisturbed: list[dict[str, Any]],
    pod: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All ranks start again in the pods that there are, and no container does."""
    before = cluster.pods("trainer")
    killed_s: list[float] = []

    def kill() -> None:
        ranks_of(cluster, pod, "kill")
        killed_s.append(time.time())

    assert without_names(cluster.run_script(STEPS, {KILLED_AT: kill})) == undisturbed
    assert cluster.pods("trainer") == before
    assert [cluster.restarts(each) for each in PODS] == [0, 0]
    started = [when for each in PODS for when in ranks_of(cluster, each).values()]
    assert len(started) == len(PODS) * RANKS
    assert min(started) > killed_s[0] - 1, "they are other processes than before"
    attached_s = times_of(cluster, "training-0", "rank group attached")[-1]
    back_s = times_of(cluster, "training-0", "is back at step")[-1]
    with capsys.disabled():
        print(
            f"\na rank of {pod} killed: new ranks after {min(started) - killed_s[0]:.1f} s; "
            f"attached {attached_s - min(started):.1f} s, model back "
            f"{back_s - min(started):.1f} s after their start"
        )


def test_training_stops_politely(
    cluster: KubeCluster, undisturbed: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM while calls wait: it ends with status 0, and the script goes on with the next one."""
    before = cluster.restarts("training-0")
    stop = ("exec", "training-0", "--", "python", "-c", "import os; os.kill(1, 15)")
    lines = cluster.run_script(STEPS, {KILLED_AT: lambda: cluster(*stop)})
    assert without_names(lines) == undisturbed
    assert cluster.restarts("training-0") == before + 1
    ended = cluster.status_of("training-0")["lastState"]["terminated"]
    assert ended["exitCode"] == 0
    asked_s = times_of(cluster, "training-0", "stops: calls under way have", "--previous")[-1]
    with capsys.disabled():
        print(
            f"\nTraining ended {seconds(ended['finishedAt']) - asked_s:.1f} s (to 1 s) after "
            "SIGTERM"
        )


def test_the_logs_have_no_traceback(cluster: KubeCluster) -> None:
    """After all that: what an operator reads is sentences."""
    for name in ("training", "trainer"):
        for pod in cluster.pods(name):
            assert "Traceback" not in cluster("logs", pod)
