"""Everything of the cluster that the gateway reaches, in one place.

The connection is the Python client's own: it finds the servers, spreads calls over Samplers, and
sends a call again where the contract says that the same call may be sent again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from tinsmith.connection import CHECKPOINT, SAMPLER, TRAINING, Connection, Work
from tinsmith.errors import TinsmithError
from tinsmith.v1 import training_service_pb2

if TYPE_CHECKING:
    from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceAsyncStub
    from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceAsyncStub
    from tinsmith.v1.training_service_pb2_grpc import TrainingServiceAsyncStub

T = TypeVar("T")

CAPABILITIES_S = 10.0
"""How old what is known of the cluster may be."""

__all__ = ["CHECKPOINT", "SAMPLER", "TRAINING", "Cluster", "Work"]


class Cluster:
    """The servers, through their stubs. Lives on one event loop.

    Args:
        address: `host:port` of the Training server.
        within_s: Longest time that a request waits for a call.
    """

    def __init__(self, address: str, within_s: float) -> None:
        self._connection = Connection(address)
        self._within_s = within_s
        self._capabilities: training_service_pb2.GetCapabilitiesResponse | None = None
        self._capabilities_s = float("-inf")

    @property
    def training(self) -> "TrainingServiceAsyncStub":
        """Stub of the Training service, for one attempt."""
        return self._connection.training()

    async def checkpoint(self) -> "CheckpointServiceAsyncStub":
        """Stub of the Checkpoint service, for one attempt."""
        return await self._connection.checkpoint()

    async def on_a_sampler(
        self, work: Work, make: "Callable[[SamplerServiceAsyncStub], Awaitable[T]]"
    ) -> T:
        """Make one attempt of a call at one Sampler, and where that fails, at another one.

        Args:
            work: Says which suits it.
            make: Makes it with a Sampler's stub, from its beginning each time.
        """
        return await self._connection.on_a_sampler(work, make)

    async def retrying(
        self,
        what: str,
        attempt: Callable[[], Awaitable[T]],
        *,
        service: str = TRAINING,
        model_id: str = "",
    ) -> T:
        """Make a call until it is answered, for as long as that takes.

        Args:
            what: Names the call in the line that is logged while it waits.
            attempt: Makes one attempt; every attempt must be the same call.
            service: `TRAINING`, `SAMPLER` or `CHECKPOINT`.
            model_id: The model whose order the call is part of.

        Raises:
            TinsmithError: The answer, where it is a refusal.
        """
        return await self._connection.retrying(what, attempt, service=service, model_id=model_id)

    async def asking(
        self,
        what: str,
        attempt: Callable[[], Awaitable[T]],
        *,
        service: str = TRAINING,
        within_s: float | None = None,
    ) -> T:
        """Make a call until it is answered, or the caller of a request has waited long enough.

        Raises:
            TinsmithError: The answer, where it is a refusal.
            TimeoutError: There was none in time.
        """
        async with asyncio.timeout(within_s or self._within_s):
            return await self.retrying(what, attempt, service=service)

    async def capabilities(self) -> training_service_pb2.GetCapabilitiesResponse:
        """What the cluster says of itself, a few seconds old; without base models while it loads.

        Raises:
            TinsmithError: The Training server is away, and has never been there.
            TimeoutError: Likewise.
        """
        now_s = asyncio.get_running_loop().time()
        known = self._capabilities
        if known is None or not known.base_models or now_s - self._capabilities_s > CAPABILITIES_S:

            async def ask() -> training_service_pb2.GetCapabilitiesResponse:
                request = training_service_pb2.GetCapabilitiesRequest()
                return await self.training.GetCapabilities(request, timeout=5.0)

            try:
                self._capabilities = await self.asking("capabilities", ask)
            except (TinsmithError, TimeoutError):
                if known is None:
                    raise
            else:
                self._capabilities_s = now_s
        assert self._capabilities is not None
        return self._capabilities

    async def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        await self._connection.close()
