"""Runs gateways for tests: the production process, on a free port."""

import contextlib
import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import programs


class RunningGateway:
    """A gateway in a process of its own, in front of a cluster.

    Args:
        training_address: Of the cluster.
        folder: For its port file and its log.
        settings: More settings, by their names.

    Attributes:
        url: `http://host:port`.
        log: What it writes.
    """

    def __init__(self, training_address: str, folder: Path, **settings: object) -> None:
        self._folder = folder
        self._settings = {"training_address": training_address, **settings}
        # Bound for as long as the gateway is wanted: nobody else gets its port while it is away.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self._port = self._place.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "gateway.log"
        self.start()

    def start(self) -> None:
        """Start it; again, on the port that it had."""
        port_file = self._folder / "gateway.port"
        port_file.unlink(missing_ok=True)
        given = {
            "listen_address": f"127.0.0.1:{self._port}",
            "port_file": port_file,
            "live_with_pid": os.getpid(),
            **self._settings,
        }
        flags = [part for key, value in given.items() for part in (_flag(key), str(value))]
        with self.log.open("ab") as log:
            self._process = programs.start("tinsmithd.gateway", *flags, stdout=log, stderr=log)
        until = time.monotonic() + programs.START_S_MAX
        while not port_file.exists():
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < until, "the gateway did not start"
            time.sleep(0.01)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Stop it gracefully."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(programs.START_S_MAX)
        finally:
            self._process.kill()
            self._place.close()


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


@contextlib.contextmanager
def running_gateway(
    training_address: str, folder: Path, **settings: object
) -> Iterator[RunningGateway]:
    """A gateway for the body of the `with`."""
    gateway = RunningGateway(training_address, folder, **settings)
    try:
        yield gateway
    finally:
        gateway.stop()


def ask(
    gateway: RunningGateway,
    path: str,
    body: Any = None,
    *,
    method: str = "",
    headers: dict[str, str] | None = None,
) -> tuple[int, Any]:
    """Status of one request, and its JSON, or its bytes where that is a message."""
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(
        method or ("GET" if body is None else "POST"), path, data, headers=headers or {}
    )
    response = connection.getresponse()
    text = response.read()
    connection.close()
    if response.headers.get_content_type() == "application/x-protobuf":
        return response.status, text
    return response.status, json.loads(text) if text else None
