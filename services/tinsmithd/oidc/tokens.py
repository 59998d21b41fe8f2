"""Who a token stands for, and why it does not."""

import base64
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jwt

from tinsmithd.config import CalledConfig
from tinsmithd.errors import PermissionDenied, Reason, Unauthenticated
from tinsmithd.keys import Caller, Scope
from tinsmithd.oidc.issuer import Issuer
from tinsmithd.oidc.published import PublishedKey
from tinsmithd.owners import OWNER_PATTERN

CHARACTERS_MAX = 6144
"""Longest token, as the client has it: gRPC begins to refuse metadata of 8 KiB."""
KNOWN_MAX = 4096
"""Tokens that were found good and are not checked again for each call."""
_KEPT = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-")
"""Characters of a claim that stand in a tenant's name as they are."""
_SCOPES = (Scope.ADMIN, Scope.TENANT, Scope.READ_ONLY)
"""What a token can be for, the most first."""


class Tokens:
    """Looks tokens up. Lives on one event loop.

    Args:
        settings: Whose tokens are taken, and what is made of them.
        limits_of: Gives the limits of a tenant that are not the settings'.
        clock: The time of day, seconds since 1970.
    """

    def __init__(
        self,
        settings: CalledConfig,
        limits_of: Callable[[str], Mapping[str, int]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._limits_of = limits_of
        self._clock = clock
        self._issuer = Issuer(settings)
        self._known: dict[bytes, Caller] = {}

    def begin(self) -> None:
        """Have the keys fetched before anybody needs them."""
        self._issuer.look()

    def holds(self, caller: Caller) -> bool:
        """Whether a token that was good still is: it has not ended, nor the key that signed it."""
        return caller.expires_s > self._clock() and self._issuer.publishes(caller.signed_by)

    async def caller(self, text: str) -> Caller:
        """Who shows a token.

        Raises:
            Unauthenticated: It is none, or is not good; the message says what is wrong with it.
            PermissionDenied: It is good for nothing here.
            Unavailable: The issuer's keys are not known, and it does not answer.
        """
        if len(text) > CHARACTERS_MAX:
            raise _refused(f"is longer than {CHARACTERS_MAX} characters")
        digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=32).digest()
        known = self._known.get(digest)
        if known is None or not self.holds(known):
            self._known.pop(digest, None)
            known = await self._checked(text, digest)
            while len(self._known) >= KNOWN_MAX:
                self._known.pop(next(iter(self._known)), None)
            self._known[digest] = known
        limits = self._limits_of(known.owner)
        return dataclasses.replace(known, limits=limits) if limits else known

    async def _checked(self, text: str, digest: bytes) -> Caller:
        header, said = _unchecked(text)
        # Who has the wrong token, or an old one, hears it at once, and costs no fetch.
        if said.get("iss") != self._settings.oidc_issuer:
            raise _refused("is of another issuer than the one of this cluster")
        key = await self._key_of(header, said)
        claims = self._verified(text, key)
        expires_s = int(claims["exp"])
        lifetime_s = self._settings.oidc_lifetime_s_max
        if expires_s > self._clock() + lifetime_s:
            raise _refused(f"is good for longer than oidc_lifetime_s_max = {lifetime_s:g} s")
        return Caller(
            self._tenant_of(claims),
            self._scope_of(claims),
            f"token-{digest[:6].hex()}",
            expires_s=expires_s + self._settings.oidc_leeway_s,
            signed_by=key.fingerprint,
        )

    async def _key_of(self, header: Mapping[str, Any], said: Mapping[str, Any]) -> PublishedKey:
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in self._settings.algorithms:
            names = ", ".join(self._settings.algorithms)
            raise _refused(f"is signed with another algorithm than {names}")
        if not isinstance(key_id, str | None) or "crit" in header:
            raise _refused("has a header that is not understood")
        found = self._issuer.find(key_id, algorithm)
        if found is not None:
            return found
        if _number(said.get("exp")) + self._settings.oidc_leeway_s <= self._clock():
            raise _refused("has expired")
        found = await self._issuer.find_newer(key_id, algorithm)
        if found is None and self._issuer.failure:
            raise self._issuer.away("the issuer of tokens does not tell its keys")
        if found is None:
            raise _refused("is signed with a key that its issuer does not publish")
        return found

    def _verified(self, text: str, key: PublishedKey) -> Mapping[str, Any]:
        settings = self._settings
        try:
            return jwt.decode(
                text,
                key.key,
                algorithms=[key.algorithm],
                audience=settings.oidc_audience,
                issuer=settings.oidc_issuer,
                leeway=settings.oidc_leeway_s,
                options={"require": ["exp", "iss", "aud"], "enforce_minimum_key_length": True},
            )
        except jwt.ExpiredSignatureError:
            raise _refused("has expired") from None
        except jwt.ImmatureSignatureError:
            raise _refused("is not good yet; are both clocks right?") from None
        except jwt.InvalidAudienceError:
            raise _refused(f"is not for the audience {settings.oidc_audience}") from None
        except jwt.MissingRequiredClaimError as error:
            raise _refused(f"has no claim {error.claim}") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError):
            raise _refused("is not signed by the key that it names, or is damaged") from None

    def _tenant_of(self, claims: Mapping[str, Any]) -> str:
        claim = self._settings.oidc_tenant_claim
        value = claims.get(claim)
        if not isinstance(value, str) or not value:
            raise _refused(f"has no text as its claim {claim}")
        tenant = tenant_of(self._settings.oidc_tenant_prefix, value)
        if not OWNER_PATTERN.fullmatch(tenant):
            raise _refused(f"has a claim {claim} that can be no tenant's name")
        return tenant

    def _scope_of(self, claims: Mapping[str, Any]) -> Scope:
        settings = self._settings
        if not settings.oidc_scope_claim:
            return Scope.TENANT
        said = claims.get(settings.oidc_scope_claim)
        values = said.split() if isinstance(said, str) else said
        values = values if isinstance(values, list) else []
        given = {settings.oidc_scopes.get(value) for value in values if isinstance(value, str)}
        for scope in _SCOPES:
            if scope.value in given:
                return scope
        message = f"the token's claim {settings.oidc_scope_claim} gives it nothing here"
        raise PermissionDenied(message, Reason.PERMISSION_DENIED)


def tenant_of(prefix: str, value: str) -> str:
    """The tenant that a claim's value stands for; another one for each value.

    Args:
        prefix: What its name begins with.
        value: Any text. One that is too long for a name is in it as its digest.
    """
    data = value.encode("utf-8", "surrogatepass")
    name = prefix + "".join(chr(byte) if byte in _KEPT else f"_{byte:02X}" for byte in data)
    if OWNER_PATTERN.fullmatch(name):
        return name
    # No name that is written out has two of these in a row.
    return f"{prefix}__{hashlib.blake2b(data, digest_size=16).hexdigest()}"


def _refused(what: str) -> Unauthenticated:
    return Unauthenticated(f"the token {what}", Reason.UNAUTHENTICATED)


def _unchecked(text: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Header and claims of what may be a token: whatever somebody wrote there."""
    parts = text.split(".")
    if len(parts) != 3:
        raise _refused("is neither a key nor a token (JWT)")
    try:
        found = [json.loads(base64.urlsafe_b64decode(f"{part}===")) for part in parts[:2]]
    except (ValueError, RecursionError):
        raise _refused("is no token (JWT)") from None
    if not all(isinstance(each, dict) for each in found):
        raise _refused("is no token (JWT)")
    return found[0], found[1]


def _number(value: object) -> float:
    """A claim that should be a number; for ever where it is none, which is refused later."""
    return value if isinstance(value, int | float) and abs(value) < 2**53 else math.inf
