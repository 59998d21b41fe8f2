"""Holds the ephemeral checkpoints that requests are at work with, or wait to be."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection

from tinsmithd.domain import CheckpointPath, is_ephemeral_name
from tinsmithd.errors import TinsmithError

RENEWALS_PER_LEASE = 3
RETRY_S = 1.0

_log = logging.getLogger(__name__)


class Leases:
    """What one Sampler holds. Lives on one event loop.

    Args:
        renew: Renews the leases on some paths; returns for how long, seconds.
    """

    def __init__(self, renew: Callable[[Collection[CheckpointPath]], Awaitable[float]]) -> None:
        self._renew = renew
        self._users: Counter[CheckpointPath] = Counter()
        self._renewing: asyncio.Task[None] | None = None
        self._interval_s = 0.0  # the first renewal says how long a lease lasts

    @contextlib.asynccontextmanager
    async def held(self, path: CheckpointPath) -> AsyncIterator[None]:
        """Hold a checkpoint for the body of the `async with`; a named one needs no holding.

        Whoever looked it up just now holds it for one lease already.
        """
        if not is_ephemeral_name(path.name):
            yield
            return
        self._users[path] += 1
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._users[path] -= 1
            if not self._users[path]:
                del self._users[path]
            if not self._users and self._renewing is not None:
                self._renewing.cancel()
                self._renewing = None

    async def _run(self) -> None:
        wait_s = self._interval_s
        while True:
            await asyncio.sleep(wait_s)
            try:
                self._interval_s = await self._renew(list(self._users)) / RENEWALS_PER_LEASE
            except TinsmithError as error:
                _log.warning("leases are renewed later: %s", error.message)
                wait_s = RETRY_S
            else:
                wait_s = self._interval_s
