"""Who leaves, stops reading, or meets a Sampler that dies: what is sampled ends or goes on."""

import contextlib
import http.client
import json
import re
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import programs
from clusters import free_ports, until_health
from gateways import RunningGateway, running_gateway
from tinsmithd.up import SERVICES
from tiny_models import write_tiny_model

CONTEXT = 30_000
MODEL = "endless"
BODY: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": CONTEXT - 100, "seed": 1}
STALL_S = 1.0


class Small:
    """A Sampler whose model never ends by itself, and what leads a gateway to it.

    Attributes:
        gateway: In front of it.
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._model = write_tiny_model(folder / MODEL, context_length=CONTEXT)
        never = {"eos_token_id": 1_000_000}
        (self._model / "generation_config.json").write_text(json.dumps(never))
        self._port = free_ports()
        self.start_sampler()
        training = self._start(
            *("tinsmithd.training", "--data-folder", str(folder / "training")),
            *("--sampler-address", f":{self._port}", "--link-address", "127.0.0.1:0"),
        )
        address = f"127.0.0.1:{training.port_in(folder / 'training.port')}"
        self.gateway: RunningGateway = stack.enter_context(
            running_gateway(address, folder / "gateway", stream_stall_s=STALL_S)
        )

    def _start(self, module: str, *flags: str, port: int = 0) -> programs.Logged:
        name = module.rpartition(".")[2]
        file = self._folder / f"{name}.port"
        file.unlink(missing_ok=True)
        made = programs.Logged(
            self._folder / f"{name}.log",
            *(module, "--listen-address", f"127.0.0.1:{port}", "--port-file", str(file), *flags),
        )
        self._stack.callback(made.kill)
        return made

    def start_sampler(self) -> None:
        """Start it; again, on the port that it had."""
        self.sampler = self._start(
            *("tinsmithd.sampler", "--base-model", str(self._model), "--threads", "1"),
            *("--metrics-address", "127.0.0.1:0", "--dtype", "float32"),
            port=self._port,
        )
        self._port = self.sampler.port_in(self._folder / "sampler.port")
        self.sampler.until(lambda: self.sampler.says("metrics are at"))
        until_health(f"127.0.0.1:{self._port}", serving=True, service=SERVICES["sampler"])

    def value(self, name: str) -> float:
        """A number that the Sampler tells Prometheus."""
        url = re.findall(r"metrics are at (http://\S+)", self.sampler.said)[-1]
        with urllib.request.urlopen(url, timeout=60) as response:
            text = response.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"tinsmith_sampler_{name}":
                    return float(sample.value)
        return 0.0

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until something is true."""
        end_s = time.monotonic() + 60
        while not true():
            assert time.monotonic() < end_s
            time.sleep(0.02)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    with contextlib.ExitStack() as stack:
        yield Small(tmp_path_factory.mktemp("small"), stack)


def posted(gateway: RunningGateway, **more: Any) -> socket.socket:
    """A connection on which a request was sent; nothing of the answer is read yet."""
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=60)
    connection.connect()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = json.dumps({**BODY, **more}).encode()
    connection.request("POST", "/v1/completions", body)
    return connection.sock


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_ends_what_is_sampled(small: Small, stream: bool) -> None:
    """Tokens are counted at the Sampler: it makes no more, and far fewer than were asked for."""
    before = small.value("sampled_tokens_total")
    connection = posted(small.gateway, stream=stream)
    small.until(lambda: small.value("sampled_tokens_total") > before + 10)
    if stream:
        assert connection.recv(15).startswith(b"HTTP/1.1 200")
    connection.close()
    small.until(lambda: small.value("requests_running") + small.value("sequences") == 0)
    made = small.value("sampled_tokens_total")
    assert made - before < CONTEXT / 2
    steps = small.value("steps_total")
    time.sleep(0.2)
    assert (small.value("sampled_tokens_total"), small.value("steps_total")) == (made, steps)


def test_who_reads_nothing_is_given_up(small: Small) -> None:
    """After stream_stall_s; until then what is not read waits, and it is little."""
    before = small.value("sampled_tokens_total")
    connection = posted(small.gateway, stream=True, logprobs=5, n=20, max_tokens=6000)
    small.until(lambda: small.value("sampled_tokens_total") > before)
    small.until(lambda: small.value("requests_running") == 0)
    assert small.value("sampled_tokens_total") - before < 20 * 6000
    received = 0
    with contextlib.suppress(OSError):
        while piece := connection.recv(1 << 20):
            received += len(piece)
    assert received < 10_000_000, "the whole stream has many more"
    connection.close()


def test_others_are_answered_beside_a_reader_who_does_not_read(small: Small) -> None:
    before = small.value("sampled_tokens_total")
    connection = posted(small.gateway, stream=True, logprobs=5, n=20, max_tokens=6000)
    small.until(lambda: small.value("sampled_tokens_total") > before)
    with openai.OpenAI(base_url=f"{small.gateway.url}/v1", api_key="x", max_retries=0) as client:
        assert client.completions.create(model=MODEL, prompt="b", max_tokens=3).choices
    connection.close()
    small.until(lambda: small.value("requests_running") == 0)


def test_a_sampler_that_dies_meanwhile_changes_nothing(small: Small) -> None:
    """Its successor makes the same tokens, and none comes twice."""
    body = {**BODY, "max_tokens": 1500, "logprobs": 0}
    with openai.OpenAI(base_url=f"{small.gateway.url}/v1", api_key="x", max_retries=0) as client:
        wanted = client.completions.create(**body).choices[0]
        stream = client.completions.create(**body, stream=True)
        text, tokens, logprobs = "", [], []
        for number, event in enumerate(stream):
            text += event.choices[0].text
            tokens += event.choices[0].logprobs.tokens
            logprobs += event.choices[0].logprobs.token_logprobs
            if number == 1:
                small.sampler.kill()
                small.start_sampler()
    assert text == wanted.text
    assert tokens == wanted.logprobs.tokens
    assert logprobs == wanted.logprobs.token_logprobs
