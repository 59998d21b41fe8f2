"""Who makes a request of the gateway, and what the calls that are made for it show to the servers.

The gateway looks the caller's key up, so that nobody gets as far as its memory without one, and
passes the key on: the servers decide what that caller may do, and whose everything is. What runs
on after a request, such as the renewing of leases, goes on with the key of that request; where that
was a token, with the newest of the same tenant and scope, since tokens end.
"""

import contextvars
import functools
import ipaddress
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from tinsmith.keys import AUTHORIZATION, SCHEME, Metadata
from tinsmithd.errors import TinsmithError
from tinsmithd.gateway.problems import Problem, problem_of
from tinsmithd.keys import Caller, current, set_current
from tinsmithd.rpc.auth import ClusterKey
from tinsmithd.rpc.flow import host_of
from tinsmithd.rpc.ring import Ring

HOSTS_MAX = 4096
"""Hosts whose addresses were read before, and need not be again."""
OPEN_PATHS = ("/healthz", "/livez")
SHOWN_MAX = 4096
"""Tenants with tokens that are remembered, beside those whose token is good yet."""
SIGNED_PREFIX = "/api/v1/files/"
"""Whoever has a signed URL needs no key."""
_host_of = functools.lru_cache(HOSTS_MAX)(host_of)
_OWN_METHOD = "/GetCapabilities"


@dataclass
class _Proof:
    """A key, or the newest token of somebody.

    Attributes:
        text: It; empty for a signed URL, and where there are no keys.
        expires_s: When a token ends, seconds since 1970.
    """

    text: str = field(default="", repr=False)
    expires_s: float = 0.0


@dataclass(frozen=True)
class _Shown:
    """What calls show.

    Attributes:
        part: Tells callers apart who must not see what the gateway has in memory for each other.
        proof: The caller's key.
        owner: Whose URL it is.
    """

    part: str = ""
    proof: _Proof = field(default_factory=_Proof)
    owner: str = ""


_NOBODY = _Shown()
_peer: contextvars.ContextVar[str] = contextvars.ContextVar("peer", default="")
_shown: contextvars.ContextVar[_Shown] = contextvars.ContextVar("shown", default=_NOBODY)


def part() -> str:
    """Tells callers apart in what the gateway remembers; empty where there are no keys."""
    return _shown.get().part


def peer() -> str:
    """Whose share of the gateway this task, and what it leaves under way, is taken from."""
    return _peer.get()


def set_peer(name: str) -> None:
    """Say whose request this task answers, as `caller_of` has it."""
    _peer.set(name)


def act_for(owner: str) -> None:
    """From now on this task makes calls for the owner of a signed URL."""
    _shown.set(_Shown(f"url {owner}", owner=owner))


def calls_show(own: ClusterKey, method: str) -> Metadata:
    """What a call of a method shows.

    Args:
        own: The key of the gateway.
        method: `/package.Service/Method`.
    """
    shown = _shown.get()
    if shown.owner:
        return (*own.metadata(), *(own.shown_for(shown.owner) or ()))
    if method.endswith(_OWN_METHOD):  # the same for all, and asked for many at once
        return own.metadata()
    return ((AUTHORIZATION, f"{SCHEME} {shown.proof.text}"),) if shown.proof.text else ()


def caller_of(scope: Any) -> str:
    """Whose share of the gateway a request, or a connection, takes: a tenant's, or a host's.

    Args:
        scope: As ASGI has it: `client` is address and port, or None.
    """
    caller = current()
    if caller.key_id:
        return f"tenant {caller.account}"
    return _host_of((scope.get("client") or ("",))[0])


def is_here(scope: Any) -> bool:
    """Whether a request comes from this machine, as far as it says: over no proxy, by loopback."""
    names = {name for name, _ in scope["headers"]}
    host = (scope.get("client") or ("",))[0]
    try:
        return not names & _OF_PROXIES and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Doorkeeper:
    """Lets requests through whose caller has a good key.

    Args:
        ring: By what callers are known; None lets everybody through.
    """

    def __init__(self, ring: Ring | None) -> None:
        self._ring = ring
        self._tokens: dict[str, _Proof] = {}

    async def enter(self, scope: Scope) -> Problem | None:
        """Note who makes a request; why it is refused, if it is."""
        path = scope["path"]
        if self._ring is None or path in OPEN_PATHS:
            return None
        if path.startswith(SIGNED_PREFIX):
            return None
        keys = _keys_of(scope)
        if len(keys) != 1:
            # What stands before the gateway may look at one of them, and the gateway at another.
            why = "the request shows more than one key"
            if not keys:
                why = "this cluster has keys: send one as X-API-Key or Authorization: Bearer"
            return Problem(401, why, "UNAUTHENTICATED")
        key = keys.pop()
        try:
            caller = await self._ring.caller(key)
        except TinsmithError as error:
            return problem_of(error)
        set_current(caller)
        _shown.set(_Shown(caller.part, self._proof(caller, key)))
        return None

    def _proof(self, caller: Caller, text: str) -> _Proof:
        if not caller.signed_by:
            return _Proof(text)
        if caller.part not in self._tokens and len(self._tokens) >= SHOWN_MAX:
            now_s = time.time()
            ended = [part for part, each in self._tokens.items() if each.expires_s <= now_s]
            for part in ended:
                del self._tokens[part]
        newest = self._tokens.setdefault(caller.part, _Proof())
        if caller.expires_s > newest.expires_s:
            newest.text, newest.expires_s = text, caller.expires_s
        return newest


def _keys_of(scope: Scope) -> set[str]:
    """The keys that a request shows; those of `X-API-Key`, where it has that, and no others."""
    found: dict[bytes, set[str]] = {name: set() for name in _HEADERS}
    for name, value in scope["headers"]:
        if name not in found:
            continue
        text = value.decode("latin-1")
        if name == b"authorization":
            scheme, _, text = text.partition(" ")
            if scheme.lower() != "bearer":
                continue
        if text.strip():
            found[name].add(text.strip())
    return next((keys for keys in found.values() if keys), set())


_HEADERS = (b"x-api-key", b"authorization")
_OF_PROXIES = frozenset((b"forwarded", b"via", b"x-forwarded-for", b"x-real-ip"))
