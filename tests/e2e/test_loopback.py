"""A cluster of `tinsmith up` is this machine's alone."""

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters import RunningCluster, children, rank_groups

LISTENS = "0A"
"""State of a socket in /proc/net/tcp."""


def everyone_below(pid: int) -> Iterator[int]:
    """A process and all that it started, and so on."""
    yield pid
    for child in [*children(pid), *rank_groups(pid)]:
        yield from everyone_below(child)


def inodes_of(pid: int) -> set[str]:
    """The sockets that a process has open."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(entry.readlink()))
    return {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}


def listening(pid: int) -> list[str]:
    """`host:port` of all that a process listens on."""
    found = []
    inodes = inodes_of(pid)
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == LISTENS and columns[9] in inodes:
                words, _, port = columns[1].rpartition(":")
                packed = b"".join(
                    struct.pack("=I", int(words[i : i + 8], 16)) for i in range(0, len(words), 8)
                )
                found.append(f"{socket.inet_ntop(family, packed)}:{int(port, 16)}")
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; grpc writes IPv4 ones as IPv6."""
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def hosts_of(cluster: RunningCluster) -> list[str]:
    """Where the processes of a cluster listen, once for each port."""
    found = {
        pid: listening(pid)
        for name in cluster.addresses
        for pid in everyone_below(cluster.pid(name))
    }
    assert set(cluster.rank_pids()) < set(found)
    return [address.rpartition(":")[0] for every in found.values() for address in every]


def test_it_sees_who_listens_everywhere() -> None:
    """The test below could find something."""
    with (
        socket.create_server(("0.0.0.0", 0)) as everywhere,
        socket.create_server(("127.0.0.1", 0)) as here,
    ):
        found = listening(os.getpid())
        assert f"0.0.0.0:{everywhere.getsockname()[1]}" in found
        assert f"127.0.0.1:{here.getsockname()[1]}" in found
        assert [is_loopback(at.rpartition(":")[0]) for at in found].count(False) == 1


def test_nothing_of_a_loopback_cluster_listens_elsewhere(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers, metrics, the rank link, the ranks' store and what they connect each other with; not
    even where the environment names another interface for jobs of its own."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "eth0")
    for server in ("TRAINING", "SAMPLER", "CHECKPOINT"):
        monkeypatch.setenv(f"TINSMITH_{server}_METRICS_ADDRESS", "127.0.0.1:0")
    with RunningCluster(tiny_model, tmp_path, ranks=2) as cluster:
        at = hosts_of(cluster)
    assert len(at) >= 3 + 3 + 1 + 1 + 2  # servers, their metrics, the link, the store, gloo
    assert [host for host in at if not is_loopback(host)] == []


def test_nor_does_anything_of_a_cluster_with_one_rank(cluster: RunningCluster) -> None:
    """A process group of one has nobody to connect to."""
    at = hosts_of(cluster)
    assert len(at) >= 3 + 1  # servers, the link
    assert [host for host in at if not is_loopback(host)] == []
