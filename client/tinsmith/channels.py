"""Every channel of this client is opened here: plain text, or TLS after `https://`.

`TINSMITH_CA_FILE` names the authorities (PEM) that vouch for the servers, where they are not the
usual ones; `TINSMITH_CERTIFICATE_FILE` and `TINSMITH_KEY_FILE` what is shown to servers that ask
who connects. Files that are replaced are read again: calls that begin then are made with what they
hold.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from tinsmith.addresses import SECURE, channel_options, is_local
from tinsmith.errors import InvalidArgumentError
from tinsmith.replaced import state_of

CA_VARIABLE = "TINSMITH_CA_FILE"
CERTIFICATE_VARIABLE = "TINSMITH_CERTIFICATE_FILE"
KEY_VARIABLE = "TINSMITH_KEY_FILE"
LOOK_INTERVAL_S = 1.0
"""How old a look at the files may be when a call is made."""
NEVER_S = 10 * 365 * 86_400.0
"""What a channel that is replaced waits for the calls under way on it."""

_log = logging.getLogger("tinsmith")

Options = Sequence[tuple[str, int | str]]


@dataclass(frozen=True)
class TlsFiles:
    """What a client trusts, and what it shows, as names of PEM files; empty where there is none.

    Attributes:
        ca: Authorities that vouch for servers; empty: those that gRPC brings, or those that
            `GRPC_DEFAULT_SSL_ROOTS_FILE_PATH` names.
        certificate, key: What is shown to a server that asks.
    """

    ca: str = ""
    certificate: str = ""
    key: str = ""

    @classmethod
    def of_environment(cls) -> "TlsFiles":
        """Those that the environment names."""
        names = (CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE)
        return cls(*(os.environ.get(name, "") for name in names))

    def state(self) -> tuple[object, ...]:
        """Changes when a file does."""
        return state_of((self.ca, self.certificate, self.key))

    def read(self) -> grpc.ChannelCredentials:
        """What the files hold, for a channel.

        Raises:
            InvalidArgumentError: One cannot be read or holds something else; `field` says which.
        """
        if bool(self.certificate) != bool(self.key):
            lacks = KEY_VARIABLE if self.certificate else CERTIFICATE_VARIABLE
            message = (
                f"{lacks}: must be set, as {CERTIFICATE_VARIABLE} and {KEY_VARIABLE} go together"
            )
            raise InvalidArgumentError(message, field=lacks)
        return grpc.ssl_channel_credentials(
            _pem(self.ca, CA_VARIABLE, b"CERTIFICATE"),
            _pem(self.key, KEY_VARIABLE, b"PRIVATE KEY"),
            _pem(self.certificate, CERTIFICATE_VARIABLE, b"CERTIFICATE"),
        )


def _pem(name: str, variable: str, kind: bytes) -> bytes | None:
    if not name:
        return None
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        message = f"{variable}: cannot read {name}: {error.strerror}"
        raise InvalidArgumentError(message, field=variable) from None
    if b"-----BEGIN " not in data or kind not in data:
        message = f"{variable}: {name}: there is no {kind.decode().lower()} in it (PEM)"
        raise InvalidArgumentError(message, field=variable)
    return data


class Credentials:
    """The credentials of some files; the same object until the files change.

    Args:
        files: Which.

    Raises:
        InvalidArgumentError: As `TlsFiles.read`.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._looked_s = time.monotonic()
        self._state = files.state()
        self._made = files.read()

    def current(self) -> grpc.ChannelCredentials:
        """What the files hold, or last held that can be read."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_INTERVAL_S:
            self._looked_s = now_s
            state = self._files.state()
            if state != self._state:
                self._state = state
                try:
                    self._made = self._files.read()
                except InvalidArgumentError as error:  # half-written: what comes next is seen, too
                    _log.warning("tinsmith: %s; what was there before stays in use", error)
        return self._made


class ReopenedChannel(grpc.aio.Channel):  # type: ignore[misc]  # untyped base
    """A channel of `grpc.aio` that is opened anew when its credentials change.

    Calls that begin then go over the new one; those under way stay on the old one until they end.

    Args:
        credentials: Gives the credentials as they are now; the same object until they change.
        open_with: Opens a channel.
    """

    def __init__(
        self,
        credentials: Callable[[], grpc.ChannelCredentials],
        open_with: Callable[[grpc.ChannelCredentials], grpc.aio.Channel],
    ) -> None:
        self._credentials = credentials
        self._open_with = open_with
        self._used = credentials()
        self._channel = open_with(self._used)
        self._replaced: dict[asyncio.Task[None], grpc.aio.Channel] = {}

    def _now(self) -> grpc.aio.Channel:
        credentials = self._credentials()
        if credentials is not self._used:
            old, self._used = self._channel, credentials
            self._channel = self._open_with(credentials)
            ending = asyncio.ensure_future(old.close(NEVER_S))
            self._replaced[ending] = old
            ending.add_done_callback(lambda task: self._replaced.pop(task, None))
        return self._channel

    def _method(self, kind: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        made_on: grpc.aio.Channel | None = None
        made: Any = None

        def call(*call_args: Any, **call_kwargs: Any) -> Any:
            nonlocal made_on, made
            channel = self._now()
            if channel is not made_on:
                made_on, made = channel, getattr(channel, kind)(*args, **kwargs)
            return made(*call_args, **call_kwargs)

        return call

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return self._method("unary_unary", *args, **kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return self._method("unary_stream", *args, **kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return self._method("stream_unary", *args, **kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return self._method("stream_stream", *args, **kwargs)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """That of the channel that new calls go over."""
        return self._now().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Likewise."""
        await self._now().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Likewise."""
        await self._now().channel_ready()

    async def close(self, grace: float | None = None) -> None:
        """Close it; calls under way are cancelled after the grace, seconds."""
        replaced, self._replaced = self._replaced, {}
        for ending, channel in replaced.items():
            ending.cancel()
            await channel.close(grace)
        await self._channel.close(grace)

    async def __aenter__(self) -> "ReopenedChannel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def warn_of_plain_text(address: str, shown: Callable[[str], object]) -> None:
    """Say where a key goes over a network that others may read.

    Args:
        address: `host:port`, with `https://` before it where it is spoken to with TLS.
        shown: Gives what calls of a method show; nothing is no key.
    """
    if not address.startswith(SECURE) and not is_local(address) and shown(""):
        _log.warning("tinsmith: a key goes to %s in plain text, where others may read it", address)


def open_channel(address: str, files: TlsFiles, more: Options = ()) -> grpc.Channel:
    """A channel for threads that may block.

    Args:
        address: `host:port`, with `https://` before it where it is spoken to with TLS.
        files: What is trusted and shown then.
        more: Channel arguments beside the usual ones.

    Raises:
        InvalidArgumentError: As `TlsFiles.read`.
    """
    options: Any = [*channel_options(address), *more]
    if not address.startswith(SECURE):
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address.removeprefix(SECURE), files.read(), options=options)


def open_aio_channel(
    address: str, credentials: Callable[[], grpc.ChannelCredentials], more: Options = ()
) -> grpc.aio.Channel:
    """A channel for coroutines of the loop that runs now.

    Args:
        address: `host:port`, with `https://` before it where it is spoken to with TLS.
        credentials: Gives the credentials for that, as they are now.
        more: Channel arguments beside the usual ones.
    """
    options: Any = [*channel_options(address), *more]
    if not address.startswith(SECURE):
        return grpc.aio.insecure_channel(address, options=options)
    target = address.removeprefix(SECURE)
    return ReopenedChannel(
        credentials, lambda made: grpc.aio.secure_channel(target, made, options=options)
    )
