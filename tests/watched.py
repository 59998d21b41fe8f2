"""A cluster that says of itself all that it can, and everything that it said."""

import contextlib
import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from collector import FAST, Collector, collecting
from keyed import Keyed, keyed_cluster
from programs import environment

JSON = ("training", "trainer", "gateway")
"""Processes that log as JSON; the others as text."""
PROCESSES = ("training", "trainer", "sampler", "checkpoint", "gateway")
WAIT_S = 30.0


class Watched:
    """The cluster.

    Attributes:
        keyed: It, and its callers.
        collector: Where its spans go.
    """

    def __init__(self, keyed: Keyed, collector: Collector) -> None:
        self.keyed, self.collector = keyed, collector

    def log(self, name: str) -> str:
        """What a server, and the ranks with the Training server, wrote: whole lines."""
        text = (self.keyed.cluster.logs / f"{name}.log").read_text()
        return text[: text.rfind("\n") + 1]

    def events(self, name: str) -> list[dict[str, Any]]:
        """The same, of one that writes JSON."""
        return [json.loads(line) for line in self.log(name).splitlines()]

    def until_event(self, name: str, wanted: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Wait for an event."""
        end_s = time.monotonic() + WAIT_S
        while True:
            for event in self.events(name):
                if wanted(event):
                    return event
            assert time.monotonic() < end_s, self.log(name)[-5000:]
            time.sleep(0.05)

    def metrics(self) -> Mapping[str, bytes]:
        """What a scrape of each server gives."""
        found = {}
        for name in ("training", "sampler", "checkpoint", "gateway"):
            url = re.findall(r"metrics are at (http://[^\s\"]+)", self.log(name))[-1]
            with urllib.request.urlopen(url, timeout=60) as response:
                found[name] = response.read()
        return found


@contextlib.contextmanager
def watched_cluster(base_model: Path, folder: Path) -> Iterator[Watched]:
    """One for the body of the `with`."""
    with collecting() as collector, contextlib.ExitStack() as stack:
        settings = dict(FAST)
        for name in PROCESSES:
            prefix = f"TINSMITH_{name.upper()}_"
            settings[f"{prefix}LOG_LEVEL"] = "DEBUG"
            settings[f"{prefix}LOG_FORMAT"] = "json" if name in JSON else "text"
            settings[f"{prefix}OTLP_ENDPOINT"] = collector.endpoint
            if name != "trainer":
                settings[f"{prefix}LOG_CALLS"] = "true"
                settings[f"{prefix}METRICS_ADDRESS"] = "127.0.0.1:0"
        with environment(**settings):  # for its start alone: other tests start servers meanwhile
            keyed = stack.enter_context(keyed_cluster(base_model, folder))
        yield Watched(keyed, collector)
