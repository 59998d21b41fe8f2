"""Every expression of dashboard and alerts, on a real Prometheus that reads a real cluster.

Each returns data, or names a series that is not there, for a reason that is said below, and is
proven elsewhere to return some: by the other cluster, or by `promtool test rules`.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from clusters import RunningCluster
from monitoring import alert_cases, files, promql
from monitoring.running import Load, RunningPrometheus, metrics_on
from tinsmithd.keys import KeyFile

pytestmark = pytest.mark.timeout(600)
WAIT_S = 90.0
ON_GPUS = ("tinsmith_training_rank_device_bytes", "tinsmith_training_rank_device_size_bytes")
"""Ranks on a CPU have no such memory."""
WITH_KEYS = ("tinsmith_keys", "tinsmith_keys_readable", "tinsmith_keys_refusals_total")
WITH_TLS = ("tinsmith_certificate_left_seconds",)
NOT_THERE: Mapping[str, Sequence[str]] = {
    "plain": (*ON_GPUS, *WITH_KEYS, *WITH_TLS),
    "secure": ON_GPUS,
}
"""By cluster: series that cannot be there."""
RANKS = {"plain": 1, "secure": 2}
OF_THE_MACHINE = ("TinsmithDiskNearlyFull", "TinsmithDiskFillsUp")
"""Alerts that the machine may rightly give rise to on which this runs."""


class Watched:
    """A cluster under load, and the Prometheus that reads it."""

    def __init__(
        self, name: str, cluster: RunningCluster, prometheus: RunningPrometheus, load: Load
    ) -> None:
        self.name, self.cluster, self.prometheus, self.load = name, cluster, prometheus, load
        self.keys_file: Path | None = None


@pytest.fixture(scope="module", params=NOT_THERE)
def watched(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """A cluster without keys and TLS, and one with both and with two ranks."""
    name = str(request.param)
    folder = tmp_path_factory.mktemp(name)
    keys, key = None, ""
    if name == "secure":
        keys = KeyFile(folder / "keys.json")
        key = keys.create("alice").text
    with metrics_on():
        running = RunningCluster(
            *(tiny_model, folder / "data"),
            engine="reference" if name == "plain" else "deepspeed",
            ranks=RANKS[name],
            keys_file=keys and keys.path,
            gateway_port=0,
            tls=name == "secure",
        )
    with running, pytest.MonkeyPatch.context() as patch:
        if running.ca_file is not None:
            patch.setenv("TINSMITH_CA_FILE", str(running.ca_file))
        with RunningPrometheus(running, folder / "prometheus") as prometheus:
            found = Watched(name, running, prometheus, Load(running, key))
            found.keys_file = keys and keys.path
            yield found


def until(holds: Callable[[], object], meanwhile: Callable[[], object] = lambda: None) -> None:
    """Wait for something, at most so long that a person would call it missing."""
    end_s = time.monotonic() + WAIT_S
    while not holds() and time.monotonic() < end_s:
        meanwhile()
        time.sleep(0.5)


def asked() -> list[tuple[str, str]]:
    """Where, and what: of an alert its operands, since it is quiet itself."""
    return [
        (each.where, part)
        for each in files.expressions()
        for part in (promql.operands(each.text) if each.is_alert else [each.text])
    ]


def test_every_expression_returns_data(watched: Watched) -> None:
    """Or names what a cluster of this kind cannot have."""
    there: list[tuple[str, str]] = []
    quiet: list[tuple[str, str]] = []
    for each in asked():
        names = {name for name, _ in promql.named(each[1]).series}
        (quiet if names & {*NOT_THERE[watched.name]} else there).append(each)
    assert len(there) > 100
    left = list(there)

    def all_answered() -> bool:
        left[:] = [each for each in left if not watched.prometheus.values(each[1])]
        return not left

    if watched.name == "secure":
        watched.load.without_a_key()
    until(all_answered, watched.load.round)
    assert not left, "\n".join(": ".join(each) for each in left)
    found = [each for each in quiet if watched.prometheus.values(each[1])]
    assert not found, "these are there, after all"
    ranks = [float(RANKS[watched.name])]
    assert watched.prometheus.values("count(tinsmith_training_rank_resident_bytes)") == ranks
    print(f"\n{watched.name}: {len(there)} expressions return data, {len(quiet)} cannot here")


def test_on_a_healthy_cluster_no_alert_holds(watched: Watched) -> None:
    """Not even before its time: an alert that is always about to fire is noise."""
    watched.load.round()
    holding = [
        name
        for name, alert in files.alerts().items()
        if name not in OF_THE_MACHINE and watched.prometheus.values(alert["expr"])
    ]
    assert not holding


def test_prometheus_takes_every_rule(watched: Watched) -> None:
    """It evaluates them without an error, all that there are."""

    def rules() -> list[Mapping[str, str]]:
        return [
            rule for group in watched.prometheus.get("rules")["groups"] for rule in group["rules"]
        ]

    until(lambda: all(rule["health"] == "ok" for rule in rules()))
    assert {rule["name"]: rule["health"] for rule in rules()} == dict.fromkeys(files.alerts(), "ok")


def test_what_breaks_is_seen(watched: Watched) -> None:
    """Alerts' expressions hold on a cluster that really is so. It comes last."""
    values, alerts = watched.prometheus.values, files.alerts()
    if watched.keys_file is not None:
        text = watched.keys_file.read_text()
        watched.keys_file.write_text("{")
        until(lambda: values(alerts["TinsmithKeysDamaged"]["expr"]))
        assert values(alerts["TinsmithKeysDamaged"]["expr"])
        watched.keys_file.write_text(text)
    os.kill(watched.cluster.pid("sampler"), signal.SIGKILL)
    until(lambda: values(alerts["TinsmithServerDown"]["expr"]))
    assert values(alerts["TinsmithServerDown"]["expr"]) == [0.0]
    rank = watched.cluster.rank_pids()[0]
    os.kill(rank, signal.SIGSTOP)
    until(lambda: values(alerts["TinsmithHeartbeatsLate"]["expr"]))
    os.kill(rank, signal.SIGKILL)
    assert values(alerts["TinsmithHeartbeatsLate"]["expr"])


def test_expressions_that_no_cluster_here_has_return_data_where_they_are_true(
    tmp_path: Path,
) -> None:
    """With series as ranks on GPUs have them."""
    nowhere = set.intersection(*(set(names) for names in NOT_THERE.values()))
    texts = [text for _, text in asked() if {n for n, _ in promql.named(text).series} & nowhere]
    assert texts
    series = [
        {"series": f'{name}{alert_cases.TRAINING[:-1]},rank="1"}}', "values": f"{value}+0x9"}
        for name, value in zip(ON_GPUS, (3, 4), strict=True)
    ]
    expected = [{"labels": '{rank="1"}', "value": 0.75}]
    tests = [{"expr": text, "eval_time": "5m", "exp_samples": expected} for text in texts]
    document = {
        "rule_files": [],
        "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": tests}],
    }
    cases = tmp_path / "cases.yaml"
    cases.write_text(yaml.safe_dump(document))
    done = subprocess.run(["promtool", "test", "rules", str(cases)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
