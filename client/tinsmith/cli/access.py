"""How a command reaches the three services: once, or not at all."""

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import grpc

from tinsmith import _loop
from tinsmith._connection import CHECKPOINT, SAMPLER, TRAINING, Connection
from tinsmith._replicas import Work
from tinsmith.addresses import address_of
from tinsmith.cli.failures import AWAY, Failed
from tinsmith.futures import APIFuture
from tinsmith.rest_client import RestClient

T = TypeVar("T")
PAGE_SIZE = 1000
GIVE_UP_AFTER_S = -1.0
"""Below 0: the first failure is the answer, with its reason."""


class Access:
    """A cluster, as commands ask it. A context manager that closes its connections.

    A script waits for a cluster that is away or busy; a person at a shell wants to know. So a call
    is made once.

    Args:
        address: As `ServiceClient` takes it; None is what the environment says.
        timeout_s: How long an answer may take, seconds.
    """

    def __init__(self, address: str | None, timeout_s: float) -> None:
        self.address = address_of(address)
        self.timeout_s = timeout_s
        self.connection = Connection(self.address, GIVE_UP_AFTER_S)
        self.rest = RestClient(self.connection)

    def ask(self, request: Any) -> Any:
        """Make a call of one answer; the request's type says which.

        Raises:
            TinsmithError: It failed.
            Failed: There was no answer in time.
        """
        return self.run(self.answer(request))

    async def answer(self, request: Any) -> Any:
        """`ask` for coroutines, without a limit in time."""
        kind = type(request).__name__.removesuffix("Request")
        service = request.DESCRIPTOR.file.name.rpartition("/")[2].partition("_")[0]
        method = kind.removeprefix(f"{service.capitalize()}Service")

        async def attempt() -> Any:
            if service == SAMPLER:
                return await self.connection.on_a_sampler(
                    Work(), lambda stub: getattr(stub, method)(request)
                )
            stub: Any = self.connection.training()
            if service == CHECKPOINT:
                stub = await self.connection.checkpoint()
            return await getattr(stub, method)(request)

        return await self.connection.retrying(method, attempt, service=service)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine of this cluster's; errors as `ask`."""
        return self.wait(APIFuture(_loop.run(coroutine)))

    def wait(self, future: APIFuture[T]) -> T:
        """Wait for a call of the client's; errors as `ask`."""
        try:
            return future.result(self.timeout_s)
        except TimeoutError as error:
            if future.future().done():
                raise  # the call's own
            future.future().cancel()
            message = f"{self.address} has not answered within {self.timeout_s:g} s"
            raise Failed(message, "--timeout waits for longer", AWAY) from error

    def follow(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine for as long as it takes; Ctrl-C ends it, too."""
        future = _loop.run(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def pages(self, request: Any, field: str, most: int) -> Iterator[Any]:
        """The entries of a list, page by page, until there are no more or `most` were given.

        Args:
            request: Of a method that lists; its page fields are set here.
            field: Where the answer has the entries.
            most: As many at most.
        """
        left = most
        while left > 0:
            request.page_size = min(left, PAGE_SIZE)
            response = self.ask(request)
            entries = list(getattr(response, field))[:left]
            yield from entries
            left -= len(entries)
            request.page_token = response.next_page_token
            if not request.page_token or not entries:
                return

    async def places(self) -> list[tuple[str, str]]:
        """Each server's service and `host:port`; of Samplers all that the cluster names."""
        found = [(TRAINING, self.address)]
        for service in (SAMPLER, CHECKPOINT):

            async def attempt(service: str = service) -> Sequence[str]:
                return await self.connection.addresses_of(service)

            addresses = await self.connection.retrying("GetCapabilities", attempt)
            found += [(service, address) for address in addresses]
        return found

    def channel(self, address: str) -> grpc.aio.Channel:
        """A channel to one server."""
        return self.connection.channel(address)

    def close(self) -> None:
        """Close the connections; harmless where nothing was opened."""
        try:
            _loop.run(self.connection.close()).result(5)
        except (TimeoutError, asyncio.CancelledError):
            return
