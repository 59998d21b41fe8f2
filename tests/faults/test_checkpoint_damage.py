"""Rows 29 and 30: whatever is damaged or hostile in the storage is found before anybody uses it.

Damage is drawn from seeds, so that each can be had again. Most of it goes to a keeper without a
wire; the server's own answers are checked for some.
"""

import hashlib
import os
import pickle
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from checkpoints import PATH, ServerProcess, blobs, files, keep, kept, left_staged
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd.checkpoint.catalogue import CatalogueUnusable, digest_of
from tinsmithd.checkpoint.opening import open_keeper
from tinsmithd.checkpoint.rules import Keeper
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import DataLoss, TinsmithError
from tinsmithd.processes import EXIT_HOPELESS
from tinsmithd.state import files as state_files
from wire import reason_and_field

WEIGHTS, MOMENTS = state_files.WEIGHTS_FILE, state_files.OPTIMIZER_FILE
OTHER = "tinsmith://run/weights/other"
BLOB_TRIALS = 100
ROW_TRIALS = 100
FILE_TRIALS = 200
WAL_TRIALS = 50


def opened(folder: Path) -> Keeper:
    return open_keeper(folder, checkpoint_bytes_max=1 << 30)


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    """Two checkpoints with nothing in common but their small files."""
    keeper = opened(tmp_path / "data")
    keep(keeper, files(0))
    keep(keeper, files(1), OTHER)
    yield keeper
    keeper.close()


def flipped(data: bytes, rng: random.Random) -> bytes:
    """The same bytes but for one bit."""
    damaged = bytearray(data)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One bit flipped, the end cut off, or a stretch of zeros: what disks do."""
    kind = rng.random()
    if kind < 0.6:
        return flipped(data, rng)
    if kind < 0.8:
        return data[: rng.randrange(len(data))]
    start = rng.randrange(len(data))
    zeros = data[:start] + bytes(min(512, len(data) - start)) + data[start + 512 :]
    return zeros if zeros != data else flipped(data, rng)


def lost(keeper: Keeper, path: str = PATH) -> bool:
    """True where a read is refused as DataLoss; False where it gives exactly what was written.

    Fails the test for everything else.
    """
    try:
        found = kept(keeper, path)
    except DataLoss as loss:
        return loss.reason == "CHECKPOINT_CORRUPT"
    assert found == files(0 if path == PATH else 1)
    return False


def test_every_damage_of_a_blob_is_found(keeper: Keeper, tmp_path: Path) -> None:
    """Row 29, I10: 100 damages over all files of a checkpoint, 100 found."""
    rng = random.Random(29)
    places = [place_of(tmp_path / "data", data) for data in files(0).values()]
    for _ in range(BLOB_TRIALS):
        place = rng.choice(places)
        intact = place.read_bytes()
        place.write_bytes(damaged(intact, rng))
        assert lost(keeper)
        place.write_bytes(intact)
    assert not lost(keeper)


def place_of(folder: Path, data: bytes) -> Path:
    """Where a file of this content lies."""
    sha256 = hashlib.sha256(data).hexdigest()
    return folder / "blobs" / sha256[:2] / sha256


def test_blobs_that_are_swapped_missing_or_too_long_are_found(
    keeper: Keeper, tmp_path: Path
) -> None:
    """Row 29: a blob in the place of another, of the same checkpoint or of another one."""
    folder = tmp_path / "data"
    weights, moments = (place_of(folder, files(0)[name]) for name in (WEIGHTS, MOMENTS))
    intact = {place: place.read_bytes() for place in (weights, moments)}
    weights.write_bytes(intact[moments])
    moments.write_bytes(intact[weights])
    assert lost(keeper)
    moments.write_bytes(intact[moments])
    weights.write_bytes(place_of(folder, files(1)[WEIGHTS]).read_bytes())
    assert lost(keeper)
    weights.write_bytes(intact[weights] + b"\0")
    assert lost(keeper)
    weights.unlink()
    assert lost(keeper)
    assert not lost(keeper, OTHER)
    weights.mkdir()
    assert lost(keeper)


def _flip_column(keeper: Keeper, rng: random.Random) -> str:
    """Flip one bit of one column of the row of `PATH`, past its digest; returns the column."""
    column = rng.choice(("expire_time_s", "record", "record", "record", "digest"))
    db = keeper.catalogue._db
    (value,) = db.execute(f"SELECT {column} FROM checkpoints WHERE name='one'").fetchone()
    if isinstance(value, str):
        data = flipped(value.encode(), rng) if rng.random() < 0.8 else value.encode()[:-1]
        statement = f"UPDATE checkpoints SET {column}=CAST(? AS TEXT) WHERE name='one'"
    else:
        # Nothing, or a time: at random it lies before and after now, and may be no number.
        (data,) = struct.unpack("<d", flipped(struct.pack("<d", value or 1.8e9), rng))
        statement = f"UPDATE checkpoints SET {column}=? WHERE name='one'"
    db.execute(statement, (data,))
    return column


def test_every_damage_of_a_row_is_found_and_removes_nothing(keeper: Keeper, tmp_path: Path) -> None:
    """Row 29, I10: 100 damages of what is known of a checkpoint; each is DataLoss that names it.

    So is what copies, changes or exports it. It is left out of a listing, the sweep neither
    deletes it nor its bytes, and what is beside it can be read.
    """
    rng = random.Random(30)
    path = CheckpointPath.parse(PATH)
    db = keeper.catalogue._db
    (intact,) = db.execute("SELECT * FROM checkpoints WHERE name='one'").fetchall()
    before = blobs(tmp_path / "data")
    for _ in range(ROW_TRIALS):
        column = _flip_column(keeper, rng)
        for call in (
            lambda: kept(keeper),
            lambda: keeper.catalogue.get(path),
            lambda: keeper.copy(path, CheckpointPath.parse(PATH + "-copy"), None),
            lambda: keeper.catalogue.update(path, lambda found: found),
            lambda: keep(keeper, files(0)),
        ):
            with pytest.raises(DataLoss, match=PATH):
                call()
        page, total = keeper.catalogue.page(model_id="", kind=None, before=None, size=10)
        assert [str(checkpoint.path) for checkpoint in page] == [OTHER]
        assert total == 2 or column == "expire_time_s"
        keeper._collector._everything = True
        with pytest.raises(DataLoss):
            keeper.sweep()
        assert blobs(tmp_path / "data") == before
        assert not lost(keeper, OTHER)
        db.execute("DELETE FROM checkpoints WHERE name='one'")
        db.execute("INSERT INTO checkpoints VALUES (?,?,?,?,?,?,?)", tuple(intact))
    assert not lost(keeper)


def test_a_damaged_row_can_be_overwritten_or_deleted(keeper: Keeper, tmp_path: Path) -> None:
    """Row 29: damage is not for ever, and costs its own checkpoint only."""
    _flip_column(keeper, random.Random(1))
    keep(keeper, files(0), overwrite=True)
    assert not lost(keeper)
    _flip_column(keeper, random.Random(2))
    keeper.catalogue.delete(CheckpointPath.parse(PATH))
    keeper.sweep()
    assert len(blobs(tmp_path / "data")) == len(files(1))
    assert not lost(keeper, OTHER)


def test_a_row_that_says_another_base_model_or_other_files_is_found(keeper: Keeper) -> None:
    """Row 29: an entry of one checkpoint in the place of another's, with its valid digest."""
    db = keeper.catalogue._db
    (one, other) = db.execute("SELECT * FROM checkpoints ORDER BY number").fetchall()
    for record in (one["record"].replace("tiny", "huge"), other["record"]):
        assert record != one["record"]
        for its_digest in (one["digest"], other["digest"], digest_of(*tuple(other)[:-1])):
            db.execute(
                "UPDATE checkpoints SET record=?, digest=? WHERE name='one'", (record, its_digest)
            )
            assert lost(keeper)


def _outcome(folder: Path) -> str:
    """What comes of a start on this folder: refused, found (DataLoss), or unharmed."""
    before = blobs(folder)
    try:
        keeper = opened(folder)
    except CatalogueUnusable as refusal:
        if str(folder / "catalogue.sqlite") not in str(refusal) or "\n" in str(refusal):
            raise
        return "refused"
    try:
        found = [lost(keeper, path) for path in (PATH, OTHER)]
        try:
            keeper.catalogue.page(model_id="", kind=None, before=None, size=10)
            keeper.sweep()
        except TinsmithError as error:
            # A file that says it is of a later format can be read, not written.
            if not any(found) and error.reason != "CHECKPOINT_UNAVAILABLE":
                raise
        assert blobs(folder) == before
        return "found" if any(found) else "unharmed"
    finally:
        keeper.close()


def test_every_damage_of_the_catalogue_file_is_found(keeper: Keeper, tmp_path: Path) -> None:
    """Row 29, I10: 200 damages of SQLite's own bytes.

    After each the server refuses to start with a sentence, or each checkpoint is DataLoss or what
    was written, where the damage was to bytes that mean nothing. None is ever missing or other
    than it was, and no blob is removed.
    """
    keeper.close()
    intact = (tmp_path / "data" / "catalogue.sqlite").read_bytes()
    used = [index for index, byte in enumerate(intact) if byte]
    rng = random.Random(31)
    counts = {"refused": 0, "found": 0, "unharmed": 0}
    for trial in range(FILE_TRIALS):
        folder = tmp_path / str(trial)
        shutil.copytree(tmp_path / "data", folder)
        if trial % 4 == 0:
            data = damaged(intact, rng)
        else:
            # Three in four where there is something: most of a small file is empty.
            index = rng.choice(used)
            bit = bytes([intact[index] ^ 1 << rng.randrange(8)])
            data = intact[:index] + bit + intact[index + 1 :]
        (folder / "catalogue.sqlite").write_bytes(data)
        counts[_outcome(folder)] += 1
        shutil.rmtree(folder)
    assert counts["refused"] > FILE_TRIALS // 10, counts
    assert counts["found"] > FILE_TRIALS // 10, counts


def test_a_catalogue_that_is_lost_is_no_empty_one(keeper: Keeper, tmp_path: Path) -> None:
    """Row 29: without it, or with an empty file, all blobs would seem to be unused."""
    keeper.close()
    file = tmp_path / "data" / "catalogue.sqlite"
    before = blobs(tmp_path / "data")
    for lose in (file.unlink, lambda: file.write_bytes(b"")):
        lose()
        with pytest.raises(CatalogueUnusable, match="stored files"):
            opened(tmp_path / "data")
        assert blobs(tmp_path / "data") == before


def test_damage_of_the_log_after_a_crash_loses_no_checkpoint(
    keeper: Keeper, tmp_path: Path
) -> None:
    """Rows 5, 29: SQLite drops damaged records of its log silently; what they said is in the file.

    The folder is copied while the server has it, as a kill leaves it.
    """
    rng = random.Random(32)
    for trial in range(WAL_TRIALS):
        folder = tmp_path / str(trial)
        shutil.copytree(tmp_path / "data", folder)
        log = folder / "catalogue.sqlite-wal"
        log.write_bytes(damaged(log.read_bytes(), rng))
        assert _outcome(folder) == "unharmed"
        shutil.rmtree(folder)


def test_the_server_answers_damage_with_data_loss(tmp_path: Path) -> None:
    """Row 29, I9, through the wire: a read, an export, a copy and a get of what is damaged.

    20 damages of blobs; then one of the catalogue, on which the server does not start.
    """
    folder = tmp_path / "data"
    rng = random.Random(33)
    with ServerProcess(folder) as server:
        server.write(files(0))
        server.write(files(1), OTHER)
        weights = place_of(folder, files(0)[WEIGHTS])
        for _ in range(20):
            intact = weights.read_bytes()
            weights.write_bytes(damaged(intact, rng))
            for call in (
                lambda: server.read(),
                lambda: list(
                    server.stub.ExportCheckpoint(pb.ExportCheckpointRequest(checkpoint_path=PATH))
                ),
            ):
                with pytest.raises(grpc.RpcError) as loss:
                    call()
                assert loss.value.code() is grpc.StatusCode.DATA_LOSS
                assert reason_and_field(loss.value)[0] == "CHECKPOINT_CORRUPT"
            weights.write_bytes(intact)
        assert server.read() == files(0)
        assert server.stop() == 0
    file = folder / "catalogue.sqlite"
    intact = file.read_bytes()
    file.write_bytes(intact.replace(b'"base_model": "tiny"', b'"base_model": "tony"', 1))
    with ServerProcess(folder) as server:
        bad, good = (PATH, OTHER) if server.paths() == [OTHER] else (OTHER, PATH)
        copy = pb.CopyCheckpointRequest(
            source_checkpoint_path=bad, destination_checkpoint_path=bad + "-copy"
        )
        for call in (
            lambda: server.get(bad),
            lambda: server.read(bad),
            lambda: server.stub.CopyCheckpoint(copy),
        ):
            with pytest.raises(grpc.RpcError) as loss:
                call()
            assert loss.value.code() is grpc.StatusCode.DATA_LOSS
            assert bad in loss.value.details()
        assert server.read(good)
        assert server.stop() == 0
    file.write_bytes(intact[: len(intact) // 2])
    server = ServerProcess(folder)
    assert server.wait() == EXIT_HOPELESS
    *_, line = server.said.splitlines()
    assert line.startswith("tinsmithd.checkpoint: the catalogue ")


class Canary:
    """Pickled, it makes a file where it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, protocol: int) -> None:
    """Row 30: in the place of each file, sent or planted on the disk; nothing is executed."""
    folder, canary = tmp_path / "data", tmp_path / "canary"
    hostile = pickle.dumps(Canary(canary), protocol)
    with ServerProcess(folder) as server:
        for name in files(0):
            with pytest.raises(grpc.RpcError) as refusal:
                server.write({**files(0), name: hostile})
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert reason_and_field(refusal.value)[1] == f'commit.files["{name}"]'
            assert left_staged(folder) == []
        assert server.paths() == []
        server.write(files(0))
        for blob in blobs(folder):
            blob.write_bytes(hostile)
        with pytest.raises(grpc.RpcError) as loss:
            server.read()
        assert loss.value.code() is grpc.StatusCode.DATA_LOSS
        server.write(files(0), overwrite=True)
        assert server.read() == files(0)
    assert not canary.exists()
    pickle.loads(hostile)
    assert canary.exists(), "the canary would have sung"
