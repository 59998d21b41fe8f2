"""The Training server's end of the streams that rank groups hold open."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmith.internal.v1.trainer_link_service_pb2_grpc import TrainerLinkServiceServicer
from tinsmithd.errors import TinsmithError
from tinsmithd.formats import release
from tinsmithd.rpc import link_version
from tinsmithd.text import bounded
from tinsmithd.training.ranks.claims import GroupClaim, progress
from tinsmithd.training.ranks.place import RankGroupPlace
from tinsmithd.training.ranks.rank_group import AttachedRankGroup

LEAVE_S_MAX = 1.0
"""The stream of a group that lost its place has so long to end."""
PROGRESS_BYTES_MAX = 500
EPOCH_BITS = 20
"""The low bits of a group's epoch count the groups of one server; the others are its own epoch."""

_log = logging.getLogger(__name__)


class RankStarter(Protocol):
    """Starts rank groups, and knows them by the launch tokens that they show."""

    async def blamed(self, token: str) -> bool:
        """Whether a group ended by itself, not because somebody ended it."""

    def end(self, token: str) -> None:
        """End a group that lost its place by silence, if it was started here."""


class TrainerLinkServicer(TrainerLinkServiceServicer):
    """Takes rank 0's streams and lets one group work; others stand by.

    Args:
        place: Where the group at work is to be.
        epoch: That of this server, once it has claimed the journal.
        lease_s: A group that says nothing for so long loses its place.

    Attributes:
        starter: Starts the ranks, where this server does.
    """

    def __init__(self, place: RankGroupPlace, epoch: Callable[[], int], lease_s: float) -> None:
        self.starter: RankStarter | None = None
        self._place = place
        self._epoch = epoch
        self._lease_s = lease_s
        self._at_work = asyncio.Lock()
        self._groups: set[AttachedRankGroup] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._attached_count = 0
        self._closing = False
        self._refused = ""

    async def Attach(  # type: ignore[override]  # grpc.aio's form of the method
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Any
    ) -> AsyncIterator[pb.AttachResponse]:
        """Serve one rank group until its stream ends."""
        group = await self._hello(request_iterator)
        if group is None or self._closing:
            return
        self._groups.add(group)
        group.task = asyncio.current_task()
        reader = asyncio.create_task(self._read(group, request_iterator))
        has_place = False
        try:
            if self._at_work.locked():
                _log.info("a rank group stands by: %s", group.info.name)
            has_place = await self._wait_for_place(group)
            if has_place:
                yield self._welcome(group)
                async for command in group.commands():
                    yield command
        finally:
            reader.cancel()
            # A task of its own: this one may be cancelled, and it takes a moment to find out why a
            # group went.
            task = asyncio.create_task(self._leave(group, has_place=has_place))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _wait_for_place(self, group: AttachedRankGroup) -> bool:
        """Wait until this group may work; False where it went away before."""
        place: asyncio.Task[Any] | None = asyncio.create_task(self._at_work.acquire())
        gone = asyncio.create_task(group.gone.wait())
        assert place is not None
        try:
            await asyncio.wait([place, gone], return_when=asyncio.FIRST_COMPLETED)
            if group.gone.is_set():
                return False
            placed, place = place, None
            return placed.done()
        finally:
            gone.cancel()
            if place is not None and not place.cancel():
                self._at_work.release()

    async def _leave(self, group: AttachedRankGroup, *, has_place: bool) -> None:
        await self._lose(group, "the rank group's connection ended")
        self._groups.discard(group)
        if has_place:
            self._place.detach(group)
            self._at_work.release()
            _log.log(logging.INFO if self._closing else logging.WARNING, "rank group detached")

    async def _lose(self, group: AttachedRankGroup, why: str) -> None:
        if not group.gone.is_set():
            group.lose(why, blamed=not group.leaving and await self._blamed(group.launch_token))

    async def _blamed(self, token: str) -> bool:
        """Whether a group ended by itself; yes where nobody knows."""
        return True if self.starter is None else await self.starter.blamed(token)

    def _welcome(self, group: AttachedRankGroup) -> pb.AttachResponse:
        self._attached_count += 1
        info = group.info
        _log.info(
            "rank group attached: %s, %d rank(s), %s engine, %s, release %s",
            *(info.name, group.world_size, group.engine, info.dtype, group.release or "unknown"),
        )
        self._place.attach(group)
        # It rises over restarts of this server, too: the server's epoch does.
        epoch = (self._epoch() << EPOCH_BITS) + self._attached_count
        welcome = pb.Welcome(epoch=epoch, link_version=link_version.said(), release=release())
        return pb.AttachResponse(welcome=welcome)

    async def watch(self) -> None:
        """Take the place from groups that fall silent, until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._lease_s / 4))
            oldest_s = asyncio.get_running_loop().time() - self._lease_s
            for group in list(self._groups):
                if group.heard_s < oldest_s:
                    message = f"the rank group said nothing for {self._lease_s:g} s"
                    _log.error("%s: it has lost its place", message)
                    group.lose(message)
                    self._place.detach(group)
                    if self.starter is not None:
                        self.starter.end(group.launch_token)
                    if group.task is not None:  # it may write to that group for ever
                        asyncio.get_running_loop().call_later(LEAVE_S_MAX, group.task.cancel)

    def close(self) -> None:
        """Let all groups go."""
        self._closing = True
        for group in list(self._groups):
            group.lose("the Training server stops")

    async def _hello(self, requests: AsyncIterator[pb.AttachRequest]) -> AttachedRankGroup | None:
        async for request in requests:
            if request.WhichOneof("content") == "loading":
                message = progress(request.loading)
                _log.info("a rank group starts: %s", message)
                self._place.progress = message
            elif request.WhichOneof("content") == "hello":
                claim = self._claim(request.hello)
                return AttachedRankGroup(claim, asyncio.get_running_loop().time)
        return None

    def _claim(self, hello: pb.Hello) -> GroupClaim:
        try:
            return GroupClaim.of(hello)
        except TinsmithError as error:
            # Whoever waits for ranks hears why there are none; they hear it, too, and try again.
            self._place.progress = bounded(error.message, PROGRESS_BYTES_MAX)
            if self._place.progress != self._refused:
                self._refused = self._place.progress
                _log.error("a rank group is refused: %s", str(error))
            raise

    async def _read(
        self, group: AttachedRankGroup, requests: AsyncIterator[pb.AttachRequest]
    ) -> None:
        try:
            async for request in requests:
                group.answered(request)
        except (grpc.RpcError, TinsmithError) as error:
            await self._lose(group, f"the rank group's stream broke: {error}")
        else:
            await self._lose(group, "the rank group ended")
