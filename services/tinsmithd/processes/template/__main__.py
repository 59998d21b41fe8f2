"""`python -m tinsmithd.processes.template SOCKET STARTER FORM MODULE... ROOM`: imports, then forks.

A program that is forked here is, to others and to itself, as if it had been started anew: it has
the variables, the arguments, the descriptors, the session and the resource limits that were asked
for, and its name in the list of processes. What it does not have is to import what the template
has imported.

The template has one thread, and never touches an accelerator. It ends with whoever started it, and
all its programs end with it; each ends with the connection over which it was asked for, too.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import selectors
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from tinsmithd.processes.logs import log_to_stderr
from tinsmithd.processes.process import die_with_parent, give_up, wait_passively
from tinsmithd.processes.template.program import become

Limits = Sequence[tuple[int, tuple[int, int]]]
Wanted = tuple[str, Sequence[str], Mapping[str, str], str, Limits]
"""Module, arguments, environment, current folder, resource limits."""
REQUEST_S_MAX = 5.0
"""How long somebody who connects may take to say what they want."""


def main() -> None:
    """Serve until whoever started this process is gone."""
    source = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    wait_passively()
    for name in sys.argv[4:-1]:
        importlib.import_module(name)
    if why := _why_not():
        if sys.argv[3] == "json":
            log_to_stderr("ERROR", "template", "json")
        give_up("processes.template", why)
    gc.collect()
    gc.freeze()  # the collector would write to, and so copy, pages that programs share
    _Server(source).run()


def _why_not() -> str:
    """Why this process must not fork; empty if it may."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"it has {threads} threads after its imports"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return "there is a GPU"
    return ""


class _Server:
    """Forks one program for each connection, says its process id, and in the end its status.

    Args:
        source: Listens, or brings a connection with each byte.
    """

    def __init__(self, source: socket.socket) -> None:
        self._source = source
        self._listens = bool(source.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        self._selector = selectors.DefaultSelector()
        self._selector.register(source, selectors.EVENT_READ)
        self._connections: dict[int, socket.socket] = {}
        """By the descriptor of the program's process."""

    def run(self) -> NoReturn:
        while True:
            for key, _ in self._selector.select():
                if self._selector.get_map().get(key.fd) is not key:
                    continue  # it was let go for an event that came with this one
                if key.fileobj is self._source:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._gone(key.fileobj, key.data)
                else:
                    self._ended(key.fd, key.data)

    def _accept(self) -> None:
        connection = self._connection()
        connection.settimeout(REQUEST_S_MAX)
        try:
            wanted, descriptors = _read(connection)
        except (OSError, EOFError, ValueError):
            connection.close()
            return
        template = os.getpid()
        own: Sequence[int] = ()
        try:
            own = go, may_go = os.pipe()
            pid = os.fork()
        except OSError as error:
            _close(own)
            _refuse(connection, descriptors, wanted, error)
            return
        if not pid:
            die_with_parent(template)
            os.setsid()
            # Not before: it may still be refused, and whoever knows its id may stop it at once.
            os.read(go, 1)
            _close(own)
            _say(connection, pid=os.getpid())
            self._close(connection)
            for target, descriptor in enumerate(descriptors):
                os.dup2(descriptor, target)
                os.close(descriptor)
            module, arguments, environment, folder, limits = wanted
            os.chdir(folder)
            for number, (soft, hard) in limits:
                resource.setrlimit(number, (soft, hard))
            become(module, arguments, environment)
        try:
            process = os.pidfd_open(pid)
        except OSError as error:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            _close(own)
            _refuse(connection, descriptors, wanted, error)
            return
        os.write(may_go, b"+")
        _close(own)
        _close(descriptors)
        self._connections[process] = connection
        self._selector.register(process, selectors.EVENT_READ, pid)
        self._selector.register(connection, selectors.EVENT_READ, pid)

    def _close(self, connection: socket.socket) -> None:
        """Close in a fork what is the template's."""
        self._selector.close()
        for other in [self._source, connection, *self._connections.values()]:
            other.close()
        for process in self._connections:
            os.close(process)

    def _connection(self) -> socket.socket:
        if self._listens:
            return self._source.accept()[0]
        said, descriptors, _, _ = socket.recv_fds(self._source, 1, 1)
        if not said:
            sys.exit()
        return socket.socket(fileno=descriptors[0])

    def _gone(self, connection: socket.socket, pid: int) -> None:
        """Whoever wanted this program is gone."""
        self._selector.unregister(connection)
        os.kill(pid, signal.SIGKILL)

    def _ended(self, process: int, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        self._selector.unregister(process)
        os.close(process)
        connection = self._connections.pop(process)
        if connection in self._selector.get_map():
            self._selector.unregister(connection)
        _say(connection, status=os.waitstatus_to_exitcode(status))
        connection.close()


def _read(connection: socket.socket) -> tuple[Wanted, Sequence[int]]:
    said, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    try:
        with connection.makefile("rb") as file:
            body = file.read(int.from_bytes(said, "big"))
        if len(descriptors) != 3 or not body:
            raise EOFError
        module, arguments, environment, folder, limits = json.loads(body)
    except BaseException:
        _close(descriptors)
        raise
    return (module, arguments, environment, folder, limits), descriptors


def _refuse(
    connection: socket.socket, descriptors: Sequence[int], wanted: Wanted, error: OSError
) -> None:
    """There is no room for one more program; those that run go on."""
    print(f"no fork of {wanted[0]}: {error}", file=sys.stderr, flush=True)
    _close(descriptors)
    connection.close()


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _say(connection: socket.socket, **reply: int) -> None:
    with contextlib.suppress(OSError):  # whoever is gone is noticed by reading
        connection.sendall(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
