"""Reads what a server counts at its `metrics_address`, as Prometheus would."""

import http.client
import math
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from tinsmith.addresses import PLAIN, SECURE
from tinsmith.channels import TlsFiles
from tinsmith.cli.failures import AWAY, USAGE, Failed

BYTES_MAX = 4 << 20
TIMEOUT_S = 5.0
_LABELS = r'(?:\{(?P<labels>(?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?'
_LINE = re.compile(rf"(?P<name>[a-zA-Z_:][\w:]*){_LABELS}\s+(?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Scrape:
    """What one server counts at one moment.

    Attributes:
        address: Where it was read.
        values: By name and labels.
        taken_s: When, by a clock that only goes forward.
        date_s: The server's own time, seconds since 1970; None where it says none.
    """

    address: str
    values: Mapping[tuple[str, Labels], float]
    taken_s: float
    date_s: float | None = None

    def sum(self, name: str, **labels: str) -> float | None:
        """The sum over all series of a name that have these labels; None where there is none."""
        found = [
            value
            for (each, had), value in self.values.items()
            if each == name and labels.items() <= dict(had).items()
        ]
        return math.fsum(found) if found else None

    def rate(self, before: "Scrape | None", name: str) -> float | None:
        """How much a counter rises in a second since an earlier scrape; None without one.

        A counter that fell was started anew: what it has is what it rose by.
        """
        new = self.sum(name)
        if before is None or new is None or self.taken_s <= before.taken_s:
            return None
        old = before.sum(name) or 0.0
        return (new - old if new >= old else new) / (self.taken_s - before.taken_s)


def scrape(address: str) -> Scrape:
    """Read a server's metrics.

    Args:
        address: `host:port`, also as a URL with or without `/metrics`; after `https://` it is asked
            with TLS, and must be vouched for by the authorities of `tinsmith.channels`.

    Raises:
        Failed: Nobody answers there, or with something else.
    """
    host = address.removeprefix(PLAIN).removeprefix(SECURE).partition("/")[0]
    name, _, port = host.rpartition(":")
    if not name or not port.isdecimal():
        raise Failed(f"--metrics {address} is not host:port", "", USAGE)
    where = (name.strip("[]"), int(port))
    connection = http.client.HTTPConnection(*where, timeout=TIMEOUT_S)
    try:
        if address.startswith(SECURE):
            trusted = ssl.create_default_context(cafile=TlsFiles.of_environment().ca or None)
            connection = http.client.HTTPSConnection(*where, timeout=TIMEOUT_S, context=trusted)
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        body = response.read(BYTES_MAX + 1)
    except (OSError, http.client.HTTPException) as error:
        why = str(error) or type(error).__name__
        hint = "servers have metrics where their setting metrics_address is set"
        raise Failed(f"no metrics at {host}: {why}", hint, AWAY) from error
    finally:
        connection.close()
    if response.status != 200 or len(body) > BYTES_MAX:
        raise Failed(f"no metrics at {host}: it answers with status {response.status}", "", AWAY)
    taken_s = time.monotonic()
    values = dict(_read(body.decode(errors="replace")))
    return Scrape(host, values, taken_s, _date(response.getheader("Date")))


def _read(text: str) -> Iterator[tuple[tuple[str, Labels], float]]:
    for line in text.splitlines():
        found = None if line.startswith("#") else _LINE.match(line)
        if found is None:
            continue
        labels = tuple(_LABEL.findall(found["labels"] or ""))
        try:
            yield (found["name"], labels), float(found["value"])
        except ValueError:
            continue


def _date(text: str | None) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except ValueError:
        return None
