"""Row 8: the Checkpoint server dies at every moment of a save. Real processes, real SIGKILL.

`make test` has a short round; in full each failpoint has ten crashes per kind of write, 120 in all,
and the unaimed kills are 20.
"""

import random
import signal
import threading
import time
from pathlib import Path

import grpc
import pytest

from checkpoints import PATH, ServerProcess, blobs, files, left_staged
from faults.amount import amount

CRASHES = amount(1, full=10)
KILLS = amount(2, full=20)
FILES = 4
AFTER_COMMIT = "ckpt_post_commit"
FAILPOINTS = (
    "ckpt_mid_write",
    "ckpt_pre_fsync",
    "ckpt_pre_rename",
    "ckpt_mid_rename",
    "ckpt_post_rename",
    AFTER_COMMIT,
)
BYSTANDER = "tinsmith://run/weights/bystander"


def pieces(content: dict[str, bytes], piece_bytes: int) -> int:
    """How many pieces a write of these files has."""
    return sum(-(-len(data) // piece_bytes) for data in content.values())


def moment(failpoint: str, crash: int, content: dict[str, bytes], piece_bytes: int) -> int:
    """At which time that a failpoint is reached it kills: first, last, middle, and random ones."""
    times = {
        "ckpt_mid_write": pieces(content, piece_bytes),
        "ckpt_mid_rename": FILES - 1,
    }.get(failpoint, 1)
    chosen = (1, times, (times + 1) // 2)
    return chosen[crash] if crash < len(chosen) else random.Random(crash).randint(1, times)


def die_writing(folder: Path, failpoint: str, content: dict[str, bytes], **write: object) -> None:
    """Run a server that dies during this write."""
    with ServerProcess(folder, failpoint) as server:
        with pytest.raises(grpc.RpcError):
            server.write(content, **write)
        assert server.wait() == -signal.SIGKILL, f"{failpoint} was not reached"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_crash_while_overwriting_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, failpoint: str
) -> None:
    """Row 8, I10, F4: before the commit it is the old one, after it the new one, byte for byte.

    Nothing is left in staging, others are untouched, and the same write sent again succeeds.
    """
    folder = tmp_path / "data"
    old = files(0)
    with ServerProcess(folder) as server:
        server.write(files(1), BYSTANDER)
        server.write(old)
    for crash in range(CRASHES):
        rng = random.Random(f"{failpoint} {crash}")
        piece_bytes = rng.choice((700, 5000, 60_000))
        new = files(100 + crash, columns=rng.randint(1, 12_000))
        n = moment(failpoint, crash, new, piece_bytes)
        write = {"overwrite": True, "piece_bytes": piece_bytes}
        die_writing(folder, f"{failpoint}:kill@{n}", new, **write)
        with ServerProcess(folder) as server:
            assert server.read() == (new if failpoint == AFTER_COMMIT else old)
            assert server.read(BYSTANDER) == files(1)
            assert server.paths().count(PATH) == 1
            assert left_staged(folder) == []
            server.write(new, **write)
            assert server.read() == new
        old = new


@pytest.mark.timeout(300)
@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_crash_while_writing_a_new_name_leaves_it_whole_or_absent(
    tmp_path: Path, failpoint: str
) -> None:
    """Row 8, I10, I5, F4: before the commit the name is free, after it the checkpoint is whole.

    A repeat of the write that was committed, whose answer nobody got, is the first one. What the
    others left behind is swept, so that exactly the files of visible checkpoints are kept.
    """
    folder = tmp_path / "data"
    expected: dict[str, dict[str, bytes]] = {}
    for crash in range(CRASHES):
        rng = random.Random(f"new {failpoint} {crash}")
        piece_bytes = rng.choice((700, 5000, 60_000))
        content = files(200 + crash, columns=rng.randint(1, 12_000))
        path = f"{PATH}-{crash}"
        n = moment(failpoint, crash, content, piece_bytes)
        write = {"path": path, "piece_bytes": piece_bytes, "request_id": path}
        die_writing(folder, f"{failpoint}:kill@{n}", content, **write)
        if failpoint == AFTER_COMMIT:
            expected[path] = content
        with ServerProcess(folder) as server:
            assert sorted(server.paths()) == sorted(expected)
            assert left_staged(folder) == []
            until_swept(folder, expected)
            first = server.get(path) if path in expected else None
            again = server.write(content, path, request_id=path)
            assert first in (None, again)
            expected[path] = content
            for each, its_content in expected.items():
                assert server.read(each) == its_content


def until_swept(folder: Path, expected: dict[str, dict[str, bytes]]) -> None:
    """Wait until only the files of these checkpoints are kept: the start begins with a sweep."""
    wanted = {data for content in expected.values() for data in content.values()}
    deadline = time.monotonic() + 60
    while len(blobs(folder)) != len(wanted):
        assert time.monotonic() < deadline, f"{len(blobs(folder))} blobs, {len(wanted)} are used"
        time.sleep(0.01)


@pytest.mark.timeout(300)
def test_a_kill_at_any_moment_loses_no_acknowledged_checkpoint(tmp_path: Path) -> None:
    """Row 8, I2, I10: a server that only ever overwrites is killed without aiming.

    What is found afterwards is the last write that was acknowledged, or the one after it.
    """
    folder = tmp_path / "data"
    rng = random.Random(8)
    seeds = iter(range(10_000))
    with ServerProcess(folder) as server:
        server.write(files(acknowledged := next(seeds)))
    for _ in range(KILLS):
        tried = acknowledged
        with ServerProcess(folder) as server:
            assert left_staged(folder) == []
            killer = threading.Timer(rng.uniform(0, 0.15), server.process.kill)
            killer.start()
            try:
                while True:
                    tried = next(seeds)
                    server.write(files(tried), overwrite=True)
                    acknowledged = tried
            except grpc.RpcError:
                killer.join()
                server.wait()
        with ServerProcess(folder) as server:
            found = server.read()
        assert found in (files(acknowledged), files(tried))
        acknowledged = acknowledged if found == files(acknowledged) else tried
