"""Who is in a rank group and whether they live, over a real TCPStore."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from tinsmithd.trainer.process_group import heartbeat
from tinsmithd.trainer.process_group.heartbeat import (
    Group,
    Heartbeat,
    Loss,
    MeetError,
    Member,
    meet,
)

TIMEOUT_S = 1.0


class Polls(threading.local):
    """A clock of each thread, which goes on while that one waits for its next look alone: on a
    machine that stands still nobody is late."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self.now_s += seconds


@pytest.fixture(autouse=True)
def _time_is_counted_in_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "time", Polls())


class Losses:
    """What one rank was told; `wait` for it."""

    def __init__(self) -> None:
        self.loss: Loss | None = None
        self._told = threading.Event()

    def __call__(self, loss: Loss) -> None:
        assert self.loss is None, "told twice"
        self.loss = loss
        self._told.set()

    def wait(self, timeout_s: float = 30.0) -> Loss | None:
        """The loss, or None where there is none for so long."""
        self._told.wait(timeout_s)
        return self.loss


@pytest.fixture
def store() -> dist.TCPStore:
    """A store whose server is in this process."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet_all(store: dist.TCPStore, size: int, ranks: range | None = None) -> list[Group]:
    """Let ranks meet, each from a thread with a connection of its own."""

    def one(rank: int) -> Group:
        me = Member(node="0", pid=rank)
        return meet(store.clone(), rank, size, me, timeout_s=1.0 if ranks else 30.0)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(one, ranks or range(size)))


Beats = Callable[[int], tuple[list[Heartbeat], list[Losses]]]


@pytest.fixture
def beats(store: dist.TCPStore) -> Iterator[Beats]:
    """Starts the heartbeats of so many ranks."""
    running: list[Heartbeat] = []

    def start(size: int) -> tuple[list[Heartbeat], list[Losses]]:
        losses = [Losses() for _ in range(size)]
        for rank, group in enumerate(meet_all(store, size)):
            beat = Heartbeat(store.clone(), group, rank, timeout_s=TIMEOUT_S, on_loss=losses[rank])
            beat.start()
            running.append(beat)
        return running, losses

    yield start
    for beat in running:
        beat.close()


def test_ranks_meet_anew_in_a_store_that_remembers_earlier_groups(store: dist.TCPStore) -> None:
    """All agree on the members, and no group is taken for an earlier one."""
    seen = []
    for size in (3, 3, 2):
        groups = meet_all(store, size)
        assert all(group == groups[0] for group in groups)
        assert [member.pid for member in groups[0].members] == list(range(size))
        seen.append(groups[0].id)
    assert len(set(seen)) == 3


def test_a_rank_that_does_not_come_is_named(store: dist.TCPStore) -> None:
    """Its arrival in an earlier group does not count."""
    with pytest.raises(MeetError, match="no sign of ranks 2"):
        meet_all(store, 3, range(2))
    meet_all(store, 3)
    with pytest.raises(MeetError, match="no sign of ranks 2"):
        meet_all(store, 3, range(2))


def test_a_silent_rank_is_named_to_each_of_the_others(beats: Beats) -> None:
    """By its number, with how long it was silent, once."""
    running, losses = beats(3)
    assert losses[0].wait(3 * TIMEOUT_S) is None
    running[1].close()
    for rank in (0, 2):
        loss = losses[rank].wait()
        assert loss is not None
        assert loss.silent == (1,)
        assert not loss.orderly
        assert loss.message.startswith("rank 1 gave no sign of life for ")
    assert losses[1].loss is None


def test_a_rank_that_says_goodbye_is_no_alarm(beats: Beats) -> None:
    """The others are told that it was ended on purpose, and can ask why their collective failed."""
    running, losses = beats(2)
    assert running[0].rank_that_left() is None
    running[1].leave()
    assert running[0].rank_that_left() == 1
    running[1].close()
    loss = losses[0].wait()
    assert loss is not None
    assert loss.orderly
    assert loss.silent == ()
    assert "rank 1 was ended" in loss.message


def test_ranks_that_leave_together_are_told_nothing(beats: Beats, store: dist.TCPStore) -> None:
    """Nobody is lost, however long they take to end."""
    running, losses = beats(2)
    for beat in running:
        beat.leave()
    for beat in running:
        beat.close()
    assert losses[0].wait(2 * TIMEOUT_S) is None
    assert losses[1].loss is None


SERVER = """
import sys, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("signum", "says"), [(9, "is gone"), (19, "has not answered for")])
def test_a_store_that_is_gone_or_stands_still_ends_the_group(signum: int, says: str) -> None:
    """Killed, its connection breaks; stopped (or a node without power), it says nothing at all."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        groups, losses = meet_all(store, 2), [Losses(), Losses()]
        for rank in range(2):
            Heartbeat(
                store.clone(), groups[rank], rank, timeout_s=TIMEOUT_S, on_loss=losses[rank]
            ).start()
        server.send_signal(signum)
        for told in losses:
            loss = told.wait()
            assert loss is not None
            assert says in loss.message
            assert not loss.orderly
    finally:
        server.kill()
        server.wait()


def test_the_heart_beats_on_while_torch_computes(beats: Beats) -> None:
    """Operations that take seconds each, forward and backward, hold nobody back."""
    _, losses = beats(2)
    matrix = torch.randn(4096, 4096, requires_grad=True)
    (matrix @ matrix).sum().backward()
    # Silence would be noticed only now, if the threads had been held back.
    assert losses[0].wait(2 * TIMEOUT_S) is None
    assert losses[1].loss is None
