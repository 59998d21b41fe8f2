"""A Checkpoint server in memory, and the client that the Training server has of it."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sim.loop import PROCESS
from tinsmithd.domain import CheckpointInfo, CheckpointKind, CheckpointPath
from tinsmithd.errors import AlreadyExists, FailedPrecondition, NotFound, Reason, Unavailable
from tinsmithd.saves import NewCheckpoint

if TYPE_CHECKING:
    from sim.world import World

STALL_S_MAX = 5.0


@dataclass(frozen=True)
class Saved:
    """A checkpoint."""

    about: CheckpointInfo
    pieces: tuple[tuple[str, bytes], ...]
    request_id: str


class SimCheckpoints:
    """The server.

    Attributes:
        down: It cannot be reached.
        going: Cleared while it hangs: it answers nobody, and is given up after a while.
        losing: Its last answer to a write gets lost.
    """

    def __init__(self, world: "World") -> None:
        self.world = world
        self.rng = world.stream("checkpoints")
        self.saved: dict[str, Saved] = {}
        self.down = False
        self.going = asyncio.Event()
        self.going.set()
        self.losing = False
        self._epochs: dict[str, int] = {}

    async def reach(self) -> None:
        """The way to the server, or back."""
        await asyncio.sleep(self.rng.uniform(0.001, 0.02))
        try:
            async with asyncio.timeout(STALL_S_MAX):
                await self.going.wait()
        except TimeoutError as error:
            self.world.count("checkpoint server given up")
            text = "the Checkpoint server made no progress"
            reason = Reason.CHECKPOINT_UNAVAILABLE
            raise Unavailable(text, reason, retry_after_s=1.0) from error
        if self.down:
            self.world.count("checkpoint server unreachable")
            text = "the Checkpoint server cannot be reached"
            raise Unavailable(text, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=1.0)

    def check_epoch(self, name: str, epoch: int) -> None:
        """Refuse a writer that was replaced."""
        if epoch < self._epochs.get(name, 0):
            self.world.count("checkpoint writers fenced")
            raise FailedPrecondition("the writer was replaced", Reason.STALE_EPOCH)
        self._epochs[name] = epoch

    def add(self, saved: Saved, *, overwrite: bool) -> CheckpointInfo:
        """Make a checkpoint visible; only the same request is a repeat."""
        path = str(saved.about.path)
        found = self.saved.get(path)
        if found is not None and not overwrite:
            if not saved.request_id or found.request_id != saved.request_id:
                raise AlreadyExists(f"{path} exists", Reason.CHECKPOINT_EXISTS)
            if found.pieces != saved.pieces:
                self.world.fail(f"{path} was saved again with other files")
        size_bytes = sum(len(data) for _, data in saved.pieces)
        about = replace(saved.about, size_bytes=size_bytes, digest=digest_of(saved.pieces))
        self.saved[path] = Saved(about, saved.pieces, saved.request_id)
        return about


class SimWriter:
    """See `CheckpointWriter`."""

    def __init__(
        self, client: "SimCheckpointClient", about: CheckpointInfo, new: NewCheckpoint
    ) -> None:
        self._client = client
        self._server = client.server
        self._about = about
        self._new = new
        self._pieces: list[tuple[str, bytes]] = []
        self._cancelled = False

    async def write(self, file_name: str, data: bytes) -> None:
        """Append bytes to a file."""
        await self._server.reach()
        self._server.check_epoch(self._client.writer_name, self._client.writer_epoch)
        self._pieces.append((file_name, data))

    async def commit(self) -> CheckpointInfo:
        """Make it visible."""
        client, server = self._client, self._server
        await server.reach()
        assert not self._cancelled
        server.check_epoch(client.writer_name, client.writer_epoch)
        saved = Saved(self._about, tuple(self._pieces), self._new.options.request_id)
        about = server.add(saved, overwrite=self._new.options.overwrite)
        server.world.log("checkpoint", str(self._about.path), client.writer_epoch)
        if server.losing:
            server.world.count("checkpoint answers lost")
            raise Unavailable("lost", Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=1.0)
        await server.reach()
        return about

    def cancel(self) -> None:
        """Give up."""
        self._cancelled = True


class SimReader:
    """See `CheckpointReader`."""

    def __init__(self, server: SimCheckpoints, saved: Saved) -> None:
        self.info = saved.about
        self._server = server
        self._pieces = saved.pieces

    async def pieces(self) -> AsyncIterator[tuple[str, bytes]]:
        """The files of a checkpoint."""
        for name, data in self._pieces:
            yield name, data
            await self._server.reach()


class SimStaged:
    """See `Staged`."""

    def __init__(self) -> None:
        self._pieces: list[tuple[str, bytes]] = []
        self._complete = False
        self._more = asyncio.Event()

    async def write(self, name: str, data: bytes) -> None:
        """Append bytes to a file."""
        self._pieces.append((name, data))
        self._more.set()

    def complete(self) -> None:
        """Say that nothing more is written."""
        self._complete = True
        self._more.set()

    async def pieces(self) -> AsyncIterator[tuple[str, bytes]]:
        """What was written, and what still is."""
        index = 0
        while index < len(self._pieces) or not self._complete:
            if index == len(self._pieces):
                self._more.clear()
                await self._more.wait()
                continue
            yield self._pieces[index]
            index += 1


class SimStaging:
    """See `Staging`."""

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[SimStaged]:
        """Room for one state."""
        yield SimStaged()


class SimCheckpointClient:
    """See `CheckpointClient`."""

    def __init__(self, server: SimCheckpoints) -> None:
        self.server = server
        self.writer_name, self.writer_epoch = "", 0

    def writer(self, new: NewCheckpoint) -> SimWriter:
        """Begin a checkpoint."""
        path = new.options.path
        about = CheckpointInfo(path, path.kind, new.base_model, new.tuning, new.step_count)
        return SimWriter(self, about, new)

    @contextlib.asynccontextmanager
    async def reader(self, path: CheckpointPath) -> AsyncIterator["SimReader"]:
        """Read a checkpoint."""
        await self.server.reach()
        yield SimReader(self.server, self._find(path))

    async def close(self) -> None:
        """Close the channel."""

    def _find(self, path: CheckpointPath) -> Saved:
        assert PROCESS.get() is not None
        found = self.server.saved.get(str(path))
        if found is None:
            raise NotFound(f"no checkpoint {path}", Reason.CHECKPOINT_NOT_FOUND)
        return found


def digest_of(pieces: tuple[tuple[str, bytes], ...]) -> bytes:
    """Equal for equal files."""
    return hashlib.sha256(repr(pieces).encode()).digest()


def training(path: CheckpointPath) -> bool:
    """Whether a checkpoint has the optimizer state."""
    return path.kind is CheckpointKind.TRAINING
