"""Dashboard, alerts and the page of metrics name what there is, and are what they are made of.

`make monitoring` asks every expression on a real Prometheus; this needs none.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from kube.manifests import (
    KUBERNETES_VERSIONS,
    Manifest,
    check_schema,
    find,
    load,
    ports_of,
    render,
    render_with,
)
from kube.policies import labels_of, lets_through
from monitoring import alert_cases, files, promql
from monitoring.series import OF_TARGETS, labels_by_name
from tinsmithd.config import SECTIONS

SCRAPED = ("training", "sampler", "checkpoint", "gateway")
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
OPERATORS = ("PodMonitor", "PrometheusRule")
"""Kinds of the Prometheus operator, which Kubernetes' own schemas do not have."""


@pytest.mark.parametrize("file", files.made(), ids=lambda file: file.name)
def test_made_files_are_what_make_metrics_writes(file: Path) -> None:
    assert file.read_text() == files.made()[file], "run `make metrics` and commit the result"


def test_expressions_name_series_and_labels_that_there_are() -> None:
    """A renamed series must not leave a panel or an alert silent for ever."""
    known, wrong = labels_by_name(), []
    for expression in files.expressions():
        found = promql.named(expression.text)
        had: set[str] = set()
        for name, labels in found.series:
            if name not in known:
                wrong.append(f"{expression.where}: there is no {name}")
                continue
            had |= known[name]
            if extra := labels - known[name]:
                wrong.append(f"{expression.where}: {name} has no {sorted(extra)}")
        if extra := found.grouping - had:
            wrong.append(f"{expression.where}: nothing has {sorted(extra)} to group by")
        assert found.series, expression
    assert not wrong, "\n".join(wrong)


def test_a_planted_wrong_name_is_found() -> None:
    """The reader of expressions sees names behind functions, ranges, groupings and strings."""
    found = promql.named(
        'sum by (le, a) (rate(one_bucket{b=~"x{y}",c!="z"}[5m])) > 2 and on (d) two offset 5m == 0'
    )
    assert found.series == [("one_bucket", {"b", "c"}), ("two", set())]
    assert found.grouping == {"le", "a", "d"}
    assert promql.named("count by (a) (b) unless on (c) d").series == [("b", set()), ("d", set())]
    assert promql.operands("absent(a) > 1 or max(b) / c < 3 * 4") == ["a", "max ( b ) / c"]


def test_every_alert_says_what_to_do() -> None:
    """It has a severity, a sentence, and a section of docs/operations.md to go to."""
    headings = re.findall(r"^#+ (\S+)$", files.OPERATIONS.read_text(), re.MULTILINE)
    for name, alert in files.alerts().items():
        assert alert["labels"]["severity"] in ("critical", "warning"), name
        assert {"summary", "description", "runbook"} == alert["annotations"].keys(), name
        assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert name in headings, f"docs/operations.md says nothing of {name}"
    assert {each for each in headings if each.startswith("Tinsmith")} == files.alerts().keys()


def test_every_alert_has_series_that_make_it_fire_and_some_that_do_not() -> None:
    """`promtool test rules` tries them where there is promtool."""
    assert alert_cases.CASES.keys() == files.alerts().keys()
    for case in alert_cases.CASES.values():
        assert case.fires != case.quiet


def promtool(*arguments: str) -> None:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("NO promtool HERE: RULES AND CONFIGURATIONS ARE NOT CHECKED")
    done = subprocess.run([found, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-static.yml"])
def test_promtool_takes_the_configurations_and_their_rules(name: str, tmp_path: Path) -> None:
    """Debian's knows no Kubernetes to find pods in: there it checks all but that."""
    config = yaml.safe_load((files.COMPONENT / name).read_text())
    for scrape in config["scrape_configs"]:
        if "kubernetes_sd_configs" in scrape:
            assert scrape.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    copy = tmp_path / name
    copy.write_text(yaml.safe_dump({**config, "rule_files": [str(files.ALERTS)]}))
    promtool("check", "config", str(copy))


def test_every_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    cases = tmp_path / "cases.yaml"
    cases.write_text(yaml.safe_dump(alert_cases.document(), sort_keys=False))
    promtool("test", "rules", str(cases))


def test_the_dashboard_is_one_for_grafana_10() -> None:
    """Each panel has a title, a sentence, a unit, a data source that people choose, and a place."""
    board = json.loads(files.DASHBOARD.read_text())
    assert board["schemaVersion"] >= 38
    kinds = {each["name"]: each["type"] for each in board["templating"]["list"]}
    assert kinds == {"datasource": "datasource", "namespace": "query"}
    places: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not places & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        places |= cells
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)


def monitored(folder: Path, *components: str) -> list[Manifest]:
    return render_with("cpu", components, folder)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_components_fit_the_schema(tmp_path: Path, version: str) -> None:
    """What Kubernetes itself knows does. The operator's kinds are in no schema of Kubernetes."""
    manifests = monitored(tmp_path, "monitoring-operator")
    kinds = [each["kind"] for each in manifests if each["kind"] in OPERATORS]
    assert sorted(kinds) == sorted(OPERATORS)
    check_schema([each for each in manifests if each["kind"] not in OPERATORS], version)


def test_without_an_operator_no_kind_is_asked_for_that_there_is_not(tmp_path: Path) -> None:
    manifests = monitored(tmp_path, "monitoring")
    assert {each["kind"] for each in manifests} == {each["kind"] for each in render("cpu")}
    board = find(manifests, "ConfigMap", "tinsmith-dashboard")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["tinsmith.json"]) == json.loads(files.DASHBOARD.read_text())
    alerts = find(manifests, "ConfigMap", "tinsmith-alerts")["data"]["alerts.yaml"]
    assert alerts == files.ALERTS.read_text()


def test_the_operator_reads_every_server(tmp_path: Path) -> None:
    """By the port that pods declare and settings name, with the labels that expressions use."""
    manifests = monitored(tmp_path, "monitoring-operator")
    spec = find(manifests, "PodMonitor", "tinsmith")["spec"]
    (end,) = spec["podMetricsEndpoints"]
    (chosen,) = spec["selector"]["matchExpressions"]
    assert (chosen["key"], chosen["operator"]) == ("app.kubernetes.io/name", "In")
    assert sorted(chosen["values"]) == sorted(SCRAPED)
    for name in SCRAPED:
        port = ports_of(manifests, name)[end["port"]]
        settings = load(SECTIONS[name], {"TINSMITH_GATEWAY_SIGNING_KEY": "x" * 32})
        assert settings.metrics_address == f"0.0.0.0:{port}"  # type: ignore[attr-defined]
    given = {each.get("targetLabel") for each in end["relabelings"]}
    assert {"job", "server"} <= given


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-static.yml"])
def test_scrapes_have_the_labels_that_expressions_use(name: str) -> None:
    config = yaml.safe_load((files.COMPONENT / name).read_text())
    assert config["rule_files"] == [files.ALERTS.name]
    (scrape,) = config["scrape_configs"]
    assert scrape["job_name"] == "tinsmith"
    given = {each.get("target_label") for each in scrape.get("relabel_configs", ())}
    for each in scrape.get("static_configs", ()):
        given |= each["labels"].keys()
    assert "server" in given <= {*OF_TARGETS, "__address__", "__scheme__", None}


def test_prometheus_alone_reads_metrics_where_the_component_is_taken(tmp_path: Path) -> None:
    """With tenants' names on them, they are not for every pod of every namespace."""
    manifests = monitored(tmp_path, "monitoring")
    for name in SCRAPED:
        assert lets_through(manifests, PROMETHEUS, labels_of(name), 9090)
        assert not lets_through(manifests, {"app": "mine"}, labels_of(name), 9090)
        assert not lets_through(manifests, None, labels_of(name), 9090)
    assert lets_through(manifests, {"app": "mine"}, labels_of("training"), 50051)
    assert lets_through(manifests, {"app": "mine"}, labels_of("gateway"), 8080)
