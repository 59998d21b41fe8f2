"""Holds the ephemeral checkpoints that requests are at work with, or wait to be."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

from tinsmithd import tracing
from tinsmithd.domain import CheckpointPath, is_ephemeral_name
from tinsmithd.errors import TinsmithError

RENEWALS_PER_LEASE = 3
RETRY_S = 1.0
RELEASED_MAX = 1000
"""Maximum number of releases that wait; one more lease runs out by itself."""

_log = logging.getLogger(__name__)


@dataclass
class Lease:
    """What one Sampler holds of one checkpoint, from the first of its requests to the last.

    Attributes:
        lease_id: Empty for a checkpoint that needs no holding.
        users: Number of requests.
        told: The Checkpoint server may know of it, and hears when it ends.
    """

    lease_id: str
    users: int = 0
    told: bool = False

    def take(self) -> str:
        """The id, for a request to the Checkpoint server."""
        self.told = True
        return self.lease_id


class Leases:
    """What one Sampler holds. Lives on one event loop.

    Args:
        renew: Renews the leases of its first argument, gives those of its second back, paths by
            lease id; returns how long a lease lasts, seconds.
    """

    def __init__(
        self,
        renew: Callable[
            [Mapping[str, CheckpointPath], Mapping[str, CheckpointPath]], Awaitable[float]
        ],
    ) -> None:
        self._renew = renew
        self._leases: dict[CheckpointPath, Lease] = {}
        self._released: dict[str, CheckpointPath] = {}
        self._ended = asyncio.Event()
        self._renewing: asyncio.Task[None] | None = None
        self._interval_s = 0.0  # the first renewal says how long a lease lasts

    @contextlib.asynccontextmanager
    async def held(self, path: CheckpointPath) -> AsyncIterator[Lease]:
        """Hold a checkpoint for the body of the `async with`; a named one needs no holding.

        The body takes the lease with its first look at the checkpoint, if it needs one.
        """
        if not is_ephemeral_name(path.name):
            yield Lease("")
            return
        # A new id for each time that it is held: a release that arrives late ends no later lease.
        lease = self._leases.setdefault(path, Lease(secrets.token_hex(16)))
        lease.users += 1
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._run(), name="leases")
        try:
            yield lease
        finally:
            lease.users -= 1
            if not lease.users:
                del self._leases[path]
                if lease.told and len(self._released) < RELEASED_MAX:
                    self._released[lease.lease_id] = path
                self._ended.set()

    async def close(self) -> None:
        """Stop to renew: what is held runs out."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)

    async def _run(self) -> None:
        tracing.forget()
        loop = asyncio.get_running_loop()
        due_s, wait_s = loop.time() + self._interval_s, self._interval_s
        try:
            while self._leases or self._released:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._ended.wait()
                self._ended.clear()
                due = loop.time() >= due_s
                wait_s = RETRY_S
                if await self._tell(all_held=due):
                    due_s = loop.time() + self._interval_s if due else due_s
                    wait_s = max(due_s - loop.time(), 0.0)
        finally:
            self._renewing = None

    async def _tell(self, *, all_held: bool) -> bool:
        held = {lease.take(): path for path, lease in self._leases.items()} if all_held else {}
        released = dict(self._released)
        # One try is enough: what the server does not hear of runs out by itself.
        self._released.clear()
        if not held and not released:
            return True
        try:
            self._interval_s = await self._renew(held, released) / RENEWALS_PER_LEASE
        except TinsmithError as error:
            _log.warning("leases are renewed later: %s", error)
            return False
        return True
