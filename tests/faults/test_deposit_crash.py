"""Whoever dies, or whatever fails, while a deposit is taken: the checkpoint is the old or the new
one, and nothing is left of the deposit. Real processes, real SIGKILL."""

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import grpc
import pytest

import programs
from checkpoints import (
    PATH,
    ServerProcess,
    TimedKeeper,
    blobs,
    commit,
    files,
    leave,
    left_staged,
    messages,
)
from tinsmith.v1 import checkpoint_service_pb2 as pb
from wire import reason_and_field

AFTER_COMMIT = "ckpt_post_commit"
PLACES = {
    "ckpt_mid_take": 4,
    "ckpt_pre_fsync": 1,
    "ckpt_pre_rename": 1,
    "ckpt_mid_rename": 3,
    "ckpt_post_rename": 1,
    AFTER_COMMIT: 1,
}
"""How often a write of four files reaches each place."""
HOLD = """
import asyncio, sys
from pathlib import Path
from tinsmithd.training.models.deposits import Deposits

async def hold():
    async with Deposits(Path(sys.argv[1])).open() as deposit:
        (Path(deposit.folder) / "left").write_bytes(b"x")
        print(deposit.name, flush=True)
        await asyncio.sleep(1000)

asyncio.run(hold())
"""


def take(server: ServerProcess, folder: Path, content: Mapping[str, bytes]) -> pb.Checkpoint:
    """Leave files, and have the server take them in place of what it has."""
    deposit = leave(folder, content)
    header = next(iter(messages(PATH, {}, deposit=deposit, overwrite=True)))
    stream = iter((header, commit(content)))
    return server.stub.WriteCheckpoint(stream, timeout=60).checkpoint


@pytest.mark.parametrize("place", PLACES)
def test_a_crash_while_a_deposit_is_taken_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, place: str
) -> None:
    """At the first and at the last file; then the next one is taken as ever."""
    folder, old = tmp_path / "data", files(0)
    with ServerProcess(folder) as server:
        server.write(old)
    for n in sorted({1, PLACES[place]}):
        new = files(n)
        with ServerProcess(folder, f"{place}:kill@{n}") as server:
            with pytest.raises(grpc.RpcError):
                take(server, folder, new)
            assert server.wait() == -signal.SIGKILL, f"{place} was not reached"
        with ServerProcess(folder) as server:
            assert server.read() == (new if place == AFTER_COMMIT else old)
            assert left_staged(folder) == []
            take(server, folder, new)
            assert server.read() == new
        old = new


@pytest.mark.parametrize("place", [place for place in PLACES if place != AFTER_COMMIT])
def test_a_disk_that_is_full_once_refuses_a_deposit_once(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "data"
    reached = {"ckpt_mid_rename": 3, "ckpt_mid_take": 0}.get(place, 1)  # by the first write
    with ServerProcess(folder, f"{place}:full@{1 + reached}") as server:
        server.write(files(0))
        before = blobs(folder)
        with pytest.raises(grpc.RpcError) as refusal:
            take(server, folder, files(1))
        assert reason_and_field(refusal.value)[0] == "STORAGE_FULL"
        assert left_staged(folder) == []
        assert blobs(folder) == before
        assert server.read() == files(0)
        take(server, folder, files(1))
        assert server.read() == files(1)


def test_what_a_killed_writer_left_is_removed_and_not_before(tmp_path: Path) -> None:
    with TimedKeeper.opened(tmp_path) as timed:
        writer = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)],
            env=programs.variables(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        deposit = tmp_path / "deposits" / writer.stdout.readline().strip()
        timed.keeper.sweep()
        assert (deposit / "left").exists()
        writer.kill()
        writer.wait()
        writer.stdout.close()
        timed.keeper.sweep()
        assert not deposit.exists()
