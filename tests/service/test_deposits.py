"""The Checkpoint server takes what a writer on its machine left, and nothing else, through the
wire."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc
import pytest

from checkpoint_server import Served
from checkpoints import LORA, PATH, commit, files, leave, messages, piece
from deposits import hand_over
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.checkpoint_client import CheckpointClient
from tinsmithd.config import CheckpointConfig
from tinsmithd.domain import CheckpointPath
from tinsmithd.saves import NewCheckpoint, SaveOptions
from tinsmithd.state import files as state_files
from tinsmithd.training.models import Checkpoints, Copies, Deposits, DiskStaging
from wire import reason_and_field

WEIGHTS = "adapter_model.safetensors"
STATE = "model_state.json"


def write(
    deposit: str,
    content: Mapping[str, bytes],
    *,
    sent: Mapping[str, bytes] | None = None,
    digests: bool = True,
    **header: object,
) -> Iterator[pb.WriteCheckpointRequest]:
    """A write of files that lie in a deposit, but for those that are sent."""
    first, *_ = messages(PATH, {}, deposit=deposit, **header)
    yield first
    for name, data in (sent or {}).items():
        yield piece(name, 0, data)
    last = commit(content)
    for file in last.commit.files:
        file.sha256 = file.sha256 if digests else b""
    yield last


async def refusal_of(served: Served, requests: Iterator[pb.WriteCheckpointRequest]) -> str:
    """The reason for which a write is refused; nothing of it is left, or visible."""
    call = served.stub.WriteCheckpoint()
    # Once, since what was refused is gone from its deposit; the status alone says why.
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for request in requests:
            await call.write(request)
        await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert served.leftovers() == []
    assert served.blobs() == []
    with pytest.raises(grpc.aio.AioRpcError) as absent:
        await served.read()
    assert absent.value.code() is grpc.StatusCode.NOT_FOUND
    return str(reason_and_field(caught.value)[0])


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("ephemeral", [True, False])
async def test_what_was_left_is_the_checkpoint(
    served: Served, digests: bool, ephemeral: bool
) -> None:
    """Moved and not copied; a digest that the writer does not say is made of what lies there."""
    deposit = leave(served.folder, files())
    response = await served.send(write(deposit, files(), digests=digests, ephemeral=ephemeral))
    assert await served.read() == files()
    assert list((served.folder / "deposits" / deposit).iterdir()) == []
    await served.send(messages(PATH, files(), overwrite=True))
    found = await served.stub.GetCheckpoint(pb.GetCheckpointRequest(checkpoint_path=PATH))
    assert found.checkpoint.digest == response.checkpoint.digest


async def test_files_may_come_in_either_way_and_a_repeat_is_known(served: Served) -> None:
    content = files()
    sent = {STATE: content[STATE]}
    others = {name: data for name, data in content.items() if name not in sent}
    deposit = leave(served.folder, others)
    first = await served.send(write(deposit, content, sent=sent, request_id="one"))
    again = await served.send(messages(PATH, content, request_id="one"))
    assert again == first
    assert await served.read() == content


async def test_other_bytes_than_were_promised_are_damage(served: Served) -> None:
    """A digest that is said counts, even where the bytes could be those of a checkpoint."""
    other = {**files(), WEIGHTS: files(1)[WEIGHTS]}
    deposit = leave(served.folder, other)
    assert await refusal_of(served, write(deposit, files())) == "CHECKPOINT_CORRUPT"
    deposit = leave(served.folder, {**files(), STATE: b"{"})
    assert await refusal_of(served, write(deposit, files())) == "MALFORMED_STREAM"


async def test_what_is_no_checkpoint_is_refused_as_if_it_were_sent(served: Served) -> None:
    content = {**files(), STATE: b"{}"}
    deposit = leave(served.folder, content)
    assert await refusal_of(served, write(deposit, content, digests=False)) == "MISSING_FIELD"


def _link(place: Path, secret: Path) -> None:
    place.symlink_to(secret)


def _second_name(place: Path, secret: Path) -> None:
    place.hardlink_to(secret)


def _folder(place: Path, secret: Path) -> None:
    place.mkdir()


def _pipe(place: Path, secret: Path) -> None:
    os.mkfifo(place)


def _nothing(place: Path, secret: Path) -> None:
    pass


@pytest.mark.parametrize("plant", [_link, _second_name, _folder, _pipe, _nothing])
async def test_nothing_is_taken_that_its_writer_alone_did_not_write(
    served: Served, tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    """A name in a deposit may lead to anything; what it leads to stays as it is."""
    secret = tmp_path / "secret"
    secret.write_bytes(files()[WEIGHTS])
    others = {name: data for name, data in files().items() if name != WEIGHTS}
    deposit = leave(served.folder, others)
    plant(served.folder / "deposits" / deposit / WEIGHTS, secret)
    refused = write(deposit, files(), digests=False)
    assert await refusal_of(served, refused) == "DEPOSIT_NOT_FOUND"
    assert secret.read_bytes() == files()[WEIGHTS]


async def test_a_deposit_is_a_folder_in_its_place_and_known_by_its_name(
    served: Served, tmp_path: Path
) -> None:
    """No path, no link to another folder, and not what nobody left."""
    for name in ("..", "../blobs", "a" * 31, "A" * 32, "a" * 32 + "\n"):
        assert await refusal_of(served, write(name, files())) == "INVALID_NAME"
    assert await refusal_of(served, write("a" * 32, files())) == "DEPOSIT_NOT_FOUND"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, data in files().items():
        (elsewhere / name).write_bytes(data)
    (served.folder / "deposits" / ("b" * 32)).symlink_to(elsewhere)
    assert await refusal_of(served, write("b" * 32, files())) == "DEPOSIT_NOT_FOUND"
    assert len(list(elsewhere.iterdir())) == len(files())


async def test_no_other_name_than_a_checkpoint_has_is_looked_for(served: Served) -> None:
    deposit = leave(served.folder, files())
    for name in ("../secret", "secret", "a/b"):
        refused = write(deposit, {**files(), name: b"x"}, digests=False)
        assert await refusal_of(served, refused) == "INVALID_NAME"
        deposit = leave(served.folder, files())


async def test_what_is_left_counts_against_the_limits(tmp_path: Path) -> None:
    """Of one checkpoint, and of all that are not complete."""
    size = sum(map(len, files().values()))
    limits = {"checkpoint_bytes_max": size - 1, "staged_bytes_max": 1 << 30}
    served = Served(tmp_path / "data")
    await served.server.stop()
    config = CheckpointConfig(
        listen_address="127.0.0.1:0", data_folder=str(tmp_path / "data"), **limits
    )
    served.server = CheckpointServer(config)
    await served.start()
    try:
        deposit = leave(served.folder, files())
        assert await refusal_of(served, write(deposit, files())) == "LIMIT_EXCEEDED"
    finally:
        await served.channel.close()
        await served.server.stop()


async def test_what_nobody_holds_is_removed(served: Served) -> None:
    """At the start, and with each sweep; whoever lives holds a lock."""
    made, held = served.folder / "made", served.folder / "deposits" / ("c" * 32)
    made.mkdir()
    lock = os.open(made, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        made.rename(held)
        left = served.folder / "deposits" / leave(served.folder, files(), held=False)
        await asyncio.to_thread(served.server._keeper.sweep)
        assert held.is_dir()
        assert not left.exists()
    finally:
        os.close(lock)
    await served.channel.close()
    await served.server.stop()
    served.server = CheckpointServer(
        CheckpointConfig(listen_address="127.0.0.1:0", data_folder=str(served.folder))
    )
    await served.start()
    assert not held.exists()


@pytest.mark.parametrize("where", ["no setting", "another server's folder", "this server's folder"])
@pytest.mark.parametrize("ephemeral", [True, False])
async def test_a_save_ends_in_the_same_checkpoint_wherever_the_ranks_can_leave_it(
    served: Served, tmp_path: Path, where: str, ephemeral: bool
) -> None:
    """As the Training server makes it: what cannot be left, or is not found, is sent."""
    another = tmp_path / "another"
    (another / "deposits").mkdir(parents=True)
    folder = {"no setting": None, "another server's folder": another}.get(where, served.folder)
    content = files(columns=100_000)
    state = state_files.from_files(content, LORA)
    options = SaveOptions(CheckpointPath.parse(PATH), None, False, {}, "r", ephemeral=ephemeral)
    new = NewCheckpoint(options, "tiny", LORA, 3)
    client = CheckpointClient(served.address)
    staging = DiskStaging(tmp_path / "staged", 1 << 30)
    checkpoints = Checkpoints(client, staging, Copies(1), Deposits(folder))
    async with (
        checkpoints.staging.open() as staged,
        checkpoints.deposits.open() as deposit,
        checkpoints.saving(new, staged, deposit, _at_once) as saved,
    ):
        await hand_over(state, deposit, staged)
        info = await saved()
    assert info.size_bytes == sum(map(len, content.values()))
    assert await served.read() == content
    async with client.reader(options.path) as reader:
        found: dict[str, bytes] = {}
        async for name, data in reader.pieces():
            found[name] = found.get(name, b"") + data
    assert found == content
    await client.close()


async def _at_once() -> None: ...
