"""A Checkpoint server in memory, and the client that the Training server has of it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sim.loop import PROCESS
from tinsmithd.domain import CheckpointKind, CheckpointPath, Tuning
from tinsmithd.errors import AlreadyExists, FailedPrecondition, NotFound, Reason, Unavailable
from tinsmithd.training.checkpoints import CheckpointInfo
from tinsmithd.training.works import SaveOptions

if TYPE_CHECKING:
    from sim.world import World


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
        losing: Its last answer to a write gets lost.
    """

    def __init__(self, world: "World") -> None:
        self.world = world
        self.rng = world.stream("checkpoints")
        self.saved: dict[str, Saved] = {}
        self.down = False
        self.losing = False
        self._epochs: dict[str, int] = {}

    async def reach(self) -> None:
        """The way to the server, or back."""
        await asyncio.sleep(self.rng.uniform(0.001, 0.02))
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

    def add(self, saved: Saved, *, overwrite: bool) -> int:
        """Make a checkpoint visible; only the same request is a repeat."""
        path = str(saved.about.path)
        found = self.saved.get(path)
        if found is not None and not overwrite:
            if not saved.request_id or found.request_id != saved.request_id:
                raise AlreadyExists(f"{path} exists", Reason.CHECKPOINT_EXISTS)
            if found.pieces != saved.pieces:
                self.world.fail(f"{path} was saved again with other files")
        self.saved[path] = saved
        return sum(len(data) for _, data in saved.pieces)


class SimWriter:
    """See `CheckpointWriter`."""

    def __init__(
        self, client: "SimCheckpointClient", about: CheckpointInfo, options: SaveOptions
    ) -> None:
        self._client = client
        self._server = client.server
        self._about = about
        self._options = options
        self._pieces: list[tuple[str, bytes]] = []
        self._cancelled = False

    async def write(self, file_name: str, data: bytes) -> None:
        """Append bytes to a file."""
        await self._server.reach()
        self._server.check_epoch(self._client.writer_name, self._client.writer_epoch)
        self._pieces.append((file_name, data))

    async def commit(self) -> int:
        """Make it visible."""
        client, server = self._client, self._server
        await server.reach()
        assert not self._cancelled
        server.check_epoch(client.writer_name, client.writer_epoch)
        saved = Saved(self._about, tuple(self._pieces), self._options.request_id)
        size = server.add(saved, overwrite=self._options.overwrite)
        server.world.log("checkpoint", str(self._about.path), client.writer_epoch)
        if server.losing:
            server.world.count("checkpoint answers lost")
            raise Unavailable("lost", Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=1.0)
        await server.reach()
        return size

    def cancel(self) -> None:
        """Give up."""
        self._cancelled = True


class SimCheckpointClient:
    """See `CheckpointClient`."""

    def __init__(self, server: SimCheckpoints) -> None:
        self.server = server
        self.writer_name, self.writer_epoch = "", 0

    def writer(
        self, options: SaveOptions, base_model: str, tuning: Tuning, step_count: int
    ) -> SimWriter:
        """Begin a checkpoint."""
        path = options.path
        about = CheckpointInfo(path, path.kind, base_model, tuning, step_count)
        return SimWriter(self, about, options)

    async def get(self, path: CheckpointPath) -> CheckpointInfo:
        """What a checkpoint is."""
        await self.server.reach()
        return self._find(path).about

    async def read(self, path: CheckpointPath) -> AsyncIterator[tuple[str, bytes]]:
        """The files of a checkpoint."""
        await self.server.reach()
        for name, data in self._find(path).pieces:
            yield name, data
            await self.server.reach()

    async def close(self) -> None:
        """Close the channel."""

    def _find(self, path: CheckpointPath) -> Saved:
        assert PROCESS.get() is not None
        found = self.server.saved.get(str(path))
        if found is None:
            raise NotFound(f"no checkpoint {path}", Reason.CHECKPOINT_NOT_FOUND)
        return found


def training(path: CheckpointPath) -> bool:
    """Whether a checkpoint has the optimizer state."""
    return path.kind is CheckpointKind.TRAINING
