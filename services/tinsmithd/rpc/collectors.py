"""What Prometheus reads of every server and of the gateway, beside its calls."""

import importlib.metadata
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tinsmithd.keys import KeyFile, KeyFileError
from tinsmithd.rpc.series import Series, counter, gauge
from tinsmithd.tls import Certificates

BUILD = gauge("tinsmith_build_info", "1, with the version of the process.", "version")
SERVING = gauge(
    "tinsmith_serving",
    "1 while health says SERVING of it.",
    "service",
    only="of the gRPC servers",
)
CERTIFICATE = gauge(
    "tinsmith_certificate_left_seconds",
    "Until a certificate expires, by the settings that name it: tls_... or cluster_tls_...",
    "certificate",
    only="with TLS",
)
KEYS_READABLE = gauge(
    "tinsmith_keys_readable",
    "0 while keys_file cannot be read: what was read last stays in force, and no start succeeds.",
    only="with keys",
)
KEYS = gauge("tinsmith_keys", "Keys in keys_file, expired ones included.", only="with keys")
KEYS_REFUSALS = counter(
    "tinsmith_keys_refusals_total",
    "Calls refused for their key, before they are counted as calls.",
    "reason",
    only="of the gRPC servers, with keys",
)
DISK_FREE = gauge(
    "tinsmith_disk_free_bytes",
    "Free bytes of the file system of data_folder.",
    only="of Training and Checkpoint",
)
DISK_SIZE = gauge(
    "tinsmith_disk_size_bytes",
    "All bytes of the file system of data_folder.",
    only="of Training and Checkpoint",
)
SERIES: Sequence[Series] = (
    *(BUILD, SERVING, CERTIFICATE, KEYS_READABLE, KEYS, KEYS_REFUSALS),
    *(DISK_FREE, DISK_SIZE),
)


class BuildCollector(Collector):
    """Which release this is."""

    def collect(self) -> Iterable[Metric]:
        """One gauge."""
        yield BUILD.by_one({importlib.metadata.version("tinsmith"): 1.0})


class ServingCollector(Collector):
    """What health says, by the name that health knows it by.

    Args:
        said: Name to whether it is SERVING.
    """

    def __init__(self, said: Mapping[str, bool]) -> None:
        self._said = said

    def collect(self) -> Iterable[Metric]:
        """One gauge; the empty name is the process, which answers."""
        yield SERVING.by_one({name: float(on) for name, on in list(self._said.items()) if name})


class CertificateCollector(Collector):
    """How long certificates are good for.

    Args:
        certificates: Those that this process uses.
    """

    def __init__(self, certificates: Sequence[Certificates]) -> None:
        self._certificates = certificates

    def collect(self) -> Iterable[Metric]:
        """One gauge; nothing where there is none."""
        if self._certificates:
            found = {each.files.prefix: each.left_s for each in self._certificates}
            yield CERTIFICATE.by_one({name: s for name, s in found.items() if s is not None})


class KeysCollector(Collector):
    """Whether the file of keys can be read now, whoever calls or does not.

    Args:
        file: It.
        refusals: Calls that were refused for their key, by reason.
    """

    def __init__(self, file: Path, refusals: Mapping[str, int] | None = None) -> None:
        self._file = KeyFile(file)
        self._refusals = refusals

    def collect(self) -> Iterable[Metric]:
        """Two gauges and a counter; the number of keys only where it is known."""
        try:
            count: int | None = len(self._file.read().keys)
        except KeyFileError:
            count = None
        yield KEYS_READABLE.of(count is not None)
        if count is not None:
            yield KEYS.of(count)
        if self._refusals is not None:
            yield KEYS_REFUSALS.by_one(dict(self._refusals))


class DiskCollector(Collector):
    """The room on the disk that holds a server's data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """Two gauges; none while the disk does not answer."""
        try:
            usage = shutil.disk_usage(self._folder)
        except OSError:
            return
        yield DISK_FREE.of(usage.free)
        yield DISK_SIZE.of(usage.total)
