"""That the harness finds what it is to find: a stopped server, one that grows, one that dies."""

import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from attack.harness import HEALTH_S_MAX, MIB, Memory, Prober, own_faults, target_of, watching
from faults.processes import Process, hung


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A Checkpoint server: the lightest one."""
    folder = tmp_path_factory.mktemp("watched")
    with Process("checkpoint", folder, {"data_folder": folder / "data"}) as process:
        yield process


def test_a_server_that_is_left_alone_passes(server: Process) -> None:
    """Health was asked, and answered."""
    with watching([target_of("checkpoint", server)]) as watch:
        time.sleep(0.3)
    assert len(watch.health["checkpoint"].took_s) >= 3


def connections_to(port: int) -> set[str]:
    """Where those come from that a server of this machine has, or is about to take."""
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, own, other, state, *_ = row.split()
            if other.endswith(f":{port:04X}") and state == "01":
                found.add(own)
    return found


def test_a_stop_of_a_second_is_seen_in_health(server: Process) -> None:
    """A process that is stopped is not one that waits for a core."""

    def stop_for_a_second() -> None:
        since_s: dict[str, float] = {}
        with watching([target_of("checkpoint", server)]), hung(server.pid):
            while not any(time.monotonic() - begun_s > 1.2 for begun_s in since_s.values()):
                now_s = time.monotonic()
                since_s = {each: since_s.get(each, now_s) for each in connections_to(server.port)}
                time.sleep(0.02)

    with pytest.raises(AssertionError, match="health of checkpoint"):
        stop_for_a_second()


def test_waiting_for_a_core_is_taken_off(server: Process) -> None:
    """With the machine's cores taken many times over, a server that does nothing still passes."""
    burners = [
        threading.Thread(target=os.system, args=(f"timeout 1 {loop}",))
        for loop in ["sh -c 'while :; do :; done'"] * 8
    ]
    for burner in burners:
        burner.start()
    prober = Prober(server.pid, f"127.0.0.1:{server.port}")
    for burner in burners:
        burner.join()
    health = prober.stop()
    assert health.slowest_s <= HEALTH_S_MAX, health.slowest_raw_s
    assert not health.failures


def test_growth_counts_what_was_given_back_too() -> None:
    """The most that a process had, not what it ended with."""
    meter = Memory(os.getpid())
    # Not what malloc gives: that may be memory which this process has had all along.
    with mmap.mmap(-1, 64 * MIB) as block:
        block.write(b"x" * len(block))
    assert meter.growth_bytes > 60 * MIB


def test_an_answer_of_internal_fails(server: Process) -> None:
    """So does a line of a log that has a stack trace."""
    watched = watching([target_of("checkpoint", server)])
    with pytest.raises(AssertionError, match="INTERNAL"), watched as watch:
        watch.answered(grpc.StatusCode.INTERNAL)


def test_faults_in_a_log_are_found(tmp_path: Path) -> None:
    """From a byte on, and from the start of a log that was replaced."""
    log = tmp_path / "log"
    log.write_text("all is well\nTraceback (most recent call last):\n")
    assert own_faults(log) == ["Traceback (most recent call last):"]
    assert own_faults(log, log.stat().st_size) == []
    assert own_faults(log, 10_000) == ["Traceback (most recent call last):"]
