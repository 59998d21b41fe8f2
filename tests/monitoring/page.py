"""Makes docs/metrics.md of the series that servers describe; `make metrics` writes it."""

import textwrap
from collections.abc import Iterator

from monitoring.series import PARTS
from tinsmithd.rpc.series import Series

WIDTH = 100
HEAD = """# Metrics

<!-- Written by `make metrics` from what the servers expose. Do not edit. -->

Each server answers Prometheus at its `metrics_address`, `/metrics`; with TLS where it speaks TLS to
callers, and without keys. [deploy.md](deploy.md) says how Prometheus finds them in Kubernetes,
[operations.md](operations.md) what each alert means.

Names are `tinsmith_<process>_<what>_<unit>`, without the process where several have the series. No
label holds what a user chose: no model, no checkpoint, no key, no metadata. Tenants have labels
where `metrics_tenants` names them, or `metrics_tenants_max` lets the first of them have some; all
others are `(other)`. So the number of series is bounded by settings, whatever callers do.

`process_*` are what prometheus-client says of a process: memory, processor time, open files.

What share of what the ranks can compute goes into training (MFU):

```promql
sum(rate(tinsmith_training_useful_flops_total[5m])) / max(tinsmith_training_peak_flops)
```
"""


def page() -> str:
    """The whole page, in Markdown."""
    parts = [HEAD]
    for title, part in PARTS.items():
        parts.append(f"## {title}\n")
        parts += [line for series in part for line in _entry(series)]
        parts.append("")
    return "\n".join(parts)


def _entry(series: Series) -> Iterator[str]:
    labels = f"{{{','.join(series.labels)}}}" if series.labels else ""
    only = f"; only {series.only}" if series.only else ""
    text = f"- **`{series.name}{labels}`** ({series.kind}{only}): {series.text}"
    yield textwrap.fill(
        text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
