"""What a call may hold of a server, from its first byte on: a place, bytes, and time to stall.

A call has a place among `concurrent_calls_max` before its first message is read, and what it
received counts against `received_bytes_max` before it is parsed, until the call ends or says that
somebody else accounts for it (`handed_over`). A request stream that sends nothing for
`stream_stall_s` before it is complete is ended, and so is a response stream whose reader takes
nothing for as long. Waiting for a turn, for ranks or for weights is no stall: nobody reads or
writes then. One peer may have `peer_share_max` of the places and the bytes. A peer is a host: all
that come through one proxy, or from one machine, are one.

Health's `Check` passes all of this: liveness must not depend on who else calls. Streams between
processes of one cluster (`tinsmith.internal`) have a listener and a lease of their own: they take a
place there, and may be silent and as large as they are.
"""

import asyncio
import contextlib
import contextvars
import functools
import inspect
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any
from urllib.parse import unquote

import grpc
from grpc_health.v1 import health

from tinsmithd.config import ServerConfig
from tinsmithd.errors import InvalidArgument, Reason, Unauthenticated, Unavailable
from tinsmithd.keys import Caller
from tinsmithd.keys import current as current_caller
from tinsmithd.owners import ANY_OWNER
from tinsmithd.rpc.budget import Budget, Lease, server_busy
from tinsmithd.rpc.reads import Reads
from tinsmithd.rpc.ring import Ring

INTERNAL_PREFIX = "/tinsmith.internal."
CHECK_METHOD = f"/{health.SERVICE_NAME}/Check"
WATCH_METHOD = f"/{health.SERVICE_NAME}/Watch"
RETRY_AFTER_S = 1.0
KEYS_INTERVAL_S = 0.25
"""Between two looks whether the keys of calls under way still are good."""
RECEIVE_SLACK = 2
"""A message that is up to this many times too large is still received, so that it is refused with a
reason; grpc itself refuses a larger one."""

Abort = Callable[[Exception], Awaitable[None]]

_current: contextvars.ContextVar["Flow"] = contextvars.ContextVar("flow")


def current() -> "Flow":
    """The flow of the call that is being served."""
    return _current.get()


def is_exempt(method: str, behavior: Any) -> bool:
    """Whether a method passes untouched: health's `Check`, and what grpc runs in threads, which
    are standard calls of one small message."""
    return method == CHECK_METHOD or not (
        inspect.iscoroutinefunction(behavior) or inspect.isasyncgenfunction(behavior)
    )


@functools.lru_cache(maxsize=4096)
def peer_host(peer: str) -> str:
    """The host of what grpc calls a peer, such as `ipv4:10.0.0.1:40000`."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind
    return host_of(unquote(address).rpartition(":")[0].strip("[]"))


@functools.lru_cache(maxsize=4096)
def host_of(address: str) -> str:
    """The host of an IP address. It may have a whole /64 of IPv6 addresses, so that counts as one.

    Args:
        address: Without port and brackets. What is none is a host by that name.
    """
    text = address.partition("%")[0]
    try:
        host = ipaddress.ip_address(text)
    except ValueError:
        return text
    if isinstance(host, ipaddress.IPv4Address):
        return str(host)
    if host.ipv4_mapped is not None:
        return str(host.ipv4_mapped)
    return str(ipaddress.ip_network((host, 64), strict=False))


class Gate:
    """What the calls of one server share.

    Args:
        config: Its limits.
        ring: The keys of its callers; None where they have none.

    Attributes:
        reads: To be run while the server serves.
    """

    def __init__(self, config: ServerConfig, ring: Ring | None = None) -> None:
        self._ring = ring
        self._by_key: dict[str, tuple[Caller, set[Flow]]] = {}
        share = config.peer_share_max
        calls = ("concurrent_calls_max", config.concurrent_calls_max, share)
        self._calls = Budget(*calls)
        self._watches = Budget(*calls)  # apart: a full server must still tell who watches health
        self._received = Budget("received_bytes_max", config.received_bytes_max, share)
        self._stall_s = config.stream_stall_s
        self.reads = Reads(
            config.stream_stall_s,
            config.received_bytes_max,
            RECEIVE_SLACK * config.message_bytes_max,
        )

    @property
    def is_idle(self) -> bool:
        """Whether no call is under way, but for those that watch health."""
        return not self._calls.taken

    def flow(self, context: grpc.aio.ServicerContext, method: str, abort: Abort) -> "Flow":
        """The flow of a call that has just begun; it has no place yet.

        Args:
            context: Of the call.
            method: `/package.Service/Method`.
            abort: Ends the call with an error while its servicer waits for a message.
        """
        peer, caller = self._peer(context)
        internal = method.startswith(INTERNAL_PREFIX)
        places = self._watches if method == WATCH_METHOD else self._calls
        return Flow(
            context,
            abort,
            peer,
            None if internal else self.reads,
            place=places.lease(peer),
            received=None if internal else self._received.lease(peer),
            stall_s=None if internal else self._stall_s,
            under=self._under(caller),
        )

    def _peer(self, context: grpc.aio.ServicerContext) -> tuple[str, Caller | None]:
        """Whose share a call is taken from, and who makes it, where that is known by a key."""
        if self._ring is None:
            return peer_host(context.peer()), None
        caller = current_caller()
        if not caller.key_id:  # as health, which needs none
            return peer_host(context.peer()), None
        if caller.owner == ANY_OWNER:
            return peer_host(context.peer()), caller
        return f"tenant {caller.owner}", caller

    def _under(self, caller: Caller | None) -> "set[Flow] | None":
        """The calls that end with the caller's key."""
        if caller is None:
            return None
        return self._by_key.setdefault(caller.key_id, (caller, set()))[1]

    async def watch_keys(self) -> None:
        """End the calls whose keys were taken away, until cancelled."""
        while self._ring is not None:
            await asyncio.sleep(KEYS_INTERVAL_S)
            for key_id, (caller, flows) in list(self._by_key.items()):
                if not flows:
                    del self._by_key[key_id]
                elif not self._ring.holds(caller):
                    for flow in flows:
                        flow.lost_its_key()


class Flow:
    """One call's messages, in and out; a context manager that gives back what it took.

    Attributes:
        peer: The host or the tenant that called.
        received_bytes, sent_bytes: Of its messages so far; the latter where somebody counts them.
    """

    def __init__(
        self,
        context: grpc.aio.ServicerContext,
        abort: Abort,
        peer: str,
        reads: Reads | None,
        *,
        place: Lease,
        received: Lease | None,
        stall_s: float | None,
        under: "set[Flow] | None" = None,
    ) -> None:
        self._under = under
        self._task = asyncio.current_task()
        self._context: Any = context
        self._abort = abort
        self.peer = peer
        self._reads = reads
        self._place = place
        self._received = received
        self._stall_s = stall_s
        self._begun = False
        self.received_bytes = self.sent_bytes = 0
        self._aborting: asyncio.Task[None] | None = None

    def __enter__(self) -> "Flow":
        _current.set(self)
        if self._under is not None:
            self._under.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._under is not None:
            self._under.discard(self)
        self.handed_over()
        self._place.give_back()
        # The task has a context, which has this flow: a cycle, and with it all that the call had.
        self._task = None

    def take_place(self) -> None:
        """Take the call's place.

        Raises:
            ResourceExhausted: There is none (SERVER_BUSY).
        """
        self._place.take(1)

    def handed_over(self, *, kept: bool = False) -> None:
        """Note that what was received is gone, or with `kept` is accounted for elsewhere."""
        if self._received is None:
            return
        if kept and self._reads is not None:
            self._reads.kept(self._received.amount)
        self._received.give_back()

    # --- requests -----------------------------------------------------------------------------

    async def messages(self) -> AsyncIterator[bytes]:
        """The messages of the call's stream, not parsed.

        Raises:
            ResourceExhausted: There is no room for one (SERVER_BUSY).
            grpc.aio.AbortError: Nothing came for too long; the caller has been told.
        """
        while (data := await self._read()) is not None:
            yield data
            del data  # not kept until the next one is there

    async def message(self) -> bytes:
        """The one message of a call that has one; raises as `messages`, and InvalidArgument where
        there is none (MALFORMED_STREAM)."""
        data = await self._read()
        if data is None:
            raise InvalidArgument("", "the call has no message", Reason.MALFORMED_STREAM)
        return data

    async def _read(self) -> bytes | None:
        # The read itself is never cancelled: grpc's core would write into what Python has freed.
        # Ending the call from outside ends it.
        if self._reads is None:
            data = await self._context.read()
        else:
            self._reads.began(self)
            try:
                data = await self._context.read()
            finally:
                self._reads.ended(self)
        if data is grpc.aio.EOF:
            return None
        self.received_bytes += len(data)
        if self._received is not None:
            self._received.take(len(data))
        return bytes(data)

    def stalled(self) -> None:
        """See `reads.Reader`."""
        message = f"nothing was sent for stream_stall_s = {self._stall_s:g} s; nothing was done"
        self._end_soon(_stalled(message))

    def squeezed(self) -> None:
        """See `reads.Reader`."""
        self._end_soon(server_busy("half messages hold received_bytes_max", "received_bytes_max"))

    def lost_its_key(self) -> None:
        """The call's key was revoked, or has expired: it ends, whatever it waits for."""
        message = "the key, or token, was revoked or has expired since the call began"
        self._end_soon(Unauthenticated(message, Reason.UNAUTHENTICATED), cancels=True)

    def _end_soon(self, error: Exception, *, cancels: bool = False) -> None:
        if self._aborting is None:
            self._aborting = asyncio.create_task(self._end(error, cancels))

    async def _end(self, error: Exception, cancels: bool) -> None:
        with contextlib.suppress(grpc.aio.AbortError, asyncio.CancelledError):
            await self._abort(error)
        if cancels and self._task is not None:
            self._task.cancel()

    # --- responses ----------------------------------------------------------------------------

    async def begin(self, metadata: Sequence[tuple[str, bytes]] = ()) -> None:
        """Send what comes before the first response.

        Args:
            metadata: Said with it.

        Raises:
            asyncio.CancelledError: The call is gone.
        """
        if not self._begun:
            self._begun = True
            with _gone_is_cancelled():
                await self._context.send_initial_metadata(tuple(metadata))

    async def write(self, response: Any) -> None:
        """Send a response once the reader has room for it.

        Raises:
            Unavailable: The reader had none for too long (STREAM_STALLED).
        """
        # A write that is given up must not be the one that begins the answer, which the status
        # that follows would else begin again.
        await self.begin()
        try:
            with _gone_is_cancelled():
                async with asyncio.timeout(self._stall_s):
                    await self._context.write(response)
        except TimeoutError:
            message = (
                f"nothing was read for stream_stall_s = {self._stall_s:g} s; "
                "the same call again is answered from its start"
            )
            raise _stalled(message) from None


@contextlib.contextmanager
def _gone_is_cancelled() -> Iterator[None]:
    """A caller that went away is no failure of the server, as which grpc raises it."""
    try:
        yield
    except grpc.aio.InternalError as gone:
        raise asyncio.CancelledError from gone


def _stalled(message: str) -> Unavailable:
    return Unavailable(message, Reason.STREAM_STALLED, retry_after_s=RETRY_AFTER_S)
