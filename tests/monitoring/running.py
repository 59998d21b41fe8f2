"""A real Prometheus that reads a real cluster, and the load that makes series move."""

import contextlib
import json
import math
import os
import re
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import tinsmith
from clusters import RunningCluster
from monitoring import files
from tinsmith import types

PROMETHEUS = os.environ.get("TINSMITH_TEST_PROMETHEUS", "prometheus")
START_S_MAX = 60.0
TOKENS = 6
_AT = re.compile(r"metrics are at https?://(\S+)/metrics")


def targets(cluster: RunningCluster) -> Mapping[str, str]:
    """Where each server's metrics are: host:port by its name."""
    return {
        name: _AT.findall((cluster.logs / f"{name}.log").read_text())[-1]
        for name in cluster.addresses
    }


def configuration(cluster: RunningCluster) -> str:
    """`prometheus-static.yml`, for this cluster, and every second."""
    config = yaml.safe_load((files.COMPONENT / "prometheus-static.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(files.ALERTS)]
    (scrape,) = config["scrape_configs"]
    if cluster.ca_file is not None:
        scrape |= {"scheme": "https", "tls_config": {"ca_file": str(cluster.ca_file)}}
    where = targets(cluster)
    for static in scrape["static_configs"]:
        static["targets"] = [where[static["labels"]["server"]]]
    return yaml.safe_dump(config)


class RunningPrometheus:
    """It, in a process of its own; a context manager.

    Args:
        cluster: What it reads.
        folder: For its data.
    """

    def __init__(self, cluster: RunningCluster, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "prometheus.yml"
        config.write_text(configuration(cluster))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                *(PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"),
                f"--web.listen-address={self._url.removeprefix('http://')}",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        until = time.monotonic() + START_S_MAX
        while not self._is_ready():
            assert self._process.poll() is None, Path(self._log.name).read_text()[-3000:]
            assert time.monotonic() < until, "Prometheus does not start"
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def get(self, path: str, **query: str) -> Any:
        """What its API answers.

        Raises:
            AssertionError: It refuses.
        """
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                document = json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error
        assert document["status"] == "success", document
        return document["data"]

    def values(self, expression: str) -> Sequence[float]:
        """The values of an expression now; without those that are no numbers."""
        data = self.get("query", query=expression)
        found = [data["result"]] if data["resultType"] == "scalar" else data["result"]
        every = [each["value"][1] if isinstance(each, dict) else each[1] for each in found]
        return [value for value in map(float, every) if not math.isnan(value)]

    def __enter__(self) -> "RunningPrometheus":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._log.close()


class Load:
    """A script that trains, saves, samples and errs, and requests of a gateway.

    Args:
        cluster: Of which.
        key: What it shows; empty: none.
    """

    def __init__(self, cluster: RunningCluster, key: str) -> None:
        self._cluster, self._key = cluster, key
        self._service = tinsmith.ServiceClient(base_url=cluster.address, api_key=key or None)
        self._model = self._service.create_lora_training_client(
            cluster.base_model, rank=2, seed=1
        ).result(60)
        self._rounds = 0

    def round(self) -> None:
        """Once all of it."""
        self._rounds += 1
        self._train()
        prompt = types.ModelInput.from_ints([5, 6, 7])
        sampler = self._model.save_weights_and_get_sampling_client(name=f"round-{self._rounds}")
        params = types.SamplingParams(max_tokens=4)
        sampler.sample(prompt, num_samples=2, sampling_params=params).result(60)
        self._model.save_state(f"state-{self._rounds}").result(60)
        path = "tinsmith://nobody/weights/one"
        with pytest.raises(tinsmith.NotFoundError):
            self._service.create_training_client_from_state(path).result(60)
        self._ask("/healthz")
        self._ask("/api/v1/create_session", {})
        self._ask("/api/v1/no_such_path", {})

    def _train(self) -> None:
        prompt, targets = types.ModelInput.from_ints([1] * TOKENS), np.ones(TOKENS, np.int64)
        ones = np.ones(TOKENS, np.float32)
        plain = types.Datum(prompt, {"target_tokens": targets, "weights": ones})
        sampled = {"target_tokens": targets, "logprobs": -ones, "advantages": ones}
        self._model.forward_backward([plain], "cross_entropy").result(60)
        self._model.forward_backward([types.Datum(prompt, sampled)], "importance_sampling").result(
            60
        )
        self._model.optim_step(types.AdamParams(learning_rate=1e-3)).result(60)
        self._model.forward([plain], "cross_entropy").result(60)

    def without_a_key(self) -> None:
        """One call that is refused, where there are keys."""
        stranger = tinsmith.ServiceClient(base_url=self._cluster.address, api_key="tml-nobodys")
        with pytest.raises(tinsmith.TinsmithError):
            stranger.get_server_capabilities()

    def _ask(self, path: str, body: Any = None) -> None:
        assert self._cluster.gateway_url is not None
        ca_file = self._cluster.ca_file
        context = None if ca_file is None else ssl.create_default_context(cafile=str(ca_file))
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._cluster.gateway_url + path, data)
        if self._key:
            request.add_header("X-API-Key", self._key)
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=30, context=context).close()


@contextlib.contextmanager
def metrics_on() -> Iterator[None]:
    """Servers that start meanwhile have metrics, of tenants too, and a peak."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRAINING", "SAMPLER", "CHECKPOINT", "GATEWAY"):
            patch.setenv(f"TINSMITH_{name}_METRICS_ADDRESS", "127.0.0.1:0")
            patch.setenv(f"TINSMITH_{name}_METRICS_TENANTS_MAX", "4")
        patch.setenv("TINSMITH_TRAINING_PEAK_FLOPS", "1e12")
        yield
