"""What peers may take of a server: bounded in all and for each, and given back whatever happens."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tinsmithd.config import CheckpointConfig, ConfigError, TrainingConfig
from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.rpc import reads as reads_module
from tinsmithd.rpc.budget import Budget
from tinsmithd.rpc.flow import peer_host
from tinsmithd.rpc.reads import Reads
from tinsmithd.rpc.server import connections_max


def refusal_of(lease: object, amount: int) -> dict[str, str]:
    with pytest.raises(ResourceExhausted) as refused:
        lease.take(amount)  # type: ignore[attr-defined]
    assert refused.value.reason is Reason.SERVER_BUSY
    assert refused.value.retry_after_s
    return refused.value.metadata


def test_one_peer_has_its_share_and_all_have_the_whole() -> None:
    """Each refusal names its limit and takes nothing."""
    budget = Budget("received_bytes_max", 100, 0.5)
    first, second, third = (budget.lease(peer) for peer in "abc")
    first.take(50)
    assert refusal_of(first, 1) == {"limit": "peer_share_max", "value": "51"}
    assert refusal_of(budget.lease("a"), 1)["limit"] == "peer_share_max"
    second.take(40)
    assert refusal_of(third, 11) == {"limit": "received_bytes_max", "value": "101"}
    third.take(10)
    first.give_back()
    first.give_back()
    third.take(40)
    assert budget.taken == 90


def test_a_share_is_at_least_one() -> None:
    """A small server still serves everybody."""
    with Budget("concurrent_calls_max", 1, 0.1).lease("a") as lease:
        lease.take(1)


def test_what_is_taken_is_given_back_whatever_happens() -> None:
    """From many threads, with refusals and errors in between."""
    budget = Budget("staged_bytes_max", 100, 0.5)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            try:
                with budget.lease(rng.choice("abc")) as lease:
                    lease.take(rng.randint(1, 30))
                    lease.take(rng.randint(1, 30))
                    assert budget.taken <= 100
                    raise KeyError
            except (KeyError, ResourceExhausted):
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert budget.taken == 0
    assert not budget._by_peer


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.1.2.3:40000", "10.1.2.3"),
        ("ipv6:%5B::1%5D:40000", "::/64"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:40000", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:40000", "fe80::/64"),
        ("ipv6:%5B::ffff:10.1.2.3%5D:40000", "10.1.2.3"),
        ("unix:", "unix"),
        ("unix-abstract:x", "unix-abstract"),
    ],
)
def test_a_peer_is_a_host(peer: str, host: str) -> None:
    """Its port does not count, nor which of its IPv6 addresses it is: both are free."""
    assert peer_host(peer) == host


def test_limits_that_could_never_let_a_legal_call_in_stop_a_server() -> None:
    """A peer's share holds one call of the largest size."""
    with pytest.raises(ConfigError, match=r"training\.received_bytes_max"):
        TrainingConfig(call_bytes_max=2**29, received_bytes_max=2**29)
    TrainingConfig(call_bytes_max=2**29, received_bytes_max=2**29, peer_share_max=1)
    with pytest.raises(ConfigError, match=r"checkpoint\.staged_bytes_max"):
        CheckpointConfig(staged_bytes_max=2**36)
    for share in (0, 1.5, -1):
        with pytest.raises(ConfigError, match="peer_share_max"):
            CheckpointConfig(peer_share_max=share)


def test_connections_leave_descriptors_to_the_servers_own_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A quarter of what there is, and at most 1,024."""
    for files, taken in ((1024, 768), (1_048_576, 1_047_552), (-1, 2**31 - 1)):
        monkeypatch.setattr("resource.getrlimit", lambda _, files=files: (files, files))
        assert connections_max(CheckpointConfig()) == taken
    assert connections_max(CheckpointConfig(connections_max=7)) == 7


class Reader:
    """A read, and how it was ended."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    def stalled(self) -> None:
        self.ends.append("stalled")

    def squeezed(self) -> None:
        self.ends.append("squeezed")


def reads_at(monkeypatch: pytest.MonkeyPatch, reads: Reads, since_s: float) -> Reader:
    """A read that began then."""
    reader = Reader()
    monkeypatch.setattr("time.monotonic", lambda: since_s)
    reads.began(reader)
    return reader


def test_a_read_that_takes_too_long_is_ended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that got its message, nor one that began later."""
    reads = Reads(3.0, 50, 50)
    old, done, new = (reads_at(monkeypatch, reads, since_s) for since_s in (0.0, 0.1, 2.0))
    reads.ended(done)
    for now_s in (2.9, 3.0, 3.1, 4.9):
        reads.look(now_s)
    assert (old.ends, done.ends, new.ends) == (["stalled"], [], [])


def test_half_messages_are_ended_only_while_the_process_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A read that has just begun is left alone, and so are all where their number cannot be why, or
    what was taken in is, or the process has its size for long."""
    rss = [100]
    monkeypatch.setattr(reads_module, "rss_bytes", lambda: rss[0])

    def watched(message_bytes_max: int) -> tuple[Reads, Reader, Reader]:
        rss[0] = 100
        reads = Reads(100.0, 50, message_bytes_max)
        old, new = (reads_at(monkeypatch, reads, since_s) for since_s in (0.0, 9.99))
        reads.look(10.0)
        rss[0] = 151
        return reads, old, new

    reads, old, new = watched(50)
    reads.look(10.0)
    reads.look(10.0)
    assert (old.ends, new.ends) == (["squeezed"], [])
    reads, old, new = watched(49)
    reads.look(10.0)
    assert old.ends == new.ends == []
    reads, old, new = watched(50)
    reads.kept(1)
    reads.look(10.0)
    assert old.ends == new.ends == []
    for reader in (old, new):
        reads.ended(reader)
    rss[0] = 200
    for _ in range(round(100.0 / reads_module.INTERVAL_S)):  # as long as the window
        reads.look(10.0)
    later = reads_at(monkeypatch, reads, 5.0)
    reads.look(10.0)
    assert later.ends == []
