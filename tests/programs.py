"""Starts the programs that tests need: all of them here.

Servers, ranks and whatever else imports torch and its friends are forked from one template for the
whole run of pytest, which has imported them once: `tinsmithd.processes.template`. A fork is like a
new process there, without the second or ten that imports take. Clusters start theirs from it, too.
`tests/e2e/test_up.py` has the ordinary start.
"""

import atexit
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Self

import ports
from tinsmithd.processes.template import client

SERVERS = ("tinsmithd.training", "tinsmithd.checkpoint", "tinsmithd.gateway")
PRELOAD = (
    *(f"{server}.server" for server in SERVERS),
    *("tinsmithd.trainer.preload", "tinsmithd.sampler.preload"),
)
FORKED = (*SERVERS, "tinsmithd.trainer", "tinsmithd.sampler", "torch.distributed.run")
"""What is forked by itself; a worker of a test says so."""
START_S_MAX = 60.0
sharing = False
"""Whether there is a template; `conftest.py` says so. `make kills` and `make bench` have none."""
_shared = False


def variables(**more: str) -> dict[str, str]:
    """The environment of a program that imports what this process does."""
    share_template()
    paths = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
    once = dict.fromkeys(path for path in paths if path)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(once), **more}


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables for a while; processes that start meanwhile have them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def share_template() -> None:
    """Start the template of this run, once, unless whoever started it has one to share; whatever
    starts from then on finds it."""
    global _shared
    if _shared or not sharing or not client.possible():
        return
    _shared = True
    if client.SOCKET_VARIABLE in os.environ:
        return
    path = f"{tempfile.mkdtemp(prefix='tinsmith-')}/template"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(socket.SOMAXCONN)
        template = client.spawn(PRELOAD, listener)
    os.environ[client.SOCKET_VARIABLE] = path
    atexit.register(_end, template, path)


def _end(template: subprocess.Popen[bytes], path: str) -> None:
    template.kill()
    template.wait()
    os.unlink(path)
    os.rmdir(os.path.dirname(path))


class Fork:
    """A forked program, as `subprocess.Popen` would have it.

    Attributes:
        pid: Its process id.
        returncode: None while nobody has seen its end.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.returncode: int | None = None
        self._connection = connection
        self._lines = connection.makefile("rb")
        self.pid = self._reply()["pid"]

    def _reply(self) -> dict[str, int]:
        line = self._lines.readline()
        assert line, "the template is gone"
        reply: dict[str, int] = json.loads(line)
        return reply

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends; returns its exit status."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked program", timeout or 0)
            self.returncode = self._reply()["status"]
            self._connection.close()
            self._lines.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(15)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(9)


class Ended(Exception):
    """A program ended before what was waited for; the message is what it said."""


Program = Fork | subprocess.Popen[bytes]


def start(
    module: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
    folder: Path | None = None,
    forked: bool | None = None,
) -> Program:
    """Start `python -P -m MODULE` in a session of its own.

    Args:
        module: What to run.
        arguments: Its arguments.
        env: Its whole environment; None is that of this process.
        stdout: Where it goes; None is where this process's goes. `stderr` likewise.
        folder: Its current folder.
        forked: Whether it is forked from the template; None for what is in `FORKED`.
    """
    environment = variables() if env is None else env
    forked = module in FORKED if forked is None else forked
    path = os.environ.get(client.SOCKET_VARIABLE, "")
    if not forked or not os.path.exists(path):
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=folder,
            start_new_session=True,
        )
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    with open(os.devnull, "rb") as nothing:
        out, error = (1 if stdout is None else stdout.fileno()), 2
        if stderr is not None:
            error = stderr.fileno()
        descriptors = (nothing.fileno(), out, error)
        client.ask(connection, module, arguments, environment, descriptors, str(folder or ""))
    return Fork(connection)


def run(
    module: str,
    *arguments: str,
    ranks: int = 0,
    timeout_s: float = 250,
    folder: Path | None = None,
    forked: bool | None = None,
    **more: str,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, or one for each rank of a process group.

    Args:
        module: What to run.
        arguments: Its arguments.
        ranks: Number of ranks; 0 is a process that knows of no group.
        timeout_s: All are killed after so long.
        folder: Their current folder.
        forked: See `start`.
        more: Variables beside this process's.

    Returns:
        What they wrote, one rank after the other; the status of the first that did not end with 0,
        with which the others are killed.
    """
    with contextlib.ExitStack() as stack:
        written = [
            tuple(stack.enter_context(tempfile.TemporaryFile()) for _ in ("stdout", "stderr"))
            for _ in range(max(ranks, 1))
        ]
        programs = []
        for group, (out, error) in zip(_groups(ranks), written, strict=True):
            env = variables(**more, **group)
            files = {"stdout": out, "stderr": error}
            program = start(module, *arguments, env=env, folder=folder, forked=forked, **files)
            stack.callback(program.wait)
            stack.callback(program.kill)
            programs.append(program)
        status = _until_end(programs, timeout_s)
        texts = []
        for files in zip(*written, strict=True):
            for file in files:
                file.seek(0)
            texts.append("".join(file.read().decode(errors="replace") for file in files))
    return subprocess.CompletedProcess([module, *arguments], status, *texts)


def _groups(ranks: int) -> Sequence[Mapping[str, str]]:
    """What torchrun would say to each rank."""
    if not ranks:
        return [{}]
    port = ports.take()
    return [
        {
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "GROUP_RANK": "0",
        }
        for rank in range(ranks)
    ]


def _until_end(programs: Sequence[Program], timeout_s: float) -> int:
    end_s = time.monotonic() + timeout_s
    while True:
        ended = [program.poll() for program in programs]
        failed = [status for status in ended if status]
        if failed or None not in ended:
            return failed[0] if failed else 0
        if time.monotonic() > end_s:
            raise subprocess.TimeoutExpired("programs", timeout_s)
        time.sleep(0.01)


class Logged:
    """A program that writes to a log; a context manager that kills it.

    Args:
        log: Where its standard output and error go.
        module: What to run; `arguments`, `env`, `folder` and `forked` as in `start`.

    Attributes:
        process: The program.
        log: Its log.
    """

    def __init__(
        self,
        log: Path,
        module: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
        forked: bool | None = None,
    ) -> None:
        self.log = log
        with log.open("wb") as file:
            files = {"stdout": file, "stderr": file}
            self.process = start(module, *arguments, env=env, folder=folder, forked=forked, **files)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def said(self) -> str:
        """All that its log has."""
        return self.log.read_text()

    def says(self, text: str) -> bool:
        """Whether its log has a text."""
        return text in self.said

    def until(self, true: Callable[[], object]) -> None:
        """Wait until something is true while it runs.

        Raises:
            Ended: It does not run any more.
        """
        end_s = time.monotonic() + START_S_MAX
        while True:
            ended = self.process.poll() is not None  # before the look: the last thing counts, too
            if true():
                return
            if ended:
                raise Ended(self.said[-3000:])
            assert time.monotonic() < end_s, self.said[-3000:]
            time.sleep(0.005)

    def port_in(self, file: Path) -> int:
        """The port that it writes down."""
        self.until(file.exists)
        return int(file.read_text())

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait until it ends; returns its exit status."""
        return self.process.wait(START_S_MAX)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            error.add_note(f"--- {self.log.name}\n{self.said[-3000:]}")
        self.kill()
