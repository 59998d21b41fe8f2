"""The files of monitoring: which are made, which are written by people, and what is in them."""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from monitoring import dashboard, page

ROOT = Path(__file__).parents[2]
COMPONENT = ROOT / "deploy" / "components" / "monitoring"
OPERATOR = ROOT / "deploy" / "components" / "monitoring-operator"
ALERTS = COMPONENT / "alerts.yaml"
DASHBOARD = COMPONENT / "dashboard.json"
RULE = OPERATOR / "prometheus-rule.yaml"
PAGE = ROOT / "docs" / "metrics.md"
OPERATIONS = ROOT / "docs" / "operations.md"
_RULE_HEAD = (
    "# Written by `make metrics` from the component monitoring's alerts.yaml, for the Prometheus\n"
    "# operator. Do not edit.\n"
)


def groups() -> list[dict[str, Any]]:
    """The groups of alerts."""
    found: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"]
    return found


@functools.cache
def alerts() -> Mapping[str, Mapping[str, Any]]:
    """All alerts by name."""
    rules = [rule for group in groups() for rule in group["rules"]]
    found = {rule["alert"]: rule for rule in rules}
    assert len(found) == len(rules)
    return found


@dataclass(frozen=True)
class Expression:
    """One expression of the dashboard or of an alert.

    Attributes:
        where: For a person.
        text: The expression, of which an alert's is to be quiet on a healthy cluster.
        is_alert: Whether it is an alert's.
    """

    where: str
    text: str
    is_alert: bool


def expressions() -> Iterator[Expression]:
    """All of the dashboard, with its variables filled in, and all of the alerts."""
    for title, text in dashboard.expressions(json.loads(DASHBOARD.read_text())):
        yield Expression(title, text, False)
    for name, alert in alerts().items():
        yield Expression(name, alert["expr"], True)


def rule_document() -> str:
    """The alerts as a PrometheusRule."""
    document = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "tinsmith",
            "labels": {"app.kubernetes.io/part-of": "tinsmith"},
        },
        "spec": {"groups": groups()},
    }
    return _RULE_HEAD + yaml.safe_dump(document, sort_keys=False, width=100)


def made() -> Mapping[Path, str]:
    """What programs write, by file."""
    return {
        PAGE: page.page(),
        DASHBOARD: json.dumps(dashboard.document(), indent=1) + "\n",
        RULE: rule_document(),
    }
