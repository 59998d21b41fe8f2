"""Rows 27 and 28: a disk that is full, read-only or failing refuses writes and spoils nothing."""

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from checkpoints import (
    PATH,
    ServerProcess,
    blobs,
    files,
    keep,
    kept,
    left_staged,
)
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd.checkpoint import server as server_module
from tinsmithd.checkpoint.opening import open_keeper
from tinsmithd.checkpoint.rules import Keeper
from tinsmithd.checkpoint.server import SERVICE_NAME, CheckpointServer
from tinsmithd.config import CheckpointConfig
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import ResourceExhausted, TinsmithError, Unavailable
from tinsmithd.processes import EXIT_HOPELESS
from wire import reason_and_field

DISK_BYTES = 4 * 1024 * 1024
NEW = PATH + "-new"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NO REAL FULL DISK WAS TESTED: a tmpfs cannot be mounted here ({error})")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, *, leave: int = 0) -> Path:
    """Take all space but `leave` bytes; deleting the file that it returns gives it back."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
        file.truncate(max(0, file.tell() // 4096 * 4096 - leave))
    return filler


def retry_s(error: grpc.RpcError) -> float:
    """How long the server asks to wait; 0 where it does not."""
    info = error_details_pb2.RetryInfo()
    for detail in rpc_status.from_call(error).details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
    return info.retry_delay.seconds + info.retry_delay.nanos / 1e9


def refused_as_full(server: ServerProcess, seed: int, path: str, **header: object) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        server.write(files(seed, columns=20_000), path, **header)
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason_and_field(refusal.value)[0] == "STORAGE_FULL"
    assert retry_s(refusal.value) > 0


def test_a_full_disk_refuses_a_save_and_keeps_what_was_there(
    small_disk: Path, tmp_path: Path
) -> None:
    """Row 27, I9, I10: typed, with a time to wait; reads go on; writes work when space returns.

    A server that starts on the full disk reads too.
    """
    folder = small_disk / "data"
    old = files(0)
    with ServerProcess(folder, beside=tmp_path) as server:
        server.write(old)
        before = blobs(folder)
        filler = fill(small_disk, leave=100_000)
        refused_as_full(server, 1, PATH, overwrite=True)
        refused_as_full(server, 1, NEW)
        assert left_staged(folder) == []
        assert blobs(folder) == before
        assert server.read() == old
        assert server.paths() == [PATH]
        fill(small_disk)
        refused_as_full(server, 1, NEW)
        server.kill()
    with ServerProcess(folder, beside=tmp_path) as server:
        assert server.read() == old
        refused_as_full(server, 1, NEW)
        filler.unlink()
        server.write(files(1, columns=20_000), NEW)
        server.write(files(2, columns=20_000), overwrite=True)
        assert server.read() == files(2, columns=20_000)


def test_a_disk_that_fills_at_any_byte_leaves_the_old_or_the_new_checkpoint(
    small_disk: Path,
) -> None:
    """Row 27, I10: room for 0, 4, 8 ... KiB more: pieces, folders and the catalogue run out."""
    folder = small_disk / "data"
    keeper = open_keeper(folder, checkpoint_bytes_max=1 << 30)
    current = files(0, columns=300)
    keep(keeper, current)
    outcomes = set()
    for pages in range(0, 40):
        content = files(pages + 1, columns=300)
        filler = fill(small_disk, leave=4096 * pages)
        try:
            keep(keeper, content, overwrite=True)
            current = content
            outcomes.add("new")
        except ResourceExhausted as error:
            outcomes.add(error.reason)
        assert kept(keeper) == current
        assert left_staged(folder) == []
        keeper.sweep()
        assert len(blobs(folder)) == 4
        filler.unlink()
    assert outcomes == {"new", "STORAGE_FULL"}
    keeper.close()


def test_a_delete_works_on_a_full_disk(small_disk: Path) -> None:
    """Row 27: or nobody could make room; so does the sweep that frees the bytes."""
    folder = small_disk / "data"
    keeper = open_keeper(folder, checkpoint_bytes_max=1 << 30)
    keep(keeper, files(0))
    keep(keeper, files(1), NEW)
    fill(small_disk)
    with pytest.raises(ResourceExhausted):
        keep(keeper, files(2), overwrite=True)
    keeper.catalogue.delete(CheckpointPath.parse(NEW))
    keeper.sweep()
    assert len(blobs(folder)) == 4
    assert kept(keeper) == files(0)
    keep(keeper, files(3, columns=100), NEW)
    keeper.close()


@pytest.mark.parametrize(
    "place",
    ["ckpt_mid_write", "ckpt_pre_fsync", "ckpt_pre_rename", "ckpt_mid_rename", "ckpt_post_rename"],
)
def test_a_disk_that_is_full_once_refuses_once(tmp_path: Path, place: str) -> None:
    """Row 27, without a small disk: at each place of a save, then the same save succeeds."""
    folder = tmp_path / "data"
    with ServerProcess(folder, f"{place}:full@{1 + _reached(place)}") as server:
        server.write(files(0))
        before = blobs(folder)
        refused_as_full(server, 1, PATH, overwrite=True)
        assert left_staged(folder) == []
        assert blobs(folder) == before
        assert server.read() == files(0)
        server.write(files(1, columns=20_000), overwrite=True)
        assert server.read() == files(1, columns=20_000)


def _reached(place: str) -> int:
    """How often the first write reaches a place."""
    pieces = sum(-(-len(data) // 5000) for data in files(0).values())
    return {"ckpt_mid_write": pieces, "ckpt_mid_rename": 3}.get(place, 1)


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    """A keeper with one checkpoint."""
    keeper = open_keeper(tmp_path / "data", checkpoint_bytes_max=1 << 30)
    keep(keeper, files(0))
    yield keeper
    keeper.close()


def failing(number: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["mkdir", "replace", "fsync"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EACCES, errno.EDQUOT])
def test_a_failing_disk_refuses_a_save_and_keeps_what_was_there(
    keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """Row 28, I9, I10: read-only, I/O error, no permission: UNAVAILABLE; no quota: STORAGE_FULL."""
    before = blobs(tmp_path / "data")
    with monkeypatch.context() as broken:
        broken.setattr(os, call, failing(number))
        with pytest.raises(TinsmithError) as refusal:
            keep(keeper, files(1), overwrite=True)
        assert kept(keeper) == files(0)
    full = number == errno.EDQUOT
    assert refusal.value.reason == ("STORAGE_FULL" if full else "CHECKPOINT_UNAVAILABLE")
    assert refusal.value.retry_after_s
    assert left_staged(tmp_path / "data") == []
    assert blobs(tmp_path / "data") == before
    keep(keeper, files(1), overwrite=True)
    assert kept(keeper) == files(1)


@pytest.mark.parametrize(
    ("pragma", "undo", "expected"),
    [
        ("max_page_count=1", "max_page_count=1000000", ResourceExhausted),
        ("query_only=ON", "query_only=OFF", Unavailable),
    ],
)
def test_a_catalogue_that_cannot_be_written_refuses_and_gives_the_room_back(
    keeper: Keeper, tmp_path: Path, pragma: str, undo: str, expected: type[TinsmithError]
) -> None:
    """Rows 27, 28: SQLite says that the disk is full or read-only when the files are in place."""
    before = blobs(tmp_path / "data")
    db = keeper.catalogue._db
    db.execute(f"PRAGMA {pragma}")
    name = "tinsmith://run/weights/" + "long" * 30

    def fill_catalogue() -> None:
        for n in range(100):  # until the pages that there are do not hold them
            keep(keeper, files(0), f"{name}{n}")

    with pytest.raises(expected) as refusal:
        fill_catalogue()
    assert refusal.value.retry_after_s
    with pytest.raises(expected):
        keep(keeper, files(1), name)
    assert blobs(tmp_path / "data") == before
    assert left_staged(tmp_path / "data") == []
    # What may have got into the log cannot come back and look for the files that are gone.
    assert (tmp_path / "data" / "catalogue.sqlite-wal").stat().st_size == 0
    assert kept(keeper) == files(0)
    db.execute(f"PRAGMA {undo}")
    keep(keeper, files(1), name)
    assert kept(keeper, name) == files(1)


def test_too_many_open_files_are_no_damage(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 28, I9: what may pass is UNAVAILABLE; DATA_LOSS would make a caller give up."""
    with monkeypatch.context() as broken:
        broken.setattr(Path, "open", failing(errno.EMFILE))
        with pytest.raises(Unavailable):
            kept(keeper)
    assert kept(keeper) == files(0)


async def test_health_says_whether_checkpoints_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 27, 28, I8: NOT_SERVING while reads fail, and only then; the process stays live."""
    monkeypatch.setattr(server_module, "PROBE_INTERVAL_S", 0.02)
    folder = tmp_path / "data"
    config = CheckpointConfig(listen_address="127.0.0.1:0", data_folder=str(folder))
    server = CheckpointServer(config)
    await server.start()
    states = health_pb2.HealthCheckResponse
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def becomes(name: str, wanted: int) -> None:
            deadline = time.monotonic() + 60
            request = health_pb2.HealthCheckRequest(service=name)
            while (await stub.Check(request)).status != wanted:
                assert time.monotonic() < deadline

        await becomes(SERVICE_NAME, states.SERVING)
        shutil.move(folder / "blobs", folder / "away")
        await becomes(SERVICE_NAME, states.NOT_SERVING)
        await becomes("", states.SERVING)
        shutil.move(folder / "away", folder / "blobs")
        await becomes(SERVICE_NAME, states.SERVING)
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", failing(errno.EROFS))
            with pytest.raises(Unavailable):
                keep(server._keeper, files(0))
            for _ in range(5):
                await becomes(SERVICE_NAME, states.SERVING)
    await server.stop()


def test_a_server_does_not_start_on_a_read_only_disk(small_disk: Path, tmp_path: Path) -> None:
    """Row 28: one that runs goes on reading; one that starts says in a sentence what is wrong."""
    folder = small_disk / "data"
    with ServerProcess(folder, beside=tmp_path) as server:
        server.write(files(0))
        server.stop()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    server = ServerProcess(folder, beside=tmp_path)
    assert server.wait() == EXIT_HOPELESS
    (line,) = [line for line in server.said.splitlines() if " INFO " not in line]
    assert "Read-only file system" in line
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    with ServerProcess(folder, beside=tmp_path) as server:
        assert server.read() == files(0)


def test_a_list_goes_on_where_nothing_can_be_written(small_disk: Path, tmp_path: Path) -> None:
    """Rows 27, 28: looking things up needs no room on the disk."""
    folder = small_disk / "data"
    with ServerProcess(folder, beside=tmp_path) as server:
        for n in range(30):
            server.write(files(0), f"{PATH}-{n}")
        fill(small_disk)
        listed = server.stub.ListCheckpoints(pb.ListCheckpointsRequest(page_size=7), timeout=60)
        assert listed.total_size == 30
        assert len(server.paths()) == 30
