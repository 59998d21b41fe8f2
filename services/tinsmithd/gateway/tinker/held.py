"""Holds the sampler weights without a name that programs use, for as long as their session lives.

The SDK says nothing when a program drops a sampler. So one is held while its session beats and it
was used not too long ago; the newest of a model stays by the Checkpoint server's own rule. What is
held is written down nowhere: a gateway that starts looks for what there is, and holds what belongs
to the sessions that it hears of.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

import grpc

from tinsmith.errors import TinsmithError
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmithd import tracing
from tinsmithd.config import GatewaySettings
from tinsmithd.domain import is_ephemeral_name
from tinsmithd.gateway.cluster import CHECKPOINT, Cluster
from tinsmithd.gateway.tinker.ids import session_of_model

LEASES_MAX = 1000
"""As many as the Checkpoint server takes in one request."""
SESSIONS_MAX = 10_000
"""Sessions that are remembered; of those without samplers the one goes first that was heard of
longest ago."""
PER_SESSION_MAX = 1000
"""Samplers that a session holds; the one that was used longest ago goes first."""
PAGES_MAX = 100
"""Pages of checkpoints that are looked through at the start."""
RENEWALS_PER_LEASE = 3
FIRST_RENEWAL_S = 5.0
RETRY_S = 1.0

_log = logging.getLogger(__name__)


@dataclass
class _Held:
    """One sampler of a session.

    Attributes:
        lease_id: Drawn at random, so that nobody else can end it.
        used_s: When it was last used, by the loop's clock.
    """

    lease_id: str
    used_s: float


@dataclass
class _Session:
    """What is remembered of a session.

    Attributes:
        heard_s: When it was last heard of, by the loop's clock.
        samplers: What it holds, by path; the one that was used last comes last.
    """

    heard_s: float
    samplers: dict[str, _Held] = field(default_factory=dict)


class HeldSamplers:
    """What the sessions of this gateway hold. Lives on one event loop.

    Args:
        cluster: Where the checkpoints are.
        settings: How long a session and a sampler may be silent.
    """

    def __init__(self, cluster: Cluster, settings: GatewaySettings) -> None:
        self._cluster = cluster
        self._settings = settings
        self._sessions: dict[str, _Session] = {}
        self._released: dict[str, str] = {}  # paths by lease id
        self._renewing: asyncio.Task[None] | None = None
        self._given_back = asyncio.Event()
        self._finding: asyncio.Task[None] | None = None
        self._found: dict[str, list[str]] = {}  # paths of sessions that were not heard of yet

    def new_lease_id(self) -> str:
        """The id of a lease, for the call that makes a checkpoint."""
        return secrets.token_hex(16)

    def heard(self, session_id: str) -> None:
        """A session is alive."""
        known = self._sessions.pop(session_id, None)
        now_s = asyncio.get_running_loop().time()
        if known is None:
            known = _Session(now_s)
            if len(self._sessions) >= SESSIONS_MAX:
                self._make_room()
        known.heard_s = now_s
        self._sessions[session_id] = known
        if self._finding is None:
            self._finding = asyncio.create_task(self._find(), name="ephemeral checkpoints")
        for path in self._found.pop(session_id, ()):
            self.hold(session_id, path)

    def hold(self, session_id: str, path: str, lease_id: str = "") -> None:
        """A session uses a sampler now; one with a name needs no holding.

        Args:
            session_id: Whose.
            path: The checkpoint, as the Checkpoint server has it.
            lease_id: A lease that the server knows of already.
        """
        if not is_ephemeral_name(path.rpartition("/")[2]):
            return
        self.heard(session_id)
        samplers = self._sessions[session_id].samplers
        held = samplers.pop(path, None) or _Held(lease_id or self.new_lease_id(), 0.0)
        held.used_s = asyncio.get_running_loop().time()
        samplers[path] = held
        if len(samplers) > PER_SESSION_MAX:
            self._release(samplers, next(iter(samplers)))
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._run(), name="leases")

    def end(self, session_id: str) -> None:
        """A session has ended: what it held is given back."""
        known = self._sessions.pop(session_id, None)
        if known is not None:
            for path in list(known.samplers):
                self._release(known.samplers, path)

    @property
    def sessions_count(self) -> int:
        """Sessions that are remembered."""
        return len(self._sessions)

    def sessions(self) -> Set[str]:
        """Sessions that were heard of and have not ended."""
        now_s, most_s = asyncio.get_running_loop().time(), self._settings.session_idle_s
        return {id_ for id_, known in self._sessions.items() if now_s - known.heard_s <= most_s}

    def _make_room(self) -> None:
        # Whoever makes sessions by the thousand takes no other one's samplers.
        empty = (id_ for id_, known in self._sessions.items() if not known.samplers)
        self.end(next(empty, next(iter(self._sessions))))

    def _release(self, samplers: dict[str, _Held], path: str) -> None:
        self._released[samplers.pop(path).lease_id] = path
        self._given_back.set()

    async def _find(self) -> None:
        """Find what sessions had before this gateway was there, once."""
        token = ""
        for _ in range(PAGES_MAX):
            page = await self._page(token)
            if page is None:
                return
            for found in page.checkpoints:
                session_id = session_of_model(found.model_id) if found.ephemeral else ""
                if session_id in self._sessions:
                    self.hold(session_id, found.checkpoint_path)
                elif session_id:
                    self._found.setdefault(session_id, []).append(found.checkpoint_path)
            token = page.next_page_token
            if not token:
                break
        # By then, whoever is still there was heard of.
        await asyncio.sleep(self._settings.session_idle_s)
        self._found.clear()

    async def _page(self, token: str) -> pb.ListCheckpointsResponse | None:
        kind = types_pb2.CHECKPOINT_KIND_SAMPLER
        request = pb.ListCheckpointsRequest(kind=kind, page_size=LEASES_MAX, page_token=token)

        async def ask() -> pb.ListCheckpointsResponse:
            return await (await self._cluster.checkpoint()).ListCheckpoints(request)

        try:
            return await self._cluster.retrying("list_checkpoints", ask, service=CHECKPOINT)
        except TinsmithError as error:
            _log.warning("samplers without a name are held again once they are used: %s", error)
            return None

    async def _run(self) -> None:
        tracing.forget()
        renew_s = FIRST_RENEWAL_S
        while self._sessions or self._released:
            try:
                self._let_silent_ones_go()
                lease_s = await self._tell()
                renew_s = max(lease_s / RENEWALS_PER_LEASE, 0.05)
            except (grpc.RpcError, TinsmithError, TimeoutError) as error:
                _log.warning("leases are renewed later: %s", error)
                renew_s = min(renew_s, RETRY_S)
            # Silent ones go soon after their time, too.
            renew_s = min(renew_s, self._settings.session_idle_s, self._settings.sampler_idle_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(renew_s):
                    await self._given_back.wait()
            self._given_back.clear()
        self._renewing = None

    def _let_silent_ones_go(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for session_id, known in list(self._sessions.items()):
            if now_s - known.heard_s > self._settings.session_idle_s:
                self.end(session_id)
                continue
            for path, held in list(known.samplers.items()):
                if now_s - held.used_s > self._settings.sampler_idle_s:
                    self._release(known.samplers, path)

    async def _tell(self) -> float:
        """Renew and give back; returns how long leases last, seconds."""
        held = [pb.Lease(checkpoint_path=path, lease_id=id_) for id_, path in self._all()]
        gone, self._released = self._released, {}
        released = [pb.Lease(checkpoint_path=path, lease_id=id_) for id_, path in gone.items()]
        lease_s = FIRST_RENEWAL_S * RENEWALS_PER_LEASE
        for start in range(0, max(len(held), len(released), 1), LEASES_MAX):
            part = slice(start, start + LEASES_MAX)
            request = pb.RenewLeasesRequest(leases=held[part], released=released[part])
            stub = await self._cluster.checkpoint()
            # Once: what the server does not hear of runs out by itself.
            response = await stub.RenewLeases(request, timeout=RETRY_S * 10)
            lease_s = response.lease.ToNanoseconds() / 1e9
            for path in response.not_found_checkpoint_paths:
                self._forget(path)
        return lease_s

    def _all(self) -> Iterator[tuple[str, str]]:
        for known in self._sessions.values():
            for path, held in known.samplers.items():
                yield held.lease_id, path

    def _forget(self, path: str) -> None:
        for known in self._sessions.values():
            known.samplers.pop(path, None)
