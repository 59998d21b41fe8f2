"""Holds the sampler weights that this process's clients use, for as long as they use them.

Weights without a name live while somebody holds them. A client that is closed or collected as
garbage gives its lease back at once; if that is not heard, or the process dies, the lease runs out
by itself.
"""

import asyncio
import contextlib
import logging
import secrets
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from tinsmith import _fork, _loop
from tinsmith.errors import TinsmithError
from tinsmith.v1 import checkpoint_service_pb2 as pb

if TYPE_CHECKING:
    from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceAsyncStub

EPHEMERAL_PREFIX = "ephemeral-"
RENEWALS_PER_LEASE = 3
FIRST_LEASE_S = 30.0
"""Until the service has said how long a lease lasts."""
RETRY_S = 1.0
RENEW_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 1.0
LEASES_MAX = 1000
"""Maximum number of leases of one kind in one request."""

_log = logging.getLogger("tinsmith")


def is_ephemeral(path: str | None) -> bool:
    """Whether a checkpoint has a name that the service gave it."""
    return path is not None and path.rpartition("/")[2].startswith(EPHEMERAL_PREFIX)


def new_lease_id() -> str:
    """The id of a lease that is about to be taken; nobody else can guess it."""
    return secrets.token_hex(16)


@dataclass
class _Lease:
    """One lease.

    Attributes:
        holder: Calls back when the holder is collected.
        handed_on: Somebody may be on the way to a lease of its own, and needs this one meanwhile.
        until_s: When it has run out by itself, once nobody holds it.
    """

    path: str
    holder: "weakref.ref[Any]"
    handed_on: bool = False
    until_s: float = 0.0


class Leases:
    """The leases of one connection, one for each holder.

    Args:
        checkpoint: Finds the Checkpoint service.
    """

    def __init__(self, checkpoint: "Callable[[], Awaitable[CheckpointServiceAsyncStub]]") -> None:
        self._checkpoint = checkpoint
        # All by lease id, and only used on the loop.
        self._held: dict[str, _Lease] = {}
        self._new: dict[str, _Lease] = {}  # those held ones that the service does not know of
        self._released: dict[str, _Lease] = {}
        self._changed = asyncio.Event()
        self._telling: asyncio.Task[None] | None = None
        self._lease_s = FIRST_LEASE_S
        self._due_s = 0.0  # when all that is held is renewed again
        self._closed = False

    def hold(self, holder: object, path: str, lease_id: str = "") -> str:
        """Hold a path from now on until `holder` is collected or lets go; from any thread.

        Args:
            holder: Whoever needs what is there.
            path: Of an ephemeral checkpoint.
            lease_id: A lease that the service knows of already; empty: it hears of one now.

        Returns:
            The lease's id, for `hand_on` and `let_go`.
        """
        known, lease_id = bool(lease_id), lease_id or new_lease_id()
        if not _fork.is_broken():  # a holder there cannot sample, and must be told when it tries to
            loop = _loop.loop()

            def collected(_: "weakref.ref[Any]") -> None:
                # Called in any thread at any point of its work: it must not wait for a lock.
                if not _fork.is_broken():
                    loop.call_soon_threadsafe(self._let_go, lease_id)

            lease = _Lease(path, weakref.ref(holder, collected))
            loop.call_soon_threadsafe(self._add, lease_id, lease, known)
        return lease_id

    def hand_on(self, lease_id: str) -> None:
        """Let this lease run out by itself when nobody holds it any more; from any thread."""
        if not _fork.is_broken():
            _loop.loop().call_soon_threadsafe(self._hand_on, lease_id)

    def let_go(self, lease_id: str) -> None:
        """Give a lease back; from any thread."""
        if not _fork.is_broken():
            _loop.loop().call_soon_threadsafe(self._let_go, lease_id)

    async def close(self) -> None:
        """Hold nothing any more, and say so if that is done in a moment; on the loop."""
        self._closed = True
        for lease_id in list(self._held):
            self._let_go(lease_id)
        if self._telling is not None:
            self._telling.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._tell({})

    def _add(self, lease_id: str, lease: _Lease, known: bool) -> None:
        if self._closed:
            return
        self._held[lease_id] = lease
        if not known:
            self._new[lease_id] = lease
            self._changed.set()
        if self._telling is None:
            self._telling = asyncio.create_task(self._run(), name="leases")

    def _hand_on(self, lease_id: str) -> None:
        if lease_id in self._held:
            self._held[lease_id].handed_on = True

    def _let_go(self, lease_id: str) -> None:
        lease = self._held.pop(lease_id, None)
        self._new.pop(lease_id, None)
        if lease is not None and not lease.handed_on:
            lease.until_s = asyncio.get_running_loop().time() + self._lease_s
            self._released[lease_id] = lease
            self._changed.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._held or self._released:
                self._changed.clear()
                due = loop.time() >= self._due_s
                wait_s = RETRY_S
                if await self._tell(self._held if due else self._new):
                    if due:
                        self._due_s = loop.time() + self._lease_s / RENEWALS_PER_LEASE
                    wait_s = self._due_s - loop.time()
                if self._held or self._released:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(max(wait_s, 0.05)):
                            await self._changed.wait()
        finally:
            self._telling = None

    async def _tell(self, held: "dict[str, _Lease]") -> bool:
        """Renew leases and give back what is released; False where it has to be tried again."""
        now_s = asyncio.get_running_loop().time()
        self._released = {k: gone for k, gone in self._released.items() if gone.until_s > now_s}
        renewed, released = list(held.items()), list(self._released.items())
        told = True
        for start in range(0, max(len(renewed), len(released)), LEASES_MAX):
            part = slice(start, start + LEASES_MAX)
            told = await self._renew(renewed[part], released[part]) and told
        return told

    async def _renew(
        self, held: "Sequence[tuple[str, _Lease]]", released: "Sequence[tuple[str, _Lease]]"
    ) -> bool:
        request = pb.RenewLeasesRequest(leases=_to_pb(held), released=_to_pb(released))
        try:
            response = await (await self._checkpoint()).RenewLeases(
                request, timeout=RENEW_TIMEOUT_S
            )
        except (grpc.RpcError, TinsmithError) as error:
            _log.debug("leases are renewed later: %s", error)
            return False
        self._lease_s = max(response.lease.ToNanoseconds() / 1e9, 0.15)
        for lease_id, _ in held:
            self._new.pop(lease_id, None)
        for lease_id, _ in released:
            self._released.pop(lease_id, None)
        gone = set(response.not_found_checkpoint_paths)  # whoever samples from it hears why
        self._held = {k: lease for k, lease in self._held.items() if lease.path not in gone}
        return True


def _to_pb(leases: "Sequence[tuple[str, _Lease]]") -> list[pb.Lease]:
    return [pb.Lease(checkpoint_path=lease.path, lease_id=lease_id) for lease_id, lease in leases]
