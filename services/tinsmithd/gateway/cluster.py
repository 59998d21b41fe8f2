"""Everything of the cluster that the gateway reaches, in one place.

The connection is the Python client's own: it finds the servers, spreads calls over Samplers, and
sends a call again where the contract says that the same call may be sent again.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tinsmith.addresses import SECURE
from tinsmith.channels import TlsFiles
from tinsmith.connection import CHECKPOINT, SAMPLER, TRAINING, Connection, Work
from tinsmith.errors import TinsmithError
from tinsmith.keys import nothing
from tinsmith.v1 import training_service_pb2 as pb
from tinsmithd import tracing
from tinsmithd.gateway.callers import calls_show
from tinsmithd.rpc.auth import NO_KEY, ClusterKey
from tinsmithd.tls import Certificates

if TYPE_CHECKING:
    from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceAsyncStub
    from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceAsyncStub
    from tinsmith.v1.training_service_pb2_grpc import TrainingServiceAsyncStub

T = TypeVar("T")

ComputeRequest = pb.ForwardRequest | pb.ForwardBackwardRequest
_COMPUTING: Mapping[str, tuple[Any, Any]] = {
    "Forward": (pb.ForwardRequest, pb.ForwardResponse),
    "ForwardBackward": (pb.ForwardBackwardRequest, pb.ForwardBackwardResponse),
}
CAPABILITIES_S = 10.0
"""How old what is known of the cluster may be."""

__all__ = ["CHECKPOINT", "SAMPLER", "TRAINING", "Cluster", "ComputeRequest", "Work"]


class Cluster:
    """The servers, through their stubs. Lives on one event loop.

    Args:
        address: `host:port` of the Training server.
        within_s: Longest time that a request waits for a call.
        certificates: By what it knows the servers, and they know it; None is plain text.
        key: What the gateway shows for itself; all else is shown as in `callers`.
    """

    def __init__(
        self,
        address: str,
        within_s: float,
        certificates: Certificates | None = None,
        key: ClusterKey = NO_KEY,
    ) -> None:
        files = TlsFiles()
        if certificates is not None:
            address, found = f"{SECURE}{address}", certificates.files
            files = TlsFiles(found.authorities, found.certificate, found.key)
        shown = tracing.carried(functools.partial(calls_show, key) if key.is_set else nothing)
        self._connection = Connection(address, tls=files, shown=shown, refuses=False)
        self._within_s = within_s
        self._whole: tuple[Any, Mapping[str, Callable[[ComputeRequest], Any]]] = (None, {})
        self._capabilities: pb.GetCapabilitiesResponse | None = None
        self._capabilities_s = float("-inf")

    @property
    def training(self) -> "TrainingServiceAsyncStub":
        """Stub of the Training service, for one attempt."""
        return self._connection.training()

    def compute(self, requests: Sequence[ComputeRequest]) -> Any:
        """Make one attempt of a call with data; its responses, as they come.

        One message is a complete call, and as such it is sent in one go; a stream of one takes a
        turn of the event loop for each of its beginning, its message and its end.

        Args:
            requests: Its messages, at least one.
        """
        name = "Forward" if isinstance(requests[0], pb.ForwardRequest) else "ForwardBackward"
        if len(requests) > 1:
            return getattr(self.training, name)(iter(requests))
        channel = self._connection.training_channel()
        made_on, calls = self._whole
        if made_on is not channel:
            calls = {method: _whole_call(channel, method) for method in _COMPUTING}
            self._whole = (channel, calls)
        return calls[name](requests[0])

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

    async def capabilities(self) -> pb.GetCapabilitiesResponse:
        """What the cluster says of itself, a few seconds old; without base models while it loads.

        Raises:
            TinsmithError: The Training server is away, and has never been there.
            TimeoutError: Likewise.
        """
        now_s = asyncio.get_running_loop().time()
        known = self._capabilities
        if known is None or not known.base_models or now_s - self._capabilities_s > CAPABILITIES_S:

            async def ask() -> pb.GetCapabilitiesResponse:
                request = pb.GetCapabilitiesRequest()
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


def _whole_call(channel: Any, method: str) -> Callable[[ComputeRequest], Any]:
    """A method with a stream of requests, called with the one that there is."""
    request, response = _COMPUTING[method]
    found: Callable[[ComputeRequest], Any] = channel.unary_stream(
        f"/{pb.DESCRIPTOR.services_by_name['TrainingService'].full_name}/{method}",
        request_serializer=request.SerializeToString,
        response_deserializer=response.FromString,
    )
    return found
