"""Holds the sampler weights that this process's clients use, for as long as they use them.

Weights without a name live while somebody holds them. A client that is closed or collected as
garbage holds nothing; nobody has to say so, since what is not renewed ends by itself.
"""

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from tinsmith import _fork, _loop
from tinsmith.errors import TinsmithError
from tinsmith.v1 import checkpoint_service_pb2 as pb

if TYPE_CHECKING:
    from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceAsyncStub

EPHEMERAL_PREFIX = "ephemeral-"
RENEWALS_PER_LEASE = 3
FIRST_INTERVAL_S = 10.0
"""Until the service has said how long a lease lasts."""
RETRY_S = 1.0
RENEW_TIMEOUT_S = 10.0
PATHS_MAX = 1000

_log = logging.getLogger("tinsmith")


def is_ephemeral(path: str | None) -> bool:
    """Whether a checkpoint has a name that the service gave it."""
    return path is not None and path.rpartition("/")[2].startswith(EPHEMERAL_PREFIX)


class Leases:
    """The leases of one connection.

    Args:
        checkpoint: Finds the Checkpoint service.
    """

    def __init__(self, checkpoint: "Callable[[], Awaitable[CheckpointServiceAsyncStub]]") -> None:
        self._checkpoint = checkpoint
        # By the holder's id; only used on the loop.
        self._paths: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._interval_s = FIRST_INTERVAL_S
        self._closed = False

    def hold(self, holder: object, path: str) -> None:
        """Hold a path from now on until `holder` is collected or lets go; from any thread."""
        if not _fork.is_broken():  # a holder there cannot sample, and must be told when it tries to
            _loop.loop().call_soon_threadsafe(self._add, weakref.ref(holder), path)

    def let_go(self, holder: object) -> None:
        """Hold nothing for this holder any more; from any thread."""
        if not _fork.is_broken():
            _loop.loop().call_soon_threadsafe(self._paths.pop, id(holder), None)

    def close(self) -> None:
        """Hold nothing any more; on the loop."""
        self._closed = True
        self._paths.clear()
        if self._renewing is not None:
            self._renewing.cancel()

    def _add(self, reference: "weakref.ref[Any]", path: str) -> None:
        holder = reference()
        if holder is None or self._closed:
            return
        self._paths[id(holder)] = reference, path
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._run(), name="leases")

    def _held(self) -> list[str]:
        self._paths = {k: held for k, held in self._paths.items() if held[0]() is not None}
        return sorted({path for _, path in self._paths.values()})

    async def _run(self) -> None:
        try:
            while paths := self._held():
                renewed = True
                for start in range(0, len(paths), PATHS_MAX):
                    renewed = await self._renew(paths[start : start + PATHS_MAX]) and renewed
                await asyncio.sleep(self._interval_s if renewed else RETRY_S)
        finally:
            self._renewing = None

    async def _renew(self, paths: Sequence[str]) -> bool:
        request = pb.RenewLeasesRequest(paths=paths)
        try:
            response = await (await self._checkpoint()).RenewLeases(
                request, timeout=RENEW_TIMEOUT_S
            )
        except (grpc.RpcError, TinsmithError) as error:
            _log.debug("leases are renewed later: %s", error)
            return False
        self._interval_s = max(response.lease_seconds / RENEWALS_PER_LEASE, 0.05)
        gone = set(response.not_found_paths)  # whoever samples from it hears why
        self._paths = {k: held for k, held in self._paths.items() if held[1] not in gone}
        return True
