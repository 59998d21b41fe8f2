"""Runs whole clusters for tests: real processes, production wiring, free ports."""

import asyncio
import os
import threading
from pathlib import Path
from types import TracebackType

from tinsmithd.up import EmbeddedCluster, Options

START_S_MAX = 100.0


class RunningCluster:
    """A cluster that runs until `stop`; a context manager.

    Attributes:
        address: Training's `host:port`.
        addresses: Each server's `host:port`, by its name.
        base_model: Name of its base model.
    """

    def __init__(
        self, base_model: Path, data: Path, *, engine: str = "deepspeed", ranks: int = 1
    ) -> None:
        options = Options(
            base_model=str(base_model), data=data, port=0, engine=engine, ranks=ranks, threads=1
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._cluster = EmbeddedCluster(options, quiet=True)
        self.logs = data / "logs"
        self.base_model = base_model.name
        try:
            self._run(self._cluster.__aenter__())
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._loop.stop)
            for log in sorted(self.logs.glob("*.log")):
                error.add_note(f"--- {log.name}\n{log.read_text()[-3000:]}")
            raise
        self.address = self._cluster.address
        self.addresses = self._cluster.addresses

    def _run(self, coroutine: object) -> object:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)  # type: ignore[arg-type]
        return future.result(START_S_MAX)

    def pid(self, name: str) -> int:
        """Process id of a server."""
        process = self._cluster._children[name]._process
        assert process is not None
        return process.pid

    def kill(self) -> None:
        """End every server with SIGKILL; the ranks follow their server."""
        for name in self.addresses:
            os.kill(self.pid(name), 9)
        self.stop()

    def stop(self) -> None:
        """Stop gracefully."""
        if self._loop.is_running():
            self._run(self._cluster.stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def __enter__(self) -> "RunningCluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
