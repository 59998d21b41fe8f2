"""Row 11: a writer that was replaced cannot write a checkpoint any more, whenever it wakes up."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from checkpoints import PATH, ServerProcess, files, keep, kept, left_staged, messages, staged
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd.checkpoint.catalogue import Writer
from tinsmithd.checkpoint.opening import open_keeper
from tinsmithd.checkpoint.store.spool import KEPT_BYTES
from tinsmithd.errors import DataLoss, FailedPrecondition
from wire import reason_and_field


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A Checkpoint server of its own."""
    with ServerProcess(tmp_path / "data") as running:
        yield running


def refused(server: ServerProcess, path: str, writer: str, epoch: int) -> None:
    """Try to write, and check that it is refused as stale and leaves nothing."""
    with pytest.raises(grpc.RpcError) as refusal:
        server.write(files(9), path, writer=writer, writer_epoch=epoch, overwrite=True)
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_and_field(refusal.value)[0] == "STALE_EPOCH"


def test_a_writer_of_a_lower_epoch_is_refused_at_the_header(
    server: ServerProcess, tmp_path: Path
) -> None:
    """Row 11: at once, before its bytes are taken; nothing changes. Others are not fenced."""
    server.write(files(0), writer="a", writer_epoch=3)
    sent = threading.Event()

    def header_only() -> Iterator[pb.WriteCheckpointRequest]:
        yield next(messages(PATH, files(9), writer="a", writer_epoch=2, overwrite=True))
        sent.wait(30)

    with pytest.raises(grpc.RpcError) as refusal:
        server.stub.WriteCheckpoint(header_only(), timeout=30)
    sent.set()
    assert reason_and_field(refusal.value)[0] == "STALE_EPOCH"
    refused(server, PATH, "a", 0)
    refused(server, PATH + "-new", "a", 2)
    assert left_staged(tmp_path / "data") == []
    assert server.paths() == [PATH]
    assert server.read() == files(0)
    server.write(files(1), PATH + "-b", writer="b", writer_epoch=1)
    server.write(files(2), PATH + "-nobody")


def test_a_writer_of_the_same_epoch_writes_on(server: ServerProcess) -> None:
    """Row 11: any number of times, as does one of a higher epoch; a repeat is the first write."""
    header = {"writer": "a", "writer_epoch": 3, "request_id": "one"}
    assert server.write(files(0), **header) == server.write(files(0), **header)
    server.write(files(1), writer="a", writer_epoch=3, overwrite=True)
    server.write(files(2), writer="a", writer_epoch=7, overwrite=True)
    assert server.read() == files(2)


@pytest.mark.parametrize("epoch", [10**6 + 4, 2**40, 2**62, 2**63 - 1])
def test_an_epoch_may_not_jump(server: ServerProcess, tmp_path: Path, epoch: int) -> None:
    """Row 11: what no restarts explain is refused by field, fences nobody off and leaves nothing.
    A writer that restarted often without a save goes on; so does one that was never seen."""
    server.write(files(0), writer="a", writer_epoch=3)
    for writer in ("a", "never-seen"):
        with pytest.raises(grpc.RpcError) as refusal:
            server.write(files(9), PATH + "-x", writer=writer, writer_epoch=epoch)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason_and_field(refusal.value) == ("LIMIT_EXCEEDED", "header.writer_epoch")
    server.write(files(1), PATH + "-1", writer="a", writer_epoch=3)
    server.write(files(2), PATH + "-2", writer="a", writer_epoch=10**6 + 3)
    server.write(files(3), PATH + "-3", writer="never-seen", writer_epoch=10**6)
    assert left_staged(tmp_path / "data") == []


def test_a_stale_writer_is_not_told_its_name(server: ServerProcess) -> None:
    """Row 11: whoever knows the name can fence its owner off, and callers read the error."""
    server.write(files(0), writer="the-secret-name", writer_epoch=3)
    with pytest.raises(grpc.RpcError) as refusal:
        server.write(files(9), PATH + "-x", writer="the-secret-name", writer_epoch=2)
    assert isinstance(refusal.value, grpc.Call)
    assert "the-secret-name" not in str(refusal.value.details())
    assert b"the-secret-name" not in b"".join(
        value if isinstance(value, bytes) else value.encode()
        for _, value in refusal.value.trailing_metadata() or ()
    )


def test_a_writer_that_is_replaced_while_it_streams_is_refused_at_the_commit(
    server: ServerProcess, tmp_path: Path
) -> None:
    """Row 11: the header was in time, the commit is not: what the other wrote stays."""
    content = files(9, columns=KEPT_BYTES)
    begun, replaced = threading.Event(), threading.Event()

    def stream() -> Iterator[pb.WriteCheckpointRequest]:
        *most, last = messages(PATH, content, writer="a", writer_epoch=1, overwrite=True)
        yield from most
        begun.set()
        replaced.wait(30)
        yield last

    call = server.stub.WriteCheckpoint.future(stream(), timeout=60)
    begun.wait(30)
    while not any(
        file.stat().st_size for path in staged(tmp_path / "data") for file in path.iterdir()
    ):
        time.sleep(0.01)
    server.write(files(1), writer="a", writer_epoch=2)
    replaced.set()
    with pytest.raises(grpc.RpcError) as refusal:
        call.result(30)
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_and_field(refusal.value)[0] == "STALE_EPOCH"
    assert server.read() == files(1)
    assert left_staged(tmp_path / "data") == []


def test_a_header_of_a_higher_epoch_fences_even_if_its_write_fails(server: ServerProcess) -> None:
    """Row 11: the new one need not get through for the old one to be out."""
    stream = [*messages(PATH, files(0), writer="a", writer_epoch=2)][:-2]
    with pytest.raises(grpc.RpcError):
        server.stub.WriteCheckpoint(iter(stream), timeout=30)
    refused(server, PATH, "a", 1)


def test_the_fence_survives_a_kill(tmp_path: Path) -> None:
    """Rows 8, 11: the epoch is durable as soon as the header is taken."""
    with ServerProcess(tmp_path / "data") as server:
        server.write(files(0), writer="a", writer_epoch=5)
    with ServerProcess(tmp_path / "data", "ckpt_mid_write:kill@1") as server:
        with pytest.raises(grpc.RpcError):
            server.write(files(1), PATH + "-new", writer="a", writer_epoch=6)
        server.wait()
    with ServerProcess(tmp_path / "data") as server:
        refused(server, PATH, "a", 5)
        assert server.read() == files(0)
        server.write(files(1), PATH + "-new", writer="a", writer_epoch=6)


def test_a_repeat_of_a_committed_write_is_refused_once_it_is_stale(server: ServerProcess) -> None:
    """Row 11: a replaced writer learns that it was replaced, not that all is well."""
    server.write(files(0), writer="a", writer_epoch=1)
    server.write(files(1), PATH + "-new", writer="a", writer_epoch=2)
    refused(server, PATH, "a", 1)
    assert server.read() == files(0)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"writer_epoch": 1}, ("MISSING_FIELD", "header.writer")),
        ({"writer": "a", "writer_epoch": -1}, ("INVALID_FIELD", "header.writer_epoch")),
        ({"writer": "a" * 129, "writer_epoch": 1}, ("LIMIT_EXCEEDED", "header.writer")),
    ],
)
def test_a_fence_that_would_not_hold_is_refused(
    server: ServerProcess, header: dict[str, object], expected: tuple[str, str]
) -> None:
    """Row 22: an epoch of nobody, one below 0, and a name without a bound."""
    with pytest.raises(grpc.RpcError) as refusal:
        server.write(files(0), **header)
    assert reason_and_field(refusal.value) == expected


def test_the_longest_name_and_the_highest_epoch_are_taken(server: ServerProcess) -> None:
    """Row 20: at the limits, one below what is refused."""
    server.write(files(0), writer="ä" * 128, writer_epoch=10**6)
    refused(server, PATH, "ä" * 128, 10**6 - 1)


def test_an_epoch_that_is_damaged_lets_nobody_write(tmp_path: Path) -> None:
    """Rows 11, 29: where nobody knows who may write, a stale writer must not."""
    keeper = open_keeper(tmp_path / "data", checkpoint_bytes_max=1 << 20)
    keep(keeper, files(0), writer=Writer("a", 4))
    keeper.catalogue._db.execute("UPDATE writers SET epoch=0")
    for epoch in (3, 4, 5):
        with pytest.raises(DataLoss, match="epoch of this writer"):
            keep(keeper, files(1), overwrite=True, writer=Writer("a", epoch))
    assert kept(keeper) == files(0)
    keep(keeper, files(1), overwrite=True, writer=Writer("b", 1))
    with pytest.raises(FailedPrecondition):
        keep(keeper, files(2), overwrite=True, writer=Writer("b", 0))
    keeper.close()
