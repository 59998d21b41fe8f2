"""Programs that are forked from a template are like those that Python starts, and end as surely."""

import contextlib
import json
import os
import re
import resource
import select
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import programs
from clusters import until_gone
from faults.processes import hung
from tinsmithd.processes.template import Forked, Launch, Template, TemplateError, client

PROBE = "template_probe"


def said(*, forked: bool, **variables: str) -> dict[str, object]:
    done = programs.run(PROBE, "say", "a b", "", forked=forked, **variables)
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_a_fork_is_as_if_python_had_started_it(tmp_path: Path) -> None:
    """Arguments, variables, folder, path, session, descriptors, limits, threads of torch,
    failpoints, and what `sitecustomize` does."""
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['SITE_SAYS'] = 'hello'")
    path = os.pathsep.join([str(tmp_path), programs.variables()["PYTHONPATH"]])
    for variables in (
        {"OMP_NUM_THREADS": "2", "TINSMITH_FAILPOINTS": "mid_optim:raise@3", "PYTHONPATH": path},
        {"OMP_NUM_THREADS": "1"},
    ):
        started = said(forked=False, **variables)
        assert said(forked=True, **variables) == started
        assert started["sitecustomized"] == ("hello" if "PYTHONPATH" in variables else None)


def test_limits_are_those_of_who_asks_not_of_who_started_the_template() -> None:
    """Somebody lowers what its programs may open, long after the template began."""
    said(forked=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        lower = said(forked=True)["limits"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert re.search(rf"Max open files +{soft - 1} ", str(lower))


def test_forks_draw_other_numbers_than_each_other() -> None:
    """Chance is not inherited."""
    first, second = (programs.run(PROBE, "chance", forked=True).stdout.split() for _ in range(2))
    assert len(first) == len(second) == 2
    assert not set(first) & set(second)


@asynccontextmanager
async def template(*modules: str) -> AsyncIterator[Template]:
    """One that finds what this folder has."""
    path = programs.variables()["PYTHONPATH"]
    with (
        programs.environment(PYTHONPATH=path),
        contextlib.closing(Template(*modules)) as opened,
    ):
        yield opened


@pytest.mark.parametrize(("what", "status"), [("exit", 0), ("exit", 7), ("die", 9), ("die", 15)])
async def test_the_status_of_a_program_is_told(what: str, status: int) -> None:
    """An exit status, or minus the signal."""
    async with template("json") as opened:
        program = await opened.fork(Launch(PROBE, [what, str(status)], programs.variables()))
        assert await program.wait() == (status if what == "exit" else -status)
        assert program.returncode == await program.wait()
        program.kill()  # has no effect


async def test_a_program_ends_with_its_template_and_the_next_start_has_a_new_one() -> None:
    """Whoever waits for it hears that it was killed, even where it had been stopped."""
    async with template("json") as opened:
        program = await opened.fork(Launch(PROBE, ["sleep"], programs.variables()))
        program.send_signal(signal.SIGSTOP)
        opened.close()
        assert await program.wait() == -signal.SIGKILL
        until_gone([program.pid])
        program = await opened.fork(Launch(PROBE, ["exit", "3"], programs.variables()))
        assert await program.wait() == 3


def test_nothing_outlives_whoever_started_a_template(tmp_path: Path) -> None:
    """Not even a stopped program."""
    with (tmp_path / "out").open("w+b") as out:
        holder = programs.start(PROBE, "hold", stdout=out, forked=False)
        while not (words := (tmp_path / "out").read_text().split()):
            assert holder.poll() is None
            time.sleep(0.01)
    pids = list(map(int, words))
    os.kill(pids[1], signal.SIGSTOP)
    holder.kill()
    holder.wait()
    until_gone(pids)


def parent_of(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1])


class Asker:
    """Asks a template that listens for a program that sleeps."""

    def __init__(self, path: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(path))
        client.ask(self._connection, PROBE, ["sleep"], programs.variables(), (0, 1, 2))
        with self._connection.makefile("rb") as lines:
            self.pid: int = json.loads(lines.readline())["pid"]

    def kill(self) -> None:
        """End the program; returns when only its parent does not know."""
        process = os.pidfd_open(self.pid)
        os.kill(self.pid, signal.SIGKILL)
        select.select([process], [], [])
        os.close(process)

    def go(self) -> None:
        """Want it no more."""
        self._connection.close()


@pytest.mark.parametrize("steps", [(Asker.kill, Asker.go), (Asker.go, Asker.kill)])
def test_what_ends_while_its_asker_goes_ends_nothing_else(
    tmp_path: Path, steps: Sequence[Callable[[Asker], None]]
) -> None:
    """A program has ended, and who wanted it has gone, by the time that the template looks."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        template = client.spawn(("json",), listener)
    try:
        stays, *going = (Asker(path) for _ in range(4))
        with hung(template.pid):
            for step in steps:
                for asker in going:
                    step(asker)
        until_gone([asker.pid for asker in going])
        assert Asker(path).pid
        assert os.path.exists(f"/proc/{stays.pid}")
    finally:
        template.kill()
        template.wait()


def until_done(opened: Template) -> None:
    """Wait until a template has done all that it was asked for: it takes one after the other."""
    with opened._connect() as connection:
        connection.shutdown(socket.SHUT_WR)
        assert not connection.recv(1)


async def test_a_program_for_which_there_is_no_room_ends_no_other() -> None:
    """Neither a process nor a descriptor for it is to be had; and an asker that goes half-way
    leaves nothing behind."""
    async with template("template_full") as opened:
        launch = Launch(PROBE, ["sleep"], programs.variables())
        stays = await opened.fork(launch)
        until_done(opened)  # the program has said who it is, maybe before the template went on
        descriptors = Path(f"/proc/{parent_of(stays.pid)}/fd")
        held = []
        for length in (1, 1 << 31):
            with opened._connect() as connection:
                socket.send_fds(connection, [length.to_bytes(4, "big")], [0, 1, 2])
                connection.shutdown(socket.SHUT_WR)
                # It is let go: the template, which does one thing after the other, has done all.
                assert connection.recv(1) == b""
            held.append(len(list(descriptors.iterdir())))
        for _ in range(2):  # see `template_full`
            with pytest.raises(TemplateError, match="no room"):
                await opened.fork(launch)
            held.append(len(list(descriptors.iterdir())))
        assert len(set(held)) == 1, held
        program = await opened.fork(Launch(PROBE, ["exit", "3"], programs.variables()))
        assert await program.wait() == 3
        assert stays.returncode is None


async def test_a_template_that_has_threads_does_not_fork(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its starter is told at once, and programs start in the ordinary way."""
    async with template("template_threads") as opened:
        with pytest.raises(TemplateError, match="the template process ended"):
            await opened.fork(Launch(PROBE, ["exit", "0"], programs.variables()))
        assert "it has 2 threads after its imports" in capfd.readouterr().err
        program = await opened.start(Launch(PROBE, ["exit", "3"], programs.variables()))
        assert not isinstance(program, Forked)
        assert await program.wait() == 3
