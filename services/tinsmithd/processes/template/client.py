"""Asks a template process for programs, and watches them: for whoever starts programs."""

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinsmithd.processes.logs import is_json

_log = logging.getLogger(__name__)

SOCKET_VARIABLE = "TINSMITH_TEMPLATE"
"""Names the socket of a template that is there already. The tests have one for all clusters."""
STOP_S_MAX = 5.0
_LIMITS = sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})
_ROOM = " " * 256
"""Makes the template's command line so long that programs can put theirs in its place."""


class TemplateError(Exception):
    """No program comes from the template; the message says why."""


def possible() -> bool:
    """Whether programs can be forked here.

    The template needs Linux for the death of its programs. A driver of an accelerator does not
    survive a fork, and importing torch and DeepSpeed may already touch it.
    """
    return sys.platform == "linux" and not any(
        Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/accel")
    )


@dataclass(frozen=True)
class Launch:
    """A program that is to run; its standard output is this process's.

    Attributes:
        module: What to run.
        arguments: Its `sys.argv[1:]`.
        environment: All variables of it.
        stdin: A descriptor to read from.
        stderr: A descriptor to write to.
    """

    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    stdin: int = 0
    stderr: int = 2


class Forked:
    """One program that a template started; ends when its connection to the template is closed.

    Attributes:
        pid: Its process id, which is the id of its process group, too.
        returncode: As `asyncio.subprocess.Process` has it: None while it runs.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._connection = connection
        self._watch = asyncio.create_task(self._until_end())

    async def _until_end(self) -> None:
        # A template that is gone has taken its programs along.
        reply = await _reply(self._connection)
        self.returncode = int(reply["status"]) if reply else -signal.SIGKILL
        self._connection.close()

    async def wait(self) -> int:
        """Wait until it ends; returns its exit status, below 0 the signal that ended it."""
        await asyncio.shield(self._watch)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Template:
    """A template process: started with the first program, and again when it has ended.

    Where it cannot fork, programs are started in the ordinary way.

    Args:
        modules: What it imports.
    """

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._forks = possible()
        self._has_forked = False
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    async def start(self, launch: Launch) -> "Program":
        """Start a program; fork it, if that can be done."""
        if self._forks:
            try:
                return await self.fork(launch)
            except TemplateError as error:
                _log.warning("a program is not forked, which takes longer: %s", error)
                # One that has never forked does not learn it.
                self._forks = self._has_forked
        return await start_anew(launch)

    async def fork(self, launch: Launch) -> Forked:
        """Fork a program.

        Raises:
            TemplateError: The template has ended, or says that it cannot fork.
        """
        try:
            connection = self._connect()
            ask(
                *(connection, launch.module, launch.arguments, launch.environment),
                descriptors=(launch.stdin, 1, launch.stderr),
            )
        except OSError as error:
            raise TemplateError(error.strerror or str(error)) from error
        try:
            reply = await _reply(connection)  # after the template's imports
            if not reply:
                raise TemplateError("the template process ended, or has no room; its log says why")
            self._has_forked = True
            return Forked(connection, int(reply["pid"]))
        except BaseException:
            connection.close()
            raise

    def _connect(self) -> socket.socket:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._control, theirs = socket.socketpair()
            with theirs:
                self._process = spawn(self._modules, theirs)
        assert self._control is not None
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        return ours

    def close(self) -> None:
        """End the template, and with it the programs that still run."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_S_MAX)
            self._process = None


class SharedTemplate(Template):
    """A template that somebody else started.

    Args:
        path: Its socket.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._path)
        return connection


Program = Forked | asyncio.subprocess.Process


async def start_anew(launch: Launch) -> asyncio.subprocess.Process:
    """Start `python -P -m MODULE` in a session of its own."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", launch.module, *launch.arguments),
        env=launch.environment,
        stdin=launch.stdin,
        stderr=launch.stderr,
        start_new_session=True,
    )


def shared() -> Template | None:
    """The template that the environment names, if it does."""
    path = os.environ.get(SOCKET_VARIABLE)
    return SharedTemplate(path) if path else None


def spawn(modules: Sequence[str], source: socket.socket) -> subprocess.Popen[bytes]:
    """Start a template process that ends with the calling thread.

    Args:
        modules: What it imports.
        source: Listens, or brings a connection with each byte.
    """
    return subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "tinsmithd.processes.template"),
            *(str(source.fileno()), str(os.getpid()), "json" if is_json() else "text"),
            *(*modules, _ROOM),
        ],
        # Of numpy's threads there is no need, and a process with threads should not fork.
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        pass_fds=(source.fileno(),),
        start_new_session=True,
    )


def ask(
    connection: socket.socket,
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    descriptors: tuple[int, int, int],
    folder: str = "",
) -> None:
    """Ask a template for a program; two lines of JSON answer, when it starts and when it ends.

    The program has the resource limits of this process, as one that it starts by itself would.

    Args:
        connection: A new one to the template.
        module: What to run.
        arguments: Its `sys.argv[1:]`.
        environment: All variables of it.
        descriptors: Its standard input, output and error.
        folder: Its current folder; empty for this process's.
    """
    limits = {number: resource.getrlimit(number) for number in _LIMITS}
    wanted = [module, list(arguments), dict(environment), folder or os.getcwd(), [*limits.items()]]
    body = json.dumps(wanted).encode()
    socket.send_fds(connection, [len(body).to_bytes(4, "big")], list(descriptors))
    connection.sendall(body)


async def _reply(connection: socket.socket) -> Mapping[str, int]:
    """The next line of a template; empty when there is none any more."""
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    line = b""
    while not line.endswith(b"\n"):
        try:
            got = await loop.sock_recv(connection, 1)
        except OSError:
            got = b""
        if not got:
            return {}
        line += got
    reply: dict[str, int] = json.loads(line)
    return reply
