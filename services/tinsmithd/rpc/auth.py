"""Who calls: every call of a cluster with keys shows one, before anything of it is read.

A key, or a token of an issuer, is metadata, `authorization: Bearer KEY`. Health is for everybody,
or probes would need keys. The servers show a key of scope `server`, and say with `tinsmith-owner`
for whom they ask: what they see and make is then that tenant's. What a call may do is said here;
whose a thing is, by the rules.
"""

import os
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health
from grpc_status import rpc_status

from tinsmith.keys import AUTHORIZATION, SCHEME, Metadata
from tinsmithd.config import ConfigError
from tinsmithd.errors import PermissionDenied, Reason, TinsmithError, Unauthenticated
from tinsmithd.keys import Caller, Scope, acting_for, set_current
from tinsmithd.owners import ANY_OWNER, OWNER_PATTERN
from tinsmithd.processes.event_loop import take_turns
from tinsmithd.rpc.refusals import Refusals
from tinsmithd.rpc.ring import Ring
from tinsmithd.rpc.status import to_status

OWNER_KEY = "tinsmith-owner"
"""Metadata in which a server says for whom it asks."""
READS = {
    "tinsmith.v1.TrainingService": {
        "GetCapabilities",
        "GetModel",
        "ListModels",
        "ListSteps",
        "GetAnswer",
    },
    "tinsmith.v1.SamplerService": {"GetCapabilities", "GetTokenizer"},
    "tinsmith.v1.CheckpointService": {
        "GetCapabilities",
        "GetCheckpoint",
        "ListCheckpoints",
        "ReadCheckpoint",
        "WatchCheckpoints",
        "ExportCheckpoint",
    },
    "grpc.reflection.v1.ServerReflection": {"ServerReflectionInfo"},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo"},
}
"""Calls that change nothing and compute nothing, by service: those of a read-only key."""
FOR_SERVERS = {"tinsmith.v1.CheckpointService": {"ReleaseModels"}}
"""Calls of servers among themselves, by service."""
_HEALTH = f"/{health.SERVICE_NAME}/"
_CHANNELZ = f"/{channelz_pb2.DESCRIPTOR.services_by_name['Channelz'].full_name}/"
_LOOK_INTERVAL_S = 1.0


def shown_key(metadata: Metadata) -> str:
    """The key that a call shows; empty where it shows none, or several."""
    found = [value for key, value in metadata if key == AUTHORIZATION]
    if len(found) != 1:
        return ""
    text = found[0] if isinstance(found[0], str) else found[0].decode("latin-1")
    scheme, _, key = text.partition(" ")
    return key.strip() if scheme.lower() == SCHEME.lower() else ""


async def caller_of(ring: Ring, metadata: Metadata) -> Caller:
    """Who makes a call.

    Raises:
        Unauthenticated: Nobody that is known.
        PermissionDenied: Somebody who may do nothing here, or speaks for others and may not.
        Unavailable: Nobody can tell now.
    """
    key = shown_key(metadata)
    if not key:
        message = "this cluster has keys: show one as metadata, `authorization: Bearer KEY`"
        raise Unauthenticated(message, Reason.UNAUTHENTICATED)
    caller = await ring.caller(key)
    for name, value in metadata:
        if name == OWNER_KEY:
            owner = value if isinstance(value, str) else ""
            return _speaks_for(caller, owner, ring)
    return caller


def _speaks_for(caller: Caller, owner: str, ring: Ring) -> Caller:
    if caller.scope is not Scope.SERVER:
        message = f"only a key of scope server may say {OWNER_KEY}"
        raise PermissionDenied(message, Reason.PERMISSION_DENIED)
    if owner != ANY_OWNER and not OWNER_PATTERN.fullmatch(owner):
        raise PermissionDenied(f"{OWNER_KEY} is no tenant's name", Reason.PERMISSION_DENIED)
    return acting_for(caller, owner, ring.limits_of(owner))


def check_may(caller: Caller, method: str) -> None:
    """Refuse a call that a key is not for.

    Args:
        caller: Who makes it.
        method: `/package.Service/Method`.

    Raises:
        PermissionDenied: It is of a kind that this key is not for.
    """
    _, service, name = method.split("/", 2)
    if method.startswith(_CHANNELZ):  # it has the addresses of all who are connected
        if caller.scope is not Scope.ADMIN:
            message = "channelz is for keys of scope admin"
            raise PermissionDenied(message, Reason.PERMISSION_DENIED)
    elif caller.scope is Scope.READ_ONLY and name not in READS.get(service, ()):
        message = f"the key is read-only, and {name} is no call that only reads"
        raise PermissionDenied(message, Reason.PERMISSION_DENIED)
    elif name in FOR_SERVERS.get(service, ()) and not caller.is_server:
        message = f"{name} is for the servers of the cluster among themselves"
        raise PermissionDenied(message, Reason.PERMISSION_DENIED)


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # untyped base
    """Lets a call pass if its key is good for it, and says to its servicer who makes it.

    It has to be the first: those behind it keep the handler of a method for all callers.

    Args:
        ring: The keys, and tokens.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        reasons = (Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED)
        self.refusals = Refusals("call(s) without a good key", reasons)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Pass the call on, or have it refused before anything of it is read."""
        method: str = details.method
        if method.startswith(_HEALTH):
            return await continuation(details)
        take_turns()  # keys of an issuer may have to be fetched
        try:
            caller = await caller_of(self._ring, details.invocation_metadata or ())
            check_may(caller, method)
        except TinsmithError as error:
            return grpc.stream_stream_rpc_method_handler(self._refusing(error))
        # The servicer runs in the task, and so in the context, in which this does.
        set_current(caller)
        return await continuation(details)

    def _refusing(self, error: TinsmithError) -> Any:
        async def refuse(_: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            self.refusals.refused(context.peer(), error.reason)
            status = to_status(error, secrets.token_hex(8))
            await context.abort_with_status(rpc_status.to_status(status))
            yield b""

        return refuse


class ClusterKey:
    """The key that this process shows to the other servers: the content of a file.

    The file is looked at again, so that a key is changed without a restart.

    Args:
        name: The file; empty: there are no keys.
        setting: The setting that names it.

    Raises:
        ConfigError: It cannot be read, or holds no key.
    """

    def __init__(self, name: str, setting: str) -> None:
        self._file, self._setting = Path(name), setting
        self.is_set = bool(name)
        self._text = ""
        self._mark: tuple[int, int] | None = None
        self._looked_s = float("-inf")
        if self.is_set:
            self._read()

    def _read(self) -> None:
        try:
            found = os.stat(self._file)
            text = self._file.read_text("ascii", errors="replace").strip()
        except OSError as error:
            message = f"{self._setting}: cannot read {self._file}: {error.strerror}"
            raise ConfigError(message) from error
        if not text or not all("!" <= character <= "~" for character in text):
            raise ConfigError(f"{self._setting}: {self._file}: holds no key, in one line")
        self._text, self._mark = text, (found.st_mtime_ns, found.st_ino)
        self._looked_s = time.monotonic()

    def metadata(self) -> Sequence[tuple[str, str]]:
        """What a call shows; nothing where there are no keys."""
        if not self.is_set:
            return ()
        if time.monotonic() - self._looked_s > _LOOK_INTERVAL_S:
            self._looked_s = time.monotonic()
            try:
                found = os.stat(self._file)
                if (found.st_mtime_ns, found.st_ino) != self._mark:
                    self._read()
            except (OSError, ConfigError):
                pass  # the one that is known is good until it is revoked
        return ((AUTHORIZATION, f"{SCHEME} {self._text}"),)

    def shown_for(self, owner: str) -> Sequence[tuple[str, str]] | None:
        """What a call made for an owner says besides; None where there are no keys."""
        return ((OWNER_KEY, owner),) if self.is_set else None


NO_KEY = ClusterKey("", "")
"""That of a process in a cluster without keys."""
