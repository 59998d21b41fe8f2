"""One panel of the dashboard, and how its queries are put together."""

from collections.abc import Sequence
from dataclasses import dataclass

OURS = 'namespace=~"$namespace"'
RED_ABOVE_0 = ((None, "green"), (1.0, "red"))
TENANTS = "Tenants have series where metrics_tenants or metrics_tenants_max says so."

Query = tuple[str, str]
"""An expression, and the legend of its lines."""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: For people.
        text: What it shows, and what to make of it.
        queries: At most eight.
        unit: As Grafana calls it.
        kind: "timeseries", "stat" or "table".
        width: Columns of 24.
        steps: From which value on which colour; the first value is None.
    """

    title: str
    text: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    steps: Sequence[tuple[float | None, str]] = ()


@dataclass(frozen=True)
class Row:
    """Panels under a title."""

    title: str
    panels: Sequence[Panel]


def of(name: str, *more: str) -> str:
    """A selector of a series in the chosen namespace."""
    return f"{name}{{{','.join([OURS, *more])}}}"


def total(name: str, *more: str, by: str = "") -> str:
    """The sum of a series."""
    return f"sum{f' by ({by})' if by else ''} ({of(name, *more)})"


def most(name: str, by: str = "") -> str:
    """The largest of a series."""
    return f"max{f' by ({by})' if by else ''} ({of(name)})"


def rate(name: str, *more: str, by: str = "") -> str:
    """How much a counter rises in a second."""
    over = f"rate({of(name, *more)}[$__rate_interval])"
    return f"sum{f' by ({by})' if by else ''} ({over})"


def quantiles(name: str, *more: str, by: str = "") -> Sequence[Query]:
    """The median and the slowest hundredth of a histogram."""
    legend = f"{{{{{by}}}}} " if by else ""
    labels = f"{by}, le" if by else "le"
    return [
        (
            f"histogram_quantile({share}, {rate(f'{name}_bucket', *more, by=labels)})",
            f"{legend}p{round(100 * share)}",
        )
        for share in (0.5, 0.99)
    ]


def stat(
    title: str,
    text: str,
    expression: str,
    unit: str = "short",
    steps: Sequence[tuple[float | None, str]] = (),
) -> Panel:
    """A panel of one number."""
    return Panel(title, text, [(expression, "")], unit, "stat", 3, steps)
