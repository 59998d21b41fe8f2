"""Starts the ranks of a group on this machine, and ends them all when one of them ends.

The ranks find each other as under torchrun: by the same variables and a store at `MASTER_ADDR`.
Where the group is on this machine alone, this module opens the store's socket on loopback and hands
it to rank 0, which serves the store on it: a store that opens its own socket listens on every
interface. With other machines, they meet first (`nodes`). A process that a template forked forks
the ranks, which then import nothing. See docs/adr/0008-ranks-without-torchrun.md.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from tinsmithd.config.fields import is_loopback
from tinsmithd.processes import EXIT_HOPELESS, template
from tinsmithd.trainer.process_group import nodes
from tinsmithd.trainer.process_group.heartbeat import EXIT_GROUP_LOST, EXIT_RANK_SILENT

STORE_FD = "TINSMITH_STORE_FD"
"""Variable that tells rank 0 the descriptor of the store's socket."""
STOP_S_MAX = 5.0
"""Maximum seconds that ranks take to end after SIGTERM."""
LAST_WORDS_S_MAX = 0.5
"""Maximum seconds between the first rank's end and the end of the others, by themselves."""
MODULE = "tinsmithd.trainer"
HOST = "127.0.0.1"
INTERFACE = "lo" if sys.platform == "linux" else "lo0"


def loopback_alone() -> dict[str, str]:
    """Variables with which no part of torch listens beyond this machine."""
    return {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE}


class Rank(Protocol):
    """What is used of the process of a rank."""

    @property
    def returncode(self) -> int | None:
        """Exit status; None while nobody knows of its end."""

    async def wait(self) -> int:
        """Wait until it ends; returns its exit status, below 0 the signal."""

    def send_signal(self, number: int) -> None:
        """Send it a signal."""


def run(place: nodes.Place, secret: str, set_up: Callable[[], None]) -> int:
    """Run this machine's ranks of a group until one ends or somebody asks this process to end.

    Args:
        place: Which machine this is, and how many ranks are on it.
        secret: What machines of one group show each other; unused where there is one.
        set_up: Sets this process up. Ranks are forked before that, since it starts threads.

    Returns:
        An exit status that says how the group ended: that of the rank that ended first, 128 and
        the signal's number where one killed it; `EXIT_HOPELESS` if any rank says so;
        `EXIT_GROUP_LOST` where those of another machine ended.
    """
    meeting = nodes.meet(place, secret) if place.nodes > 1 else _alone()
    # The ranks end with this process: see `_die_with_parent`.
    arguments = [*sys.argv[1:], f"--live-with-pid={os.getpid()}"]
    environments = [
        {**os.environ, **_variables(rank, place, meeting)} for rank in range(place.ranks)
    ]
    ours = [link.fileno() for link in meeting.links]
    store = [] if meeting.store is None else [meeting.store]
    forked = [
        template.fork(MODULE, arguments, environment, without=[*ours, *(store if rank else [])])
        for rank, environment in enumerate(environments if template.is_forked() else ())
    ]
    set_up()
    return asyncio.run(_run(arguments, environments, meeting, forked))


def _alone() -> nodes.Meeting:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(socket.SOMAXCONN)
        port = listener.getsockname()[1]
        return nodes.Meeting(HOST, port, listener.detach())


async def _run(
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    meeting: nodes.Meeting,
    forked: Sequence[Rank],
) -> int:
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[int] = loop.create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _answer, asked, 128 + number)
    store = [] if meeting.store is None else [meeting.store]
    ranks = forked or [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", MODULE, *arguments),
            env=environment,
            pass_fds=() if rank else store,
        )
        for rank, environment in enumerate(environments)
    ]
    for descriptor in store:
        os.close(descriptor)
    elsewhere: asyncio.Future[int] = loop.create_future()
    for link in meeting.links:
        loop.add_reader(link, _answer, elsewhere, EXIT_GROUP_LOST)
    ends = [asyncio.create_task(rank.wait()) for rank in ranks]
    statuses: list[int] = []
    for end in ends:
        end.add_done_callback(lambda ended: statuses.append(ended.result()))
    await asyncio.wait([asked, elsewhere, *ends], return_when=asyncio.FIRST_COMPLETED)
    if asked.done():
        _signal(ranks, signal.SIGTERM)
        await asyncio.wait(ends, timeout=STOP_S_MAX)
    else:
        # Ranks of other machines may say why, too.
        await asyncio.wait(ends, timeout=LAST_WORDS_S_MAX)
    for link in meeting.links:
        loop.remove_reader(link)
        link.close()
    by_themselves = list(statuses)
    _signal(ranks, signal.SIGKILL)
    await asyncio.wait(ends)
    return asked.result() if asked.done() else group_status(by_themselves)


def _answer(asked: asyncio.Future[int], status: int) -> None:
    if not asked.done():
        asked.set_result(status)


def _signal(ranks: Sequence[Rank], number: int) -> None:
    for rank in ranks:
        if rank.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(number)


def _variables(rank: int, place: nodes.Place, meeting: nodes.Meeting) -> Mapping[str, str]:
    """The variables that torchrun would set, and the descriptor of the store's socket.

    Args:
        rank: Number of the rank on this machine.
        place: Which machine this is.
        meeting: Where the ranks meet.
    """
    first = place.node * place.ranks
    one_machine = place.nodes == 1 or is_loopback(place.address)
    return {
        # As under torchrun: with a thread per core in each rank, the ranks would slow each other.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        **(loopback_alone() if one_machine else {}),
        "MASTER_ADDR": meeting.host,
        "MASTER_PORT": str(meeting.port),
        STORE_FD: "" if first + rank else str(meeting.store),
        "RANK": str(first + rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(place.nodes * place.ranks),
        "LOCAL_WORLD_SIZE": str(place.ranks),
        "GROUP_RANK": str(place.node),
        "GROUP_WORLD_SIZE": str(place.nodes),
    }


def group_status(statuses: Sequence[int]) -> int:
    """The exit status of a group.

    Args:
        statuses: Exit statuses as `subprocess` gives them, of the ranks that ended by themselves,
            in the order of their ends.
    """
    ended = [status if status >= 0 else 128 - status for status in statuses]
    for told in (EXIT_HOPELESS, EXIT_RANK_SILENT):
        if told in ended:
            return told
    # Ranks that only followed another one have this status.
    return next((status for status in ended if status != EXIT_GROUP_LOST), EXIT_GROUP_LOST)
