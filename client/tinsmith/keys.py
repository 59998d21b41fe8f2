"""The key, or token, that a caller shows, and channels that show it with each call.

A cluster with keys refuses whoever shows none. The key is metadata, `authorization: Bearer KEY`; it
is in no log, in no `repr` and in nothing that is pickled.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from tinsmith.errors import InvalidArgumentError
from tinsmith.replaced import state_of

AUTHORIZATION = "authorization"
SCHEME = "Bearer"
FILE_VARIABLE = "TINSMITH_API_KEY_FILE"
KEY_VARIABLES = ("TINSMITH_API_KEY", FILE_VARIABLE, "TINKER_API_KEY")
"""Where a key is looked for, in this order."""
CHARACTERS_MAX = 6144
"""Longest key or token: gRPC begins to refuse metadata of 8 KiB."""
LOOK_INTERVAL_S = 1.0
"""How old a look at a file may be when a call is made."""

Metadata = Sequence[tuple[str, str | bytes]]
C = TypeVar("C")


class Key:
    """A caller's key, or token.

    Args:
        text: The key; empty for none.
        where: Names the argument or variable in an error.

    Raises:
        InvalidArgumentError: No text that can be metadata is a key.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str = "", where: str = "api_key") -> None:
        visible = all("!" <= character <= "~" for character in text)
        if not visible or len(text) > CHARACTERS_MAX:
            message = f"{where}: a key is up to {CHARACTERS_MAX} visible ASCII characters"
            raise InvalidArgumentError(message, field=where)
        self._text = text

    def __repr__(self) -> str:
        return "Key(...)" if self else "Key()"

    def __bool__(self) -> bool:
        return bool(self._text)

    def __reduce__(self) -> Any:
        raise TypeError("a key is not pickled: set TINSMITH_API_KEY where it is needed")

    def metadata(self) -> Sequence[tuple[str, str]]:
        """What a call shows."""
        return ((AUTHORIZATION, f"{SCHEME} {self._text}"),) if self else ()


class KeyFile:
    """A key in a file that somebody replaces, such as a token that is good for an hour.

    Args:
        name: The file; spaces and ends of lines around the key do not count.

    Raises:
        InvalidArgumentError: It cannot be read, or holds no key.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._state = state_of((name,))
        self._key = self._read()
        self._looked_s = time.monotonic()

    def current(self) -> Key:
        """What the file holds, or last held that can be a key."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_INTERVAL_S:
            self._looked_s = now_s
            state = state_of((self._name,))
            if state != self._state:
                try:
                    self._key = self._read()
                except InvalidArgumentError:
                    pass  # half written, or away for a moment; looked at again
                else:
                    self._state = state
        return self._key

    def _read(self) -> Key:
        try:
            text = Path(self._name).read_text("ascii", errors="replace").strip()
        except OSError as error:
            message = f"{FILE_VARIABLE}: cannot read {self._name}: {error.strerror}"
            raise InvalidArgumentError(message, field=FILE_VARIABLE) from None
        key = Key(text, FILE_VARIABLE)
        if not key:
            message = f"{FILE_VARIABLE}: {self._name} is empty"
            raise InvalidArgumentError(message, field=FILE_VARIABLE)
        return key


def nothing(method: str) -> Metadata:
    """What calls show that show nothing."""
    return ()


def shown_of(given: str | None) -> Callable[[str], Metadata]:
    """What calls of a client show: a key, see `key_of`, or nothing."""
    if given is None and _variable() == FILE_VARIABLE:
        file = KeyFile(os.environ[FILE_VARIABLE])
        return lambda method: file.current().metadata()
    key = key_of(given)
    return (lambda method: key.metadata()) if key else nothing


def key_of(given: str | None) -> Key:
    """The key from an argument, or one of `KEY_VARIABLES`, or none.

    Raises:
        InvalidArgumentError: As `Key` and `KeyFile`; `field` says which of them.
    """
    if given is not None:
        if not isinstance(given, str):
            message = f"api_key: expected str, got {type(given).__name__}"
            raise InvalidArgumentError(message, field="api_key")
        return Key(given)
    variable = _variable()
    if variable == FILE_VARIABLE:
        return KeyFile(os.environ[variable]).current()
    return Key(os.environ[variable], variable) if variable else Key()


def _variable() -> str:
    return next((name for name in KEY_VARIABLES if os.environ.get(name)), "")


class _Showing:
    """A channel of grpc or grpc.aio whose calls show something; all else is the channel's own."""

    def __init__(self, channel: Any, shown: Callable[[str], Metadata]) -> None:
        self._channel = channel
        self._shown = shown

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def _callable(self, make: Any, method: str, args: Any, options: Any) -> Any:
        call, shown = make(method, *args, **options), self._shown

        def show(*messages: Any, metadata: Metadata | None = None, **how: Any) -> Any:
            return call(*messages, metadata=(*(metadata or ()), *shown(method)), **how)

        return show

    def unary_unary(self, method: str, *args: Any, **options: Any) -> Any:
        """As the channel's."""
        return self._callable(self._channel.unary_unary, method, args, options)

    def unary_stream(self, method: str, *args: Any, **options: Any) -> Any:
        """As the channel's."""
        return self._callable(self._channel.unary_stream, method, args, options)

    def stream_unary(self, method: str, *args: Any, **options: Any) -> Any:
        """As the channel's."""
        return self._callable(self._channel.stream_unary, method, args, options)

    def stream_stream(self, method: str, *args: Any, **options: Any) -> Any:
        """As the channel's."""
        return self._callable(self._channel.stream_stream, method, args, options)

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


def showing(channel: C, shown: Callable[[str], Metadata]) -> C:
    """A channel whose calls show metadata.

    gRPC's own way for this, call credentials, is for channels with TLS alone; its interceptors make
    another kind of call of each, and take longer.

    Args:
        channel: Of grpc or grpc.aio.
        shown: Gives the metadata of a call of a method, `/package.Service/Method`. With `nothing`
            the channel itself is returned.
    """
    return channel if shown is nothing else cast(C, _Showing(channel, shown))
