"""Checkpoints and the turns at the ranks: they are fetched before one, and sent beside others."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from tinsmithd.domain import BaseModelInfo, CheckpointInfo, CheckpointPath
from tinsmithd.errors import AlreadyExists, FailedPrecondition, NotFound, Reason, Unavailable
from tinsmithd.saves import NewCheckpoint
from tinsmithd.state import files as state_files
from tinsmithd.training.models.deposits import Deposit, Deposits
from tinsmithd.training.models.staging import Copies, Staged, Staging


class CheckpointReader(Protocol):
    """One checkpoint that is being read."""

    @property
    def info(self) -> CheckpointInfo:
        """What it is."""

    def pieces(self) -> AsyncIterator[tuple[str, bytes]]:
        """Its files, piece by piece, once; only a normal end means that all is well."""


class CheckpointWriter(Protocol):
    """One checkpoint on its way: `write` pieces, or say what is in a deposit, then `commit`.

    `cancel` leaves nothing.
    """

    async def write(self, file_name: str, data: bytes) -> None:
        """Append bytes to a file; files come one after the other."""

    async def begin(self, deposit: str) -> None:
        """Say that files are being left in a deposit, or else are written after this."""

    def deposited(self, files: Mapping[str, int]) -> None:
        """Say that the files, with their bytes, are in the deposit; nothing may have been
        written."""

    async def commit(self) -> CheckpointInfo:
        """Make it durable and visible; returns what it is now."""

    def cancel(self) -> None:
        """Give up; harmless after `commit`."""


class CheckpointServer(Protocol):
    """The Checkpoint server, as the Training server uses it; `checkpoint_client` speaks to it."""

    def reader(self, path: CheckpointPath) -> AbstractAsyncContextManager[CheckpointReader]:
        """Read a checkpoint for the body of the `async with`.

        Raises:
            NotFound: There is none (CHECKPOINT_NOT_FOUND).
            Unavailable: The server does not answer (CHECKPOINT_UNAVAILABLE).
        """

    def writer(self, new: NewCheckpoint) -> CheckpointWriter:
        """Begin a checkpoint."""

    async def get(self, path: CheckpointPath) -> CheckpointInfo:
        """What a path means now.

        Raises:
            NotFound: Nothing (CHECKPOINT_NOT_FOUND).
            Unavailable: The server does not answer (CHECKPOINT_UNAVAILABLE).
        """


class Checkpoints:
    """Takes whole checkpoints from the Checkpoint server and gives them to it.

    Whoever holds a turn must not use it: that server may be slow, or not answer at all.

    Args:
        server: The Checkpoint server.
        staging: Where states are put down on their way.
        copies: How many states are in memory.
        deposits: Where states may be left for the server; None: nowhere.
    """

    def __init__(
        self,
        server: CheckpointServer,
        staging: Staging,
        copies: Copies,
        deposits: Deposits | None = None,
    ) -> None:
        self._server = server
        self.deposits = deposits or Deposits(None)
        self.staging = staging
        self.copies = copies

    @contextlib.asynccontextmanager
    async def fetched(
        self, path: CheckpointPath, check: Callable[[CheckpointInfo], None]
    ) -> AsyncIterator[tuple[CheckpointInfo, Staged]]:
        """A checkpoint, whole and verified, for the body of the `async with`.

        Args:
            path: Which one. Its name is looked up once: info and files are of the same one.
            check: Raises where it does not fit, before its files are read.
        """
        async with self.staging.open() as staged:
            async with self._server.reader(path) as reader:
                info = reader.info
                check(info)
                async for name, data in reader.pieces():
                    await staged.write(name, data)
            staged.complete()
            yield info, staged

    @contextlib.asynccontextmanager
    async def saving(
        self,
        new: NewCheckpoint,
        staged: Staged,
        deposit: Deposit | None,
        before_commit: Callable[[], Awaitable[None]],
    ) -> AsyncIterator[Callable[[], Awaitable[CheckpointInfo]]]:
        """Save a state while it is put down, in the body of the `async with`.

        Nothing of it is visible before it is complete.

        Args:
            new: What it is to be.
            staged: Where it comes in.
            deposit: Where it is instead, if that has files; it is told when they begin to come.
            before_commit: Begins with the save, and is awaited before others can see it.

        Yields:
            Says that the state is complete and waits until it is saved; returns what it is now. It
            raises TinsmithError where the Checkpoint server refuses it, or does not answer.
        """
        begun = asyncio.create_task(self._save(new, staged.pieces(), deposit, before_commit))

        async def saved() -> CheckpointInfo:
            came_first = begun.done()
            staged.complete()
            try:
                return await begun
            except Unavailable as error:
                if not came_first and error.reason is not Reason.STREAM_STALLED:
                    raise
                # That server was away, or the ranks slow to send: now all of it is here.
                return await self._save(new, staged.pieces(), deposit, before_commit)
            except NotFound as error:
                if deposit is None or error.reason is not Reason.DEPOSIT_NOT_FOUND:
                    raise
                self.deposits.are_not_found()
                return await self._save(new, deposit.pieces(), None, before_commit)

        try:
            yield saved
        finally:
            begun.cancel()
            await asyncio.gather(begun, return_exceptions=True)

    async def _save(
        self,
        new: NewCheckpoint,
        pieces: AsyncIterator[tuple[str, bytes]],
        deposit: Deposit | None,
        before_commit: Callable[[], Awaitable[None]],
    ) -> CheckpointInfo:
        writer = self._server.writer(new)
        ready = asyncio.ensure_future(before_commit())
        try:
            if deposit is not None:
                await deposit.begun.wait()
                await writer.begin(deposit.name)
            async for name, data in pieces:
                await writer.write(name, data)
            if deposit is not None and deposit.files:
                writer.deposited(deposit.files)
            await ready
            return await writer.commit()
        except AlreadyExists as error:
            if error.reason is not Reason.REQUEST_ID_CONFLICT:
                raise
            # This call saved it, before ranks died that rounded in another way, as GPUs do.
            return await self._server.get(new.options.path)
        finally:
            writer.cancel()
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)


def check_claim(found: CheckpointInfo, info: BaseModelInfo, rank_max: int) -> None:
    """Refuse a checkpoint by what it claims to be, before its files are read into memory.

    Args:
        found: What it claims to be.
        info: The base model that is to take it.
        rank_max: Largest LoRA rank.

    Raises:
        FailedPrecondition: No model here can be that (INCOMPATIBLE_CHECKPOINT).
    """
    what = ""
    if found.tuning.adapter_rank > rank_max:
        what = f"rank {found.tuning.adapter_rank}, rank_max is {rank_max}"
    bytes_max = state_files.state_bytes_max(info.parameter_count)
    if found.size_bytes > bytes_max:
        what = f"{found.size_bytes} bytes, a model of this base at most {bytes_max}"
    if what:
        message = f"{found.path} has {what}"
        raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)


def check_base_model(found: str, wanted: str) -> None:
    """Refuse a checkpoint of another base model than the one that was asked for, if any was."""
    if wanted and found != wanted:
        message = f"the checkpoint is of base model {found!r}, not {wanted!r}"
        raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)


def wrong_kind(path: CheckpointPath) -> FailedPrecondition:
    """The error of a checkpoint without the optimizer state that is needed."""
    return FailedPrecondition(
        f"{path} has no optimizer state: a TRAINING checkpoint is needed",
        Reason.WRONG_CHECKPOINT_KIND,
    )
