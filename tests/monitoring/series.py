"""All series that servers expose, by who does."""

from collections.abc import Mapping, Sequence

from tinsmithd.checkpoint import metrics as checkpoint
from tinsmithd.gateway import metrics as gateway
from tinsmithd.rpc import collectors, metrics
from tinsmithd.rpc.series import Kind, Series
from tinsmithd.sampler import metrics as sampler
from tinsmithd.training import metrics as training

PARTS: Mapping[str, Sequence[Series]] = {
    "Every server": collectors.SERIES,
    "Calls of the gRPC servers": metrics.SERIES,
    "Training": training.SERIES,
    "Sampler": sampler.SERIES,
    "Checkpoint": checkpoint.SERIES,
    "Gateway": gateway.SERIES,
}
"""By the heading that they have on the page."""
OF_PROCESSES = (
    *("process_cpu_seconds_total", "process_open_fds", "process_max_fds"),
    *("process_resident_memory_bytes", "process_virtual_memory_bytes"),
    "process_start_time_seconds",
)
"""What prometheus-client says of its process."""
OF_TARGETS = ("job", "instance", "namespace", "pod", "server")
"""Labels that Prometheus gives to what it scrapes; some of them in Kubernetes alone."""


def every() -> Mapping[str, Series]:
    """All series by name."""
    return {series.name: series for part in PARTS.values() for series in part}


def labels_by_name() -> Mapping[str, set[str]]:
    """The labels of every name that an expression may use."""
    found: dict[str, set[str]] = {name: set() for name in (*OF_PROCESSES, "up")}
    for series in every().values():
        own = set(series.labels)
        if series.kind is Kind.HISTOGRAM:
            found |= {f"{series.name}_{end}": own for end in ("sum", "count")}
            found[f"{series.name}_bucket"] = own | {"le"}
        else:
            found[series.name] = own
    return {name: labels | {*OF_TARGETS} for name, labels in found.items()}
