"""Which machine of a group this is, and how machines meet."""

import asyncio
import json
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tinsmithd.config import ConfigError
from tinsmithd.trainer.process_group import nodes
from tinsmithd.trainer.process_group.devices import devices
from tinsmithd.trainer.process_group.nodes import Meeting, Place

SECRET = "s" * 32
LINE_S_MAX = 20


@pytest.mark.parametrize(
    ("count", "name", "node", "address"),
    [
        (1, "laptop", 0, ""),
        (2, "0", 0, "0.trainer:29500"),
        (2, "trainer-1", 1, "trainer-0.trainer:29500"),
        (2, "trainer-3", 1, "trainer-2.trainer:29500"),
        (4, "a1-b-11", 3, "a1-b-8.trainer:29500"),
    ],
)
def test_a_name_says_which_machine_it_is(count: int, name: str, node: int, address: str) -> None:
    found = nodes.place(count, name, 2, "{first}.trainer:29500")
    assert (found.node, found.address) == (node, address)


@pytest.mark.parametrize(
    ("name", "address", "said"),
    [
        ("laptop", "a:1", "trainer.node: "),
        ("1", "", "trainer.meet_address: must be set"),
        ("1", "a:0", "trainer.meet_address: needs a port"),
    ],
)
def test_what_is_missing_is_named(name: str, address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        nodes.place(2, name, 1, address)


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def meet(address: str, secrets: Sequence[str]) -> "list[Meeting]":
    with ThreadPoolExecutor(len(secrets)) as pool:
        places = [Place(node, len(secrets), 1, address) for node in range(len(secrets))]
        met = [pool.submit(nodes.meet, *each) for each in zip(places, secrets, strict=True)]
        return [each.result(LINE_S_MAX) for each in met]


def close(met: Sequence[Meeting]) -> None:
    for meeting in met:
        for link in meeting.links:
            link.close()
        if meeting.store is not None:
            socket.socket(fileno=meeting.store).close()


def test_all_machines_know_one_store() -> None:
    met = meet(free_address(), [SECRET] * 3)
    assert len({meeting.port for meeting in met}) == 1
    assert [meeting.store is None for meeting in met] == [False, True, True]
    assert [len(meeting.links) for meeting in met] == [2, 1, 1]
    close(met)


def test_the_end_of_one_is_seen_by_the_first() -> None:
    met = meet(free_address(), [SECRET] * 2)
    met[1].links[0].close()
    (link,) = met[0].links
    link.settimeout(LINE_S_MAX)
    assert link.recv(1) == b""
    close(met)


HOSTILE = (
    b"\n",
    b"[" * 600,
    b"null\n",
    b'{"node": 1, "nonce": "", "proof": "0"}\n',
    b'{"node": 1, "proof": 7}\n',
    b"\xff\xfe\n",
    b"x" * 10_000,
    b"",
)


def test_who_has_no_secret_is_no_machine(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it says, and though it says nothing."""
    address = free_address()
    host, port = address.split(":")
    done = threading.Event()

    def pester() -> None:
        silent = []
        while not done.is_set():
            for said in HOSTILE:
                try:
                    link = socket.create_connection((host, int(port)), 5)
                except OSError:
                    continue
                silent.append(link)
                link.settimeout(0.2)
                try:
                    assert json.loads(link.recv(1024))["nonce"]
                    link.sendall(said)
                except (OSError, ValueError):  # not accepted among so many
                    pass
            for link in silent[:-8]:
                link.close()
            del silent[:-8]

    thread = threading.Thread(target=pester)
    thread.start()
    try:
        with caplog.at_level("WARNING"):
            met = meet(address, [SECRET] * 2)
    finally:
        done.set()
        thread.join()
    assert [len(meeting.links) for meeting in met] == [1, 1]
    assert not [record for record in caplog.records if record.exc_info]
    close(met)


async def test_machines_with_another_secret_or_size_wait() -> None:
    """The group of the others goes on without them."""
    address = free_address()
    wrong = nodes._join(Place(1, 2, 1, address), "t" * 32)
    other = nodes._join(Place(1, 2, 4, address), SECRET)
    first = asyncio.create_task(nodes._lead(Place(0, 2, 1, address), SECRET))
    for joining in (wrong, other):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(joining, 1.0)
    assert not first.done()
    second = await asyncio.wait_for(nodes._join(Place(1, 2, 1, address), SECRET), LINE_S_MAX)
    close([await first, second])


def test_gpus_are_counted_by_their_files(tmp_path: Path) -> None:
    assert devices(tmp_path) == 1
    for name in ("nvidia0", "nvidia1", "nvidia7", "nvidiactl", "nvidia-uvm", "nvidia0a"):
        (tmp_path / name).touch()
    assert devices(tmp_path) == 3
