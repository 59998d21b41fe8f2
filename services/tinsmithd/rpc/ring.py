"""By what a process knows its callers: the keys of its file, and the tokens of an issuer."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tinsmithd.config import CalledConfig, ConfigError
from tinsmithd.errors import Reason, Unauthenticated
from tinsmithd.keys import Caller, KeyFileError, KeyRing

if TYPE_CHECKING:
    from tinsmithd.oidc import Tokens

_TOKEN_BEGINS = "eyJ"
"""What every token (JWT) begins with, and no key: `{"` in base64."""


class Ring:
    """Says who a key or a token stands for. Lives on one event loop.

    Args:
        keys: The keys.
        tokens: The tokens; None: there are none.
    """

    def __init__(self, keys: KeyRing, tokens: "Tokens | None" = None) -> None:
        self._keys, self._tokens = keys, tokens

    def begin(self) -> None:
        """Get ready before the first caller comes; nothing is waited for."""
        if self._tokens is not None:
            self._tokens.begin()

    async def caller(self, text: str) -> Caller:
        """Who shows a key or a token.

        Raises:
            Unauthenticated: Nobody that is known.
            PermissionDenied: Somebody who may do nothing here.
            Unavailable: Nobody can tell now whether a token is good.
        """
        if self._tokens is not None and text.startswith(_TOKEN_BEGINS):
            return await self._tokens.caller(text)
        caller = self._keys.caller(text)
        if caller is None:
            message = "the key is none of this cluster, was revoked, or has expired"
            raise Unauthenticated(message, Reason.UNAUTHENTICATED)
        return caller

    def holds(self, caller: Caller) -> bool:
        """Whether the key or token of a caller that was good still is."""
        if caller.signed_by:
            return self._tokens is not None and self._tokens.holds(caller)
        return self._keys.holds(caller.key_id)

    def limits_of(self, owner: str) -> Mapping[str, int]:
        """Limits of a tenant that are not the settings'."""
        return self._keys.limits_of(owner)


def open_ring(config: CalledConfig) -> Ring | None:
    """By what a process knows its callers; None where they need no keys.

    Raises:
        ConfigError: The file of keys cannot be used, or there is nothing to check tokens with.
    """
    if not config.keys_file:
        return None
    try:
        keys = KeyRing(Path(config.keys_file))
    except KeyFileError as error:
        raise ConfigError(f"{config.section}.keys_file: {error}") from None
    if not config.oidc_issuer:
        return Ring(keys)
    try:
        from tinsmithd.oidc import Tokens
    except ModuleNotFoundError as error:
        message = f"needs {error.name}: pip install 'tinsmith[oidc]'"
        raise ConfigError(f"{config.section}.oidc_issuer: {message}") from None
    return Ring(keys, Tokens(config, keys.limits_of))
