"""Channels to one cluster, for the background loop."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from tinsmith._retry import retrying
from tinsmith.errors import FailedPreconditionError, InvalidArgumentError, unsupported
from tinsmith.v1 import training_service_pb2
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmith.v1.connection import CHANNEL_OPTIONS, service_address
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmith.v1.training_service_pb2_grpc import TrainingServiceStub

if TYPE_CHECKING:
    from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceAsyncStub
    from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceAsyncStub
    from tinsmith.v1.training_service_pb2_grpc import TrainingServiceAsyncStub

T = TypeVar("T")

GIVE_UP_AFTER_S = 600.0


DEFAULT_ADDRESS = "127.0.0.1:50051"


def address_of(given: str | None) -> str:
    """`host:port` from an argument, `TINSMITH_ADDRESS`, or the default.

    Raises:
        InvalidArgumentError: It is https, or has no port.
    """
    text = given or os.environ.get("TINSMITH_ADDRESS") or DEFAULT_ADDRESS
    if text.startswith("https://"):
        raise unsupported("base_url", "TLS is not supported yet")
    address = text.removeprefix("http://").rstrip("/")
    if not address.rpartition(":")[2].isdigit():
        raise InvalidArgumentError(f"base_url: {text!r} is not host:port", field="base_url")
    return address


class Connection:
    """The three services behind one address. Its coroutines run on the background loop only.

    Args:
        address: `host:port` of the Training server.
        give_up_after_s: How long a call is repeated while the service does not answer.
    """

    def __init__(self, address: str, give_up_after_s: float = GIVE_UP_AFTER_S) -> None:
        self.address = address
        self.give_up_after_s = give_up_after_s
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._capabilities: training_service_pb2.GetCapabilitiesResponse | None = None
        self._asking = asyncio.Lock()
        self._closed = False

    async def retrying(self, what: str, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call until it is answered; see `_retry.retrying`."""
        return await retrying(what, call, self.give_up_after_s)

    def training(self) -> "TrainingServiceAsyncStub":
        """Stub of the Training service."""
        return TrainingServiceStub(self._channel(self.address))

    async def sampler(self) -> "SamplerServiceAsyncStub":
        """Stub of the Sampler."""
        found = await self.capabilities()
        return SamplerServiceStub(
            self._channel(service_address(self.address, found.sampler_address))
        )

    async def checkpoint(self) -> "CheckpointServiceAsyncStub":
        """Stub of the Checkpoint service."""
        found = await self.capabilities()
        return CheckpointServiceStub(
            self._channel(service_address(self.address, found.checkpoint_address))
        )

    async def capabilities(
        self, *, fresh: bool = False
    ) -> training_service_pb2.GetCapabilitiesResponse:
        """What the cluster says of itself; kept after the first time, unless `fresh`."""
        async with self._asking:
            if self._capabilities is None or fresh:
                request = training_service_pb2.GetCapabilitiesRequest()

                async def ask() -> training_service_pb2.GetCapabilitiesResponse:
                    return await self.training().GetCapabilities(request)

                self._capabilities = await self.retrying("get_server_capabilities", ask)
            return self._capabilities

    def _channel(self, address: str) -> grpc.aio.Channel:
        if self._closed:
            message = "the ServiceClient is closed, and so are the clients made with it"
            raise FailedPreconditionError(message, reason="CLIENT_CLOSED")
        if address not in self._channels:
            options: Any = list(CHANNEL_OPTIONS)
            self._channels[address] = grpc.aio.insecure_channel(address, options=options)
        return self._channels[address]

    async def close(self) -> None:
        """Close all channels for good; calls under way are cancelled."""
        self._closed = True
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()
