"""A state goes on to the Checkpoint server while it still comes from the ranks."""

import asyncio
from pathlib import Path

import pytest

from checkpoints import NeverRead
from tinsmithd.domain import (
    CheckpointInfo,
    CheckpointKind,
    CheckpointPath,
    LoraConfig,
)
from tinsmithd.errors import Reason, Unavailable
from tinsmithd.saves import NewCheckpoint, SaveOptions
from tinsmithd.training.models.checkpoints import Checkpoints
from tinsmithd.training.models.staging import Copies, DiskStaging, Staged
from waiting import until

PATH = CheckpointPath.parse("tinsmith://run/weights/one")
WHOLE = ["begin", "1", "2", "commit", "end"]
NEW = NewCheckpoint(SaveOptions(PATH, None, False, {}, "r"), "tiny", LoraConfig(), 1)


class Recorder(NeverRead):
    """A Checkpoint server that writes down what reaches it, and is away for some writes."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.away = 0
        self.durable = asyncio.Event()
        self.durable.set()

    def writer(self, new: NewCheckpoint) -> "Recorder":
        self.events.append("begin")
        return self

    async def write(self, file_name: str, data: bytes) -> None:
        if self.away:
            self.away -= 1
            raise Unavailable("away", Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=1.0)
        self.events.append(data.decode())

    async def commit(self) -> CheckpointInfo:
        if self.away:
            raise Unavailable("away", Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=1.0)
        self.events.append("commit")
        return CheckpointInfo(PATH, CheckpointKind.TRAINING, "tiny", LoraConfig(), 1)

    def cancel(self) -> None:
        self.events.append("end")


@pytest.fixture
def server() -> Recorder:
    return Recorder()


async def save(server: Recorder, folder: Path, *, breaks: bool = False) -> None:
    """Save a state of two pieces; between them the first one has its time to go on."""
    checkpoints = Checkpoints(server, DiskStaging(folder, 1000), Copies(1))  # type: ignore[arg-type]

    async def before_commit() -> None:
        await server.durable.wait()

    async with checkpoints.staging.open() as staged:
        await _save(server, checkpoints, staged, before_commit, breaks)


async def _save(
    server: Recorder, checkpoints: Checkpoints, staged: Staged, before_commit: object, breaks: bool
) -> None:
    others = asyncio.all_tasks()  # a save that fails has ended when they are all there are
    async with checkpoints.saving(NEW, staged, None, before_commit) as saved:  # type: ignore[arg-type]
        await staged.write("a", b"1")
        await until(lambda: "1" in server.events or asyncio.all_tasks() <= others)
        if breaks:
            raise RuntimeError("the ranks are gone")
        await staged.write("b", b"2")
        await until(lambda: "2" in server.events or asyncio.all_tasks() <= others)
        assert "commit" not in server.events, "it was not said to be complete"
        await saved()


async def test_it_is_sent_as_it_comes_and_counts_once_it_is_complete(
    server: Recorder, tmp_path: Path
) -> None:
    await save(server, tmp_path)
    assert server.events == WHOLE


async def test_it_counts_once_what_came_before_it_is_durable(
    server: Recorder, tmp_path: Path
) -> None:
    """Which is waited for beside the sending."""
    server.durable.clear()
    saving = asyncio.create_task(save(server, tmp_path))
    await until(lambda: "2" in server.events)
    await asyncio.sleep(0.1)
    assert server.events == WHOLE[:3]
    server.durable.set()
    await saving
    assert server.events == WHOLE


async def test_nothing_counts_where_the_ranks_break_off(server: Recorder, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        await save(server, tmp_path, breaks=True)
    assert server.events == ["begin", "1", "end"]


async def test_a_server_that_was_away_before_all_was_here_gets_it_again(
    server: Recorder, tmp_path: Path
) -> None:
    """From its beginning, once; a server that still is away then delays the call."""
    server.away = 1
    await save(server, tmp_path)
    assert server.events == ["begin", "end", *WHOLE]
    server.events.clear()
    server.away = 100
    with pytest.raises(Unavailable):
        await save(server, tmp_path)
    assert "commit" not in server.events
    assert server.events.count("begin") == 2
