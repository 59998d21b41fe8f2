"""Makes the dashboard for Grafana 10 and newer; `make metrics` writes it.

What the panels show is in `panels`; here is how Grafana wants it said.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from monitoring.panels import ROWS, Panel, Row

SCHEMA_VERSION = 39
"""Of Grafana 10.4; newer ones bring it up to theirs."""
WIDTH = 24
"""Columns of a dashboard."""
HEIGHTS = {"stat": 4, "timeseries": 8, "table": 8}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
FILLED = {"$namespace": ".*", "$__rate_interval": "1m"}
"""What stands for the variables where a program asks."""


def document() -> dict[str, Any]:
    """The whole dashboard."""
    return {
        "uid": "tinsmith",
        "title": "Tinsmith",
        "description": "One cluster: training, sampling, checkpoints, gateway.",
        "tags": ["tinsmith"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [_datasource(), _namespace()]},
        "panels": list(_panels()),
    }


def expressions(dashboard: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and expression of every query of a dashboard, its variables filled in."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"]
            for variable, value in FILLED.items():
                text = text.replace(variable, value)
            yield panel["title"], text


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "refresh": 1,
        "regex": "",
    }


def _namespace() -> dict[str, Any]:
    query = "label_values(tinsmith_build_info, namespace)"
    return {
        "name": "namespace",
        "label": "Namespace",
        "description": "In Kubernetes; elsewhere there is none, and All is right.",
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "namespace"},
        "includeAll": True,
        "allValue": ".*",
        "multi": False,
        "current": {"text": "All", "value": "$__all"},
        "hide": 0,
        "refresh": 2,
        "regex": "",
        "sort": 1,
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for row in ROWS:
        number += 1
        yield _row(row, number, top)
        top += 1
        left, height = 0, 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                left, top, height = 0, top + height, 0
            number += 1
            yield _panel(panel, number, left, top)
            left, height = left + panel.width, max(height, HEIGHTS[panel.kind])
        top += height


def _row(row: Row, number: int, top: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "row",
        "title": row.title,
        "collapsed": False,
        "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1},
        "panels": [],
    }


def _panel(panel: Panel, number: int, left: int, top: int) -> dict[str, Any]:
    place = {"x": left, "y": top, "w": panel.width, "h": HEIGHTS[panel.kind]}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": list(_targets(panel)),
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
    }


def _targets(panel: Panel) -> Iterator[dict[str, Any]]:
    for letter, (expression, legend) in zip("ABCDEFGH", panel.queries, strict=False):
        yield {
            "refId": letter,
            "datasource": SOURCE,
            "editorMode": "code",
            "expr": expression,
            "legendFormat": legend,
            "instant": panel.kind != "timeseries",
            "range": panel.kind == "timeseries",
            "format": "table" if panel.kind == "table" else "time_series",
        }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps: Sequence[tuple[float | None, str]] = panel.steps or ((None, "green"),)
    found: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {
            "mode": "absolute",
            "steps": [{"value": value, "color": color} for value, color in steps],
        },
        "mappings": [],
    }
    if panel.unit == "percentunit":
        found |= {"min": 0}
    if panel.kind == "timeseries":
        found["custom"] = {"lineWidth": 1, "fillOpacity": 10, "showPoints": "never"}
    return found


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "none",
            "textMode": "auto",
        }
    if panel.kind == "table":
        return {"showHeader": True}
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
