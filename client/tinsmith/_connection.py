"""Channels to one cluster, for the background loop."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from tinsmith import tracing
from tinsmith._leases import Leases
from tinsmith._replicas import Replicas, Work
from tinsmith._retry import is_lost, retrying
from tinsmith._tls_trouble import trouble
from tinsmith._waiting import Attempts, Waiting
from tinsmith.addresses import (
    SECURE,
    SPREAD,
    hosts_of,
    is_http1,
    proxy_note,
    service_address,
)
from tinsmith.channels import Credentials, TlsFiles, open_aio_channel, warn_of_plain_text
from tinsmith.errors import (
    AuthenticationError,
    FailedPreconditionError,
    InvalidArgumentError,
    TinsmithError,
    UnavailableError,
    from_rpc_error,
)
from tinsmith.keys import Metadata, showing, shown_of
from tinsmith.v1 import training_service_pb2
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmith.v1.training_service_pb2_grpc import TrainingServiceStub

if TYPE_CHECKING:
    from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceAsyncStub
    from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceAsyncStub
    from tinsmith.v1.training_service_pb2_grpc import TrainingServiceAsyncStub

T = TypeVar("T")

GIVE_UP_AFTER_S = 3600.0
"""Longer than a node of a cluster takes to be replaced and to load a large model; a person who does
not want to wait for it reads who is waited for, and stops the script."""

ASK_TIMEOUT_S = 5.0
RENEWED_DELAY_S = 0.1
"""After this a call is sent again whose key was replaced meanwhile."""
OTHER_SHARD = "OTHER_SHARD"
TRAINING, SAMPLER, CHECKPOINT = "training", "sampler", "checkpoint"


class Connection:
    """The three services behind one address. Its coroutines run on the background loop only.

    Args:
        address: Of the Training server, as `addresses.checked` gives it.
        give_up_after_s: How long a call is repeated while it meets nothing but failures.
        tls: What is trusted and shown where TLS is spoken; None is what the environment names.
        shown: Gives what each call shows, see `keys.showing`; None: the environment's key.
        refuses: Whether a mistake that no repeat mends, such as a certificate that is not trusted,
            ends a call. A server waits until somebody has mended it.

    Raises:
        InvalidArgumentError: A file of those cannot be read; `field` says which.
    """

    def __init__(
        self,
        address: str,
        give_up_after_s: float = GIVE_UP_AFTER_S,
        tls: TlsFiles | None = None,
        shown: Callable[[str], Metadata] | None = None,
        *,
        refuses: bool = True,
    ) -> None:
        self._shown = shown_of(None) if shown is None else shown
        self._refuses = refuses
        if refuses:  # a server has settings that say so
            warn_of_plain_text(address, self._shown)
        self._spans = tracing.of_program() if refuses else None  # a server has its own
        if self._spans is not None:
            self._shown = self._spans.shown(self._shown)
        self.address = address
        self.give_up_after_s = give_up_after_s
        self._tls = TlsFiles.of_environment() if tls is None else tls
        self._credentials: Credentials | None = None
        if address.startswith(SECURE):
            self._credentials = Credentials(self._tls)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._stubs: dict[tuple[Any, str], tuple[grpc.aio.Channel, Any]] = {}
        self._addresses = {TRAINING: address}
        self._capabilities: training_service_pb2.GetCapabilitiesResponse | None = None
        self._asking: asyncio.Task[training_service_pb2.GetCapabilitiesResponse] | None = None
        self._answered: set[str] = set()
        self._unreachable: set[str] = set()
        self._closing: set[asyncio.Future[None]] = set()
        self._waiting = Waiting(self._ask_model)
        self._closed = False
        self._samplers = Replicas(self._sampler_channel, self._close_channel)
        self.leases = Leases(self.checkpoint)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What makes another connection like this one, in another process too; the key is not in
        it."""
        return {
            "address": self.address,
            "give_up_after_s": self.give_up_after_s,
            "tls": self._tls,
        }

    async def retrying(
        self,
        what: str,
        attempt: Callable[[], Awaitable[T]],
        *,
        service: str = TRAINING,
        model_id: str = "",
    ) -> T:
        """Make a call until it is answered; see `_retry.retrying`.

        Args:
            what: Names the call in the line that is logged while it waits.
            attempt: Makes one attempt.
            service: `TRAINING`, `SAMPLER` or `CHECKPOINT`: where the call goes.
            model_id: The model whose order the call is part of.
        """

        async def watched() -> T:
            shown = self._shown(service)
            try:
                result = await attempt()
            except grpc.RpcError as failure:
                error = from_rpc_error(failure)
                if error.reason == OTHER_SHARD and self._refuses:
                    self._moved(error.metadata.get("training_address", ""))
                    error.retry_after_s = 0.0
                if isinstance(error, AuthenticationError) and self._shown(service) != shown:
                    # It ended while the call was under way, and there is another one by now.
                    error.retry_after_s = RENEWED_DELAY_S
                if service not in self._answered:
                    await self._explain(error, service)
                if is_lost(error):
                    if service != TRAINING:
                        self._unreachable.add(service)  # it may have come back somewhere else
                    raise self._with_proxy(error, service) from None
                self._answered.add(service)
                raise error from None
            self._answered.add(service)
            return result

        call = Attempts(what, service, model_id)
        with contextlib.nullcontext() if self._spans is None else self._spans.call(what):
            return await retrying(call, watched, self._waiting, self.give_up_after_s)

    async def _explain(self, error: TinsmithError, service: str) -> None:
        """Say of a service that never answered where that is for a reason no repeat mends."""
        address = hosts_of(self._addresses.get(service, self.address))[0]
        message = await asyncio.to_thread(trouble, error.message, address, self._tls)
        if is_http1(error.message):
            message = (
                f"{address} speaks HTTP/1.1, such as a gateway for stock Tinker SDKs does; "
                "this client needs the address of the Training server, which speaks gRPC"
            )
        if message and self._refuses:
            raise InvalidArgumentError(message, field="base_url") from None
        if message:
            error.message = f"{message} ({error.message})"

    def _with_proxy(self, error: TinsmithError, service: str) -> TinsmithError:
        # gRPC's own text has the proxy's address where a reader takes it for the server's.
        if note := proxy_note(hosts_of(self._addresses.get(service, self.address))[0]):
            error.message = f"{error.message} ({note})"
        return error

    def training(self) -> "TrainingServiceAsyncStub":
        """Stub of the Training service."""
        return self._stub(TrainingServiceStub, self._addresses[TRAINING])  # type: ignore[no-any-return]

    def _moved(self, given: str) -> None:
        """The Training server that was asked says which one has this caller's models."""
        self._addresses[TRAINING] = service_address(TRAINING, self.address, given)

    async def on_a_sampler(
        self, work: Work, make: "Callable[[SamplerServiceAsyncStub], Awaitable[T]]"
    ) -> T:
        """Make one attempt of a call: at one Sampler, and where that fails, at another one.

        Args:
            work: Says which suits it.
            make: Makes it with a Sampler's stub, from its beginning each time.
        """
        self._check_open()
        await self._samplers.find(await self._address_of(SAMPLER))
        failed: set[str] = set()
        while True:
            with self._samplers.chosen(work, failed) as replica:
                try:
                    return await make(SamplerServiceStub(replica.channel))
                except grpc.RpcError as failure:
                    failed.add(replica.target)
                    if not self._samplers.moves(replica, from_rpc_error(failure), failed):
                        raise

    async def checkpoint(self) -> "CheckpointServiceAsyncStub":
        """Stub of the Checkpoint service, after one attempt to find it; for one attempt."""
        found = self._stub(CheckpointServiceStub, await self._address_of(CHECKPOINT), SPREAD)
        return found  # type: ignore[no-any-return]

    async def addresses_of(self, service: str) -> Sequence[str]:
        """Each `host:port` of a service, after one attempt to find it; only Samplers have many."""
        return hosts_of(await self._address_of(service))

    async def _address_of(self, service: str) -> str:
        found = self._capabilities
        if found is None or service in self._unreachable:
            try:
                found = await self._ask_capabilities()
            except grpc.RpcError:
                if found is None:
                    raise
                # The Training server is away, which says nothing of where this one was.
            else:
                self._unreachable.discard(service)
        given = found.sampler_address if service == SAMPLER else found.checkpoint_address
        self._addresses[service] = service_address(service, self.address, given)
        return self._addresses[service]

    async def capabilities(self) -> training_service_pb2.GetCapabilitiesResponse:
        """What the cluster says of itself, once it has a base model.

        It has none while its ranks load or come back, and a script that is started just then wants
        to know what it can train, not that it can train nothing.
        """

        async def ask() -> training_service_pb2.GetCapabilitiesResponse:
            found = await self._ask_capabilities()
            if not found.base_models:
                message = "the trainer is loading"
                raise UnavailableError(message, reason="RANK_GROUP_UNAVAILABLE", retry_after_s=0.5)
            return found

        return await self.retrying("get_server_capabilities", ask)

    async def told(self) -> training_service_pb2.GetCapabilitiesResponse:
        """What the cluster says of itself, with a base model or without."""
        return await self.retrying("get_server_capabilities", self._ask_capabilities)

    @property
    def shown(self) -> Metadata:
        """What calls show: the key, as metadata and as a header of HTTP."""
        return self._shown("")

    @property
    def files(self) -> TlsFiles:
        """What is trusted and shown where TLS is spoken."""
        return self._tls

    async def base_model_name(self, name: str) -> str:
        """What the cluster calls the base model that Tinker calls `org/model` or `...:variant`.

        A folder on a server has no organisation. What is not held stays as it is: the service says
        so.
        """
        if "/" not in name:
            return name
        held = {model.name for model in (await self.capabilities()).base_models}
        plain = name.partition(":")[0]
        names = (name, plain, plain.rpartition("/")[2])
        return next((each for each in names if each in held), name)

    async def _ask_capabilities(self) -> training_service_pb2.GetCapabilitiesResponse:
        # Many calls may want to know at once; one of them asks.
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> training_service_pb2.GetCapabilitiesResponse:
        request = training_service_pb2.GetCapabilitiesRequest()
        stub = self.training()
        self._capabilities = await stub.GetCapabilities(request, timeout=ASK_TIMEOUT_S)
        if self._capabilities.training_address and self._refuses:
            self._moved(self._capabilities.training_address)
        return self._capabilities

    async def _ask_model(self, model_id: str) -> training_service_pb2.Model:
        request = training_service_pb2.GetModelRequest(model_id=model_id)
        response = await self.training().GetModel(request, timeout=ASK_TIMEOUT_S)
        return response.model

    def _check_open(self) -> None:
        if self._closed:
            message = "the ServiceClient is closed, and so are the clients made with it"
            raise FailedPreconditionError(message, reason="CLIENT_CLOSED")

    def _stub(self, kind: Any, address: str, *more: tuple[str, str]) -> Any:
        # A stub makes something of each method of its service: too much for each call.
        channel = self._channel(address, *more)
        made_on, stub = self._stubs.get((kind, address), (None, None))
        if made_on is not channel:
            stub = kind(channel)
            self._stubs[kind, address] = (channel, stub)
        return stub

    def training_channel(self) -> grpc.aio.Channel:
        """The channel that `training` calls on, for one attempt."""
        return self._channel(self._addresses[TRAINING])

    def channel(self, address: str) -> grpc.aio.Channel:
        """A channel to one server by its `host:port`, kept until this is closed."""
        return self._channel(address)

    def _channel(self, address: str, *more: tuple[str, str]) -> grpc.aio.Channel:
        self._check_open()
        if address not in self._channels:
            channel = open_aio_channel(address, self._current, more)
            self._channels[address] = showing(channel, self._shown)
        return self._channels[address]

    def _current(self) -> grpc.ChannelCredentials:
        if self._credentials is None:  # only the environment leads from plain text to TLS
            self._credentials = Credentials(self._tls)
        return self._credentials.current()

    def _sampler_channel(self, target: str, name: str) -> grpc.aio.Channel:
        if target == name:
            return self._channel(target)
        # What stands in between is asked for the name, as it would be without our look at it, and a
        # certificate has to be for it.
        return self._channel(target, ("grpc.default_authority", name.removeprefix(SECURE)))

    def _close_channel(self, target: str) -> None:
        if target in self._addresses.values():
            return  # another service has this address
        channel = self._channels.pop(target, None)
        if channel is not None:
            closing = asyncio.ensure_future(channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all channels for good; calls under way are cancelled."""
        await self.leases.close()
        self._closed = True
        self._samplers.close()
        self._stubs.clear()
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()
