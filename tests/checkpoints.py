"""Checkpoints for tests: their files, the messages that write them, and servers in processes."""

import contextlib
import hashlib
import json
import os
import signal
import time
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np

import programs
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmithd.checkpoint.catalogue import Checkpoint, Writer
from tinsmithd.checkpoint.opening import ObjectPlace, open_keeper
from tinsmithd.checkpoint.rules import Clocks, Header, Keeper
from tinsmithd.checkpoint.store import Blob
from tinsmithd.domain import CheckpointInfo, CheckpointPath, LoraConfig, ModelState
from tinsmithd.files import DEPOSITS_FOLDER, hold_deposit
from tinsmithd.state import files as state_files
from tinsmithd.state import tensors as state_tensors

PATH = "tinsmith://run/weights/one"
LEASE_S = 30.0
LORA = LoraConfig(rank=4)
PEFT_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 32}


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now_s = time.time()

    def __call__(self) -> float:
        return self.now_s


class TimedKeeper:
    """A keeper whose clocks a test moves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wall, self.monotonic = Clock(), Clock()
        self.start()

    def start(self) -> None:
        """Open it."""
        self.keeper = open_keeper(
            self.folder,
            checkpoint_bytes_max=1 << 30,
            lease_s=LEASE_S,
            clocks=Clocks(self.wall, self.monotonic),
        )

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path) -> Iterator[Self]:
        """One that is open for the body of the `with`."""
        timed = cls(folder)
        try:
            yield timed
        finally:
            timed.keeper.close()

    def restart(self) -> None:
        """Close it and open it again."""
        self.keeper.close()
        self.start()


class NeverRead:
    """Of a Checkpoint server that a test only writes to, what reads."""

    @contextlib.asynccontextmanager
    async def reader(self, path: CheckpointPath) -> AsyncIterator[Self]:
        raise NotImplementedError
        yield self

    async def get(self, path: CheckpointPath) -> CheckpointInfo:
        raise NotImplementedError


def files(seed: int = 0, *, optimizer: bool = True, columns: int = 900) -> dict[str, bytes]:
    """The files of a small adapter, other ones for each seed."""
    rng = np.random.default_rng(seed)
    shapes = {"a.lora_A.weight": (4, columns), "a.lora_B.weight": (6, 4)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    moments = {f"{kind}.{k}": v**2 for k, v in weights.items() for kind in state_tensors.MOMENTS}
    if not optimizer:
        moments = {}
    return to_files(ModelState(LORA, weights, moments, 3, PEFT_CONFIG))


def to_files(state: ModelState) -> dict[str, bytes]:
    """The files of a state."""
    found: dict[str, bytes] = {}
    for name, data in state_files.to_pieces(state, 1 << 30):
        found[name] = found.get(name, b"") + data
    return found


def messages(
    path: str, content: Mapping[str, bytes], *, piece_bytes: int = 5000, **header: object
) -> Iterator[pb.WriteCheckpointRequest]:
    """A whole write."""
    lora = types_pb2.LoraConfig(rank=4, seed=0)
    fields = {"base_model": "tiny", "lora_config": lora, "step_count": 3, **header}
    yield pb.WriteCheckpointRequest(header=pb.WriteCheckpointHeader(checkpoint_path=path, **fields))
    for name, data in content.items():
        for start in range(0, len(data), piece_bytes):
            yield piece(name, start, data[start : start + piece_bytes])
    yield commit(content)


def piece(
    name: str, offset: int, data: bytes, crc32: int | None = None
) -> pb.WriteCheckpointRequest:
    """One piece; with `crc32`, under that checksum."""
    crc32 = zlib.crc32(data) if crc32 is None else crc32
    part = pb.CheckpointPiece(file_name=name, offset=offset, data=data, crc32=crc32)
    return pb.WriteCheckpointRequest(piece=part)


def commit(content: Mapping[str, bytes]) -> pb.WriteCheckpointRequest:
    """The commit of these files."""
    listed = [
        pb.CheckpointFile(name=n, size_bytes=len(d), sha256=hashlib.sha256(d).digest())
        for n, d in content.items()
    ]
    return pb.WriteCheckpointRequest(commit=pb.WriteCheckpointCommit(files=listed))


def leave(folder: Path, content: Mapping[str, bytes], *, held: bool = True) -> str:
    """Leave files in a deposit of a server's data folder; returns its name.

    It is held by this process for as long as that runs, or by nobody.
    """
    deposit, holder = hold_deposit(folder / DEPOSITS_FOLDER)
    for file, data in content.items():
        (deposit / file).write_bytes(data)
    if not held:
        os.close(holder)
    return deposit.name


def joined(responses: Iterator[pb.ReadCheckpointResponse]) -> dict[str, bytes]:
    """The files that a read gave; raises what it raised."""
    got: dict[str, bytes] = {}
    for response in responses:
        if response.HasField("piece"):
            got[response.piece.file_name] = (
                got.get(response.piece.file_name, b"") + response.piece.data
            )
    return got


# --- without a wire ---------------------------------------------------------------------------


def keep(
    keeper: Keeper,
    content: Mapping[str, bytes],
    path: str = PATH,
    *,
    overwrite: bool = False,
    ttl_seconds: int | None = None,
    writer: Writer | None = None,
    ephemeral: bool = False,
    lease_id: str = "",
) -> Checkpoint:
    """Write a checkpoint into a keeper, as the servicer does."""
    header = Header(
        path=CheckpointPath.parse(path),
        base_model="tiny",
        tuning=LORA,
        step_count=3,
        ttl_seconds=ttl_seconds,
        overwrite=overwrite,
        user_metadata={"who": "a test"},
        writer=writer,
        ephemeral=ephemeral,
        lease_id=lease_id,
    )
    write = keeper.begin(header)
    try:
        for name, data in content.items():
            for start in range(0, len(data), 5000):
                write.append(name, start, data[start : start + 5000])
        return write.commit(
            [Blob(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in content.items()]
        )
    finally:
        write.discard()


def kept(keeper: Keeper, path: str = PATH) -> dict[str, bytes]:
    """The files of a checkpoint in a keeper."""
    _, opened = keeper.open(CheckpointPath.parse(path))
    return {blob.name: b"".join(content) for blob, content in opened}


def blobs(folder: Path) -> list[Path]:
    """All blobs of a data folder."""
    return sorted(path for path in (folder / "blobs").rglob("*") if path.is_file())


def staged(folder: Path) -> list[Path]:
    """What is in staging."""
    return sorted((folder / "staging").iterdir())


def left_staged(folder: Path) -> list[Path]:
    """What stays in staging: a committed write is cleared away behind its answer."""
    give_up_s = time.monotonic() + 10
    while (left := staged(folder)) and time.monotonic() < give_up_s:
        time.sleep(0.01)
    return left


# --- in a process of its own ------------------------------------------------------------------


class ServerProcess(programs.Logged):
    """`python -m tinsmithd.checkpoint` on a free port; a context manager that kills it.

    Args:
        folder: Its data folder.
        failpoints: `TINSMITH_FAILPOINTS` for it.
        beside: Folder for its port file and log; None is the one that has the data folder.
        place: An object store that has its checkpoints; None: they are in its folder.

    Attributes:
        stub: Calls it; only where it came up.
    """

    def __init__(
        self,
        folder: Path,
        failpoints: str = "",
        beside: Path | None = None,
        place: ObjectPlace | None = None,
    ) -> None:
        beside = beside or folder.parent
        port_file = beside / f"{folder.name}.port"
        port_file.unlink(missing_ok=True)
        settings = {
            "TINSMITH_CHECKPOINT_LISTEN_ADDRESS": "127.0.0.1:0",
            "TINSMITH_CHECKPOINT_DATA_FOLDER": str(folder),
            "TINSMITH_CHECKPOINT_PORT_FILE": str(port_file),
            "TINSMITH_CHECKPOINT_LIVE_WITH_PID": str(os.getpid()),
            "TINSMITH_CHECKPOINT_STOP_GRACE_S": "5",
            "TINSMITH_FAILPOINTS": failpoints,
        }
        if place is not None:
            options = beside / f"{folder.name}.options.json"
            options.write_text(json.dumps(dict(place.options)))
            settings["TINSMITH_CHECKPOINT_STORE_URL"] = place.url
            settings["TINSMITH_CHECKPOINT_STORE_OPTIONS_FILE"] = str(options)
        env = programs.variables(**settings)
        super().__init__(beside / f"{folder.name}.log", "tinsmithd.checkpoint", env=env)
        self._channel: grpc.Channel | None = None
        with contextlib.suppress(programs.Ended):
            self.address = f"127.0.0.1:{self.port_in(port_file)}"
            self._channel = grpc.insecure_channel(self.address)
            self.stub = CheckpointServiceStub(self._channel)

    def write(self, content: Mapping[str, bytes], path: str = PATH, **header: Any):
        """Write a checkpoint; the server's answer."""
        stream = messages(path, content, **header)
        return self.stub.WriteCheckpoint(stream, timeout=60).checkpoint

    def read(self, path: str = PATH) -> dict[str, bytes]:
        """The files of a checkpoint."""
        return joined(
            self.stub.ReadCheckpoint(pb.ReadCheckpointRequest(checkpoint_path=path), timeout=60)
        )

    def get(self, path: str = PATH) -> pb.Checkpoint:
        """What is known of a checkpoint."""
        request = pb.GetCheckpointRequest(checkpoint_path=path)
        return self.stub.GetCheckpoint(request, timeout=60).checkpoint

    def paths(self, page_size: int = 0) -> list[str]:
        """Paths of all checkpoints, newest first, if one page has them."""
        request = pb.ListCheckpointsRequest(page_size=page_size)
        response = self.stub.ListCheckpoints(request, timeout=60)
        return [checkpoint.checkpoint_path for checkpoint in response.checkpoints]

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        super().kill()
        if self._channel is not None:
            self._channel.close()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()
