"""Who makes a call, and what that one may do."""

import contextvars
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tinsmithd.owners import ANY_OWNER, DEFAULT_OWNER


class Scope(StrEnum):
    """What a key is for.

    TENANT owns what it makes and sees nothing else. READ_ONLY sees what its tenant owns and changes
    nothing. ADMIN is a tenant who sees and may change what is anybody's. SERVER is for the servers
    of the cluster among themselves: it acts for an owner, or sees all.
    """

    TENANT = "tenant"
    READ_ONLY = "read-only"
    ADMIN = "admin"
    SERVER = "server"


LIMIT_NAMES = (
    "tenant_models_max",
    "tenant_queued_bytes_max",
    "tenant_tokens_per_minute_max",
    "tenant_stored_bytes_max",
    "tenant_samples_max",
)
"""Limits of one tenant: settings, which the file of keys may change for some of them; 0: none."""


@dataclass(frozen=True)
class Caller:
    """Who makes a call.

    Attributes:
        owner: The tenant, whose is what the call makes; `ANY_OWNER` for a server that acts for
            nobody.
        scope: What its key is for.
        key_id: Names the key, or the token, in logs too; empty where there are no keys.
        limits: Those of this tenant that are not the settings', by name.
        expires_s: When a token ends, seconds since 1970; a key is looked up.
        signed_by: The key of an issuer that signed its token; empty for one who shows a key.
    """

    owner: str
    scope: Scope
    key_id: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)
    expires_s: float = math.inf
    signed_by: str = ""

    @property
    def sees_all(self) -> bool:
        """Whether other owners' things are there for this one, too."""
        return bool(self.key_id) and (self.scope is Scope.ADMIN or self.owner == ANY_OWNER)

    @property
    def is_server(self) -> bool:
        """Whether this one is a server of the cluster, or its administrator."""
        return self.scope in (Scope.SERVER, Scope.ADMIN)

    @property
    def account(self) -> str:
        """Whose share the call is taken from."""
        return DEFAULT_OWNER if self.owner == ANY_OWNER else self.owner

    @property
    def part(self) -> str:
        """Tells callers apart who must not see what a server remembers for each other. A token is
        replaced every hour; the next one of its tenant goes on with what the last one began."""
        who = f"token {self.scope}" if self.signed_by else self.key_id
        return f"{who} {self.owner}"

    @property
    def search(self) -> str:
        """The owner that is said to another server, which is to look for this one's things."""
        return ANY_OWNER if self.sees_all else self.owner

    def limit(self, name: str, setting: int) -> int:
        """A limit of this tenant; 0: none.

        Args:
            name: One of `LIMIT_NAMES`.
            setting: What it is for those of whom the key file says nothing.
        """
        return self.limits.get(name, setting)


ANONYMOUS = Caller(DEFAULT_OWNER, Scope.ADMIN)
"""Everybody, where there are no keys: what is some tenant's is not seen then."""

_current: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller", default=ANONYMOUS)


def current() -> Caller:
    """Who makes the call that is being served."""
    return _current.get()


def set_current(caller: Caller) -> None:
    """Say who makes the call that this task serves."""
    _current.set(caller)


def acting_for(caller: Caller, owner: str, limits: Mapping[str, int]) -> Caller:
    """A server that acts for an owner: it sees what that one sees, and what it makes is theirs.

    Args:
        caller: The server.
        owner: For whom; `ANY_OWNER`: for somebody who sees all.
        limits: Those of the owner that are not the settings'.
    """
    return dataclasses.replace(caller, owner=owner, limits=limits)
