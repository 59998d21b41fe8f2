"""Both ends of a deposit: rank 0 leaves a state; the Training server has it taken, or sends it."""

import asyncio
import dataclasses
import fcntl
import os
import queue
import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from checkpoints import PEFT_CONFIG, NeverRead, to_files
from deposits import hand_over
from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd.domain import CheckpointInfo, CheckpointKind, CheckpointPath, LoraConfig, ModelState
from tinsmithd.errors import NotFound, Reason, Unavailable
from tinsmithd.saves import NewCheckpoint, SaveOptions
from tinsmithd.state.tensors import MOMENTS
from tinsmithd.trainer import state_sender
from tinsmithd.trainer.state_sender import StateSender, leave_state
from tinsmithd.training.models.checkpoints import Checkpoints
from tinsmithd.training.models.deposits import Deposit, Deposits
from tinsmithd.training.models.staging import Copies, DiskStaging
from waiting import until

PATH = CheckpointPath.parse("tinsmith://run/weights/one")
NEW = NewCheckpoint(SaveOptions(PATH, None, False, {}, "r"), "tiny", LoraConfig(), 1)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def state() -> ModelState:
    """A state with moments, of arrays that do not lie in memory as they are written."""
    rng = np.random.default_rng(0)
    weights = {
        "a.lora_A.weight": rng.normal(size=(900, 4)).astype(np.float32).T,
        "a.lora_B.weight": rng.normal(size=(6, 4)).astype(np.float32),
    }
    moments = {f"{kind}.{name}": a**2 for kind in MOMENTS for name, a in weights.items()}
    return ModelState(LoraConfig(rank=4), weights, moments, 3, PEFT_CONFIG)


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """That of a Checkpoint server."""
    (tmp_path / "data" / "deposits").mkdir(parents=True)
    return tmp_path / "data"


def found_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- rank 0 -----------------------------------------------------------------------------------


def test_a_state_is_left_as_it_would_be_sent(state: ModelState, tmp_path: Path) -> None:
    left = leave_state(state, str(tmp_path))
    assert left is not None
    assert found_in(tmp_path) == to_files(state)
    assert {file.file_name: file.size_bytes for file in left} == {
        name: len(data) for name, data in to_files(state).items()
    }
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_nothing_is_left_where_there_is_no_such_folder(state: ModelState, tmp_path: Path) -> None:
    """As on another machine; and a link is none, whatever it leads to."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert leave_state(state, str(tmp_path / "absent")) is None
    assert leave_state(state, str(tmp_path / "link")) is None
    assert found_in(tmp_path / "there") == {}


def test_nothing_is_written_through_a_name_that_is_taken(state: ModelState, tmp_path: Path) -> None:
    deposit, secret = tmp_path / "deposit", tmp_path / "secret"
    deposit.mkdir()
    secret.write_bytes(b"as it was")
    (deposit / WEIGHTS).symlink_to(secret)
    assert leave_state(state, str(deposit)) is None
    assert secret.read_bytes() == b"as it was"
    assert [path.name for path in deposit.iterdir()] == []


class Slow(dict[str, np.ndarray]):
    """Arrays that are looked at, once that has `begun`, only when another copy is `taken`."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(arrays)
        self.begun, self.taken = threading.Event(), threading.Event()

    def __getitem__(self, name: str) -> np.ndarray:
        self.begun.set()
        assert self.taken.wait(60)
        return super().__getitem__(name)


@pytest.mark.parametrize("left", [False, True])
def test_what_is_urgent_passes_what_is_not(state: ModelState, tmp_path: Path, left: bool) -> None:
    """Weights for a Sampler come while a snapshot is being sent, or left, and are there before it:
    the snapshot is as whole as without them."""
    sender, sent = StateSender(), queue.SimpleQueue[pb.AttachRequest]()
    slow = Slow(state.optimizer)

    def later(message: pb.AttachRequest) -> bool:
        sent.put(message)
        return True

    snapshot = dataclasses.replace(state, optimizer=slow)
    deposit = str(tmp_path) if left else ""
    sender.take(1, lambda: snapshot, lambda _: None, later, deposit)
    assert slow.begun.wait(60)
    sender.take(2, lambda: state, lambda _: None, later, urgent=True)
    slow.taken.set()
    messages: list[pb.AttachRequest] = []
    while len(ended := [m.command_id for m in messages if m.HasField("done")]) < 2:
        messages.append(sent.get(timeout=60))
    assert ended == [2, 1]
    for command_id in (2,) if left else (1, 2):
        files: dict[str, bytes] = {}
        for message in messages:
            if message.command_id == command_id and message.HasField("piece"):
                name = message.piece.file_name
                files[name] = files.get(name, b"") + message.piece.data
        assert files == to_files(state)
    assert not left or found_in(tmp_path) == to_files(state)


def test_what_is_not_urgent_rests_after_what_was(
    state: ModelState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More that is urgent ends the rest at once, and comes first, too; in all it rests so long as a
    copy may, and no longer."""
    monkeypatch.setattr(state_sender, "RESTS_S_MAX", 600.0)
    sender, sent = StateSender(rest_s=600), queue.SimpleQueue[pb.AttachRequest]()
    slow = Slow(state.optimizer)

    def later(message: pb.AttachRequest) -> bool:
        sent.put(message)
        return True

    def ended() -> int:
        while not (message := sent.get(timeout=60)).HasField("done"):
            pass
        return message.command_id

    snapshot = dataclasses.replace(state, optimizer=slow)
    sender.take(1, lambda: snapshot, lambda _: None, later)
    assert slow.begun.wait(60)
    sender.take(2, lambda: state, lambda _: None, later, urgent=True)
    slow.taken.set()
    assert ended() == 2
    for command_id in (3, 4):
        sender.take(command_id, lambda: state, lambda _: None, later, urgent=True)
        assert ended() == command_id
    sender._rests_s = 0.0  # the time is over
    sender.take(5, lambda: state, lambda _: None, later, urgent=True)
    assert [ended(), ended()] == [5, 1]


@contextmanager
def small_files(bytes_max: int) -> Iterator[None]:
    """No file of this process can grow beyond that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_does_not_take_it_is_left_empty(state: ModelState, tmp_path: Path) -> None:
    """The state is sent then, and the Checkpoint server says whether it has room."""
    with small_files(10_000):
        assert leave_state(state, str(tmp_path)) is None
    assert found_in(tmp_path) == {}


# --- the Training server ------------------------------------------------------------------------


async def test_a_deposit_is_there_and_held_as_long_as_it_is_open(data_folder: Path) -> None:
    async with Deposits(data_folder).open() as deposit:
        assert deposit is not None
        folder = Path(deposit.folder)
        assert folder.parent == data_folder / "deposits"
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "left").write_bytes(b"x")
        with pytest.raises(BlockingIOError):
            _try_to_lock(folder)
    assert not folder.exists()
    async with Deposits(data_folder).open() as first, Deposits(data_folder).open() as second:
        assert first is not None
        assert second is not None
        assert first.name != second.name


def _try_to_lock(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


async def test_there_is_none_where_the_checkpoint_server_has_no_folder(tmp_path: Path) -> None:
    for folder in (None, tmp_path, tmp_path / "absent"):
        async with Deposits(folder).open() as deposit:
            assert deposit is None
    assert list(tmp_path.iterdir()) == []


async def test_a_caller_that_goes_away_leaves_nothing(data_folder: Path) -> None:
    """At whatever moment."""

    async def hold() -> None:
        async with Deposits(data_folder).open():
            await asyncio.sleep(100)

    for turns in range(20):
        task = asyncio.create_task(hold())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await until(lambda: not list((data_folder / "deposits").iterdir()))


class Server(NeverRead):
    """A Checkpoint server that finds deposits, or does not."""

    def __init__(self, *, finds: bool) -> None:
        self.finds = finds
        self.files: dict[str, bytes] = {}
        self.begun: list[str] = []
        self.deposits: list[Mapping[str, int]] = []
        self._waits = False

    def writer(self, new: NewCheckpoint) -> "Server":
        self.files, self._waits = {}, False
        return self

    async def write(self, file_name: str, data: bytes) -> None:
        self.files[file_name] = self.files.get(file_name, b"") + data

    async def begin(self, deposit: str) -> None:
        self.begun.append(deposit)

    def deposited(self, files: Mapping[str, int]) -> None:
        assert not self.files
        self.deposits.append(files)
        self._waits = True

    async def commit(self) -> CheckpointInfo:
        if self._waits and not self.finds:
            raise NotFound("nothing there", Reason.DEPOSIT_NOT_FOUND)
        return CheckpointInfo(PATH, CheckpointKind.TRAINING, "tiny", LoraConfig(), 1)

    def cancel(self) -> None: ...


async def save(checkpoints: Checkpoints, state: ModelState, *, loses: bool = False) -> None:
    """Save a state that rank 0 leaves where it can, and sends where it cannot."""

    async def before_commit() -> None: ...

    async with (
        checkpoints.staging.open() as staged,
        checkpoints.deposits.open() as deposit,
        checkpoints.saving(NEW, staged, deposit, before_commit) as saved,
    ):
        if await hand_over(state, deposit, staged):
            _lose(deposit, loses)
        await saved()


def _lose(deposit: Deposit, loses: bool) -> None:
    if loses:
        (Path(deposit.folder) / WEIGHTS).unlink()


def checkpoints_at(server: Server, data_folder: Path) -> Checkpoints:
    staging = DiskStaging(data_folder.parent / "staged", 1 << 30)
    return Checkpoints(server, staging, Copies(1), Deposits(data_folder))  # type: ignore[arg-type]


async def test_what_is_left_is_named_and_not_sent(state: ModelState, data_folder: Path) -> None:
    server = Server(finds=True)
    await save(checkpoints_at(server, data_folder), state)
    assert server.files == {}
    assert server.deposits == [{name: len(data) for name, data in to_files(state).items()}]
    assert list((data_folder / "deposits").iterdir()) == []


async def test_the_server_hears_of_a_deposit_once_the_ranks_begin_to_leave_it(
    data_folder: Path,
) -> None:
    """It reads meanwhile; before, a stream with nothing on it would only grow old."""

    async def before_commit() -> None: ...

    server = Server(finds=True)
    checkpoints = checkpoints_at(server, data_folder)
    async with (
        checkpoints.staging.open() as staged,
        checkpoints.deposits.open() as deposit,
        checkpoints.saving(NEW, staged, deposit, before_commit) as saved,
    ):
        assert deposit is not None
        await asyncio.sleep(0.01)
        assert server.begun == []
        deposit.begun.set()
        await until(lambda: server.begun)
        assert server.begun == [deposit.name]
        deposit.files = {WEIGHTS: 1}
        await saved()
    assert server.deposits == [{WEIGHTS: 1}]


async def test_a_server_that_does_not_find_it_gets_it_sent_from_then_on(
    state: ModelState, data_folder: Path
) -> None:
    """Its folder is another one, whatever the setting says."""
    server = Server(finds=False)
    checkpoints = checkpoints_at(server, data_folder)
    await save(checkpoints, state)
    assert server.files == to_files(state)
    await save(checkpoints, state)
    assert server.files == to_files(state)
    assert len(server.deposits) == 1
    assert list((data_folder / "deposits").iterdir()) == []


async def test_what_nobody_finds_any_more_can_be_saved_again(
    state: ModelState, data_folder: Path
) -> None:
    """The call is taken back, and its caller sends it again."""
    with pytest.raises(Unavailable):
        await save(checkpoints_at(Server(finds=False), data_folder), state, loses=True)
