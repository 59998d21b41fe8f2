"""One process that another one starts and watches: its environment, its end, its log."""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tinsmithd.processes import template

STOP_S_MAX = 30.0
FOLLOW_INTERVAL_S = 0.1
FOLLOW_BYTES = 256 * 1024
"""Maximum number of bytes of a log that are read at once; a longer burst shows its end alone."""
LOG_BYTES_MAX = 32 * 1024 * 1024
LOGS_KEPT = 3
"""Older pieces of a log: `name.log.1` is the newest of them."""


class Ended(Exception):
    """The process ended before it listened.

    Attributes:
        status: Its exit status; below 0 the signal that killed it.
    """

    def __init__(self, status: int) -> None:
        super().__init__(describe_exit(status))
        self.status = status


def describe_exit(status: int) -> str:
    """How a process ended, for a person."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


def environment(**settings: str) -> dict[str, str]:
    """The environment for a Python program of this project.

    Nothing is imported from the current folder, which is the user's: a `queue.py` there would run
    inside every server. That holds for what the program starts in turn, too.

    Args:
        settings: Variables to set besides.
    """
    variables = {**os.environ, "PYTHONSAFEPATH": "1", **settings}
    paths = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    variables.pop("PYTHONPATH", None)
    if paths:  # an empty entry means the current folder
        variables["PYTHONPATH"] = os.pathsep.join(paths)
    return variables


class Log:
    """A file that a process and its children write to by themselves, so that they need no reader.

    Args:
        file: Where.
        show: Given the lines that come, without their ends.
        bytes_max: The file is put aside when it is longer.
    """

    def __init__(
        self, file: Path, show: Callable[[bytes], None], bytes_max: int = LOG_BYTES_MAX
    ) -> None:
        self._file = file
        self._show = show
        self._bytes_max = bytes_max
        self._position = file.stat().st_size if file.exists() else 0
        self._rest = b""

    def open(self) -> int:
        """A descriptor to give to the process; to be closed here afterwards."""
        # Appending is what lets several processes share the file, and lets it be emptied.
        return os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    async def follow(self) -> None:
        """Show what is written and put the file aside when it is too long, until cancelled."""
        while True:
            await asyncio.sleep(FOLLOW_INTERVAL_S)
            with contextlib.suppress(OSError):  # a full disk, a file that somebody removed
                self.look()
                if self._position > self._bytes_max:
                    await asyncio.to_thread(self._rotate)

    def look(self) -> None:
        """Show what was written since."""
        size = self._file.stat().st_size
        if size < self._position:
            self._position, self._rest = 0, b""
        if size == self._position:
            return
        if size - self._position > FOLLOW_BYTES:
            self._position, self._rest = size - FOLLOW_BYTES, b""
        with self._file.open("rb") as file:
            file.seek(self._position)
            data = file.read(FOLLOW_BYTES)
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[:FOLLOW_BYTES]
        for line in lines:
            self._show(line)

    def _rotate(self) -> None:
        def piece(number: int) -> Path:
            return self._file.with_name(f"{self._file.name}.{number}")

        for number in range(LOGS_KEPT - 1, 0, -1):
            if piece(number).exists():
                piece(number).replace(piece(number + 1))
        # The processes have the file open, so it is copied and emptied, not renamed.
        shutil.copyfile(self._file, piece(1))
        piece(1).chmod(0o600)
        os.truncate(self._file, 0)
        self._position, self._rest = 0, b""


class Child:
    """One server process, on a port of its own.

    Args:
        name: `tinsmithd.<name>` is what runs.
        port: Its port; 0 takes a free one at the first start and keeps it.
        log: Where it writes to.
        cluster: Whether it has a port for the other servers alone, beside that of its callers.

    Attributes:
        port: The port, once it listens.
        cluster_port: The other one, where it has one; it keeps it, too.
        serving: Whether it has ever said that it serves.
        process: The process as it is now; None before the first start.
    """

    def __init__(self, name: str, port: int, log: Log, *, cluster: bool = False) -> None:
        self.name = name
        self.port = port
        self.cluster_port = 0
        self._has_cluster_port = cluster
        self.serving = False
        self.listening = asyncio.Event()
        self.process: template.Program | None = None
        self._log = log

    async def start(self, settings: Mapping[str, object]) -> None:
        """Start it and wait until its port is bound.

        Raises:
            Ended: It ended before that.
        """
        with tempfile.TemporaryDirectory() as folder:
            port_file = Path(folder) / "port"
            every = {
                "listen_address": f"127.0.0.1:{self.port}",
                "port_file": port_file,
                "live_with_pid": os.getpid(),
                **settings,
            }
            cluster_file = Path(folder) / "cluster-port"
            if self._has_cluster_port:
                every["cluster_address"] = f"127.0.0.1:{self.cluster_port}"
                every["cluster_port_file"] = cluster_file
            prefix = f"TINSMITH_{self.name.upper()}_"
            self.process = await self._start(
                environment(**{prefix + key.upper(): str(v) for key, v in every.items()})
            )
            while not port_file.exists():
                if self.process.returncode is not None:
                    raise Ended(self.process.returncode)
                await asyncio.sleep(0.02)
            self.port = int(port_file.read_text())
            if self._has_cluster_port:  # it was bound before
                self.cluster_port = int(cluster_file.read_text())
            self.listening.set()

    async def _start(self, variables: Mapping[str, str]) -> template.Program:
        """Start it in a session of its own: Ctrl-C is for `up`, which stops all in order."""
        shared = template.shared()
        start = shared.start if shared is not None else template.start_anew
        log, nothing = self._log.open(), os.open(os.devnull, os.O_RDONLY)
        try:
            return await start(
                template.Launch(f"tinsmithd.{self.name}", [], variables, nothing, log)
            )
        finally:
            os.close(log)
            os.close(nothing)

    async def wait(self) -> int:
        """Wait until it ends; returns its exit status."""
        assert self.process is not None
        return await self.process.wait()

    async def stop(self) -> None:
        """Let it end gracefully, or end it."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_S_MAX)
        except TimeoutError:
            self.kill()
            await self.process.wait()

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
