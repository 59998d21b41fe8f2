"""Adapters of SAMPLER checkpoints, each under a key that says what it holds."""

import asyncio
import functools
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping

from tinsmithd import failpoints
from tinsmithd.checkpoint_client import CheckpointClient, LocalFiles, check_digest
from tinsmithd.domain import CheckpointInfo, CheckpointKind, CheckpointPath, ModelState, Tuning
from tinsmithd.errors import FailedPrecondition, NotFound, Reason, TinsmithError, Unavailable
from tinsmithd.sampler.leases import Lease, Leases
from tinsmithd.sampler.loaded_adapters import Adapter
from tinsmithd.state import files as state_files

REMEMBERED_MAX = 1024
"""Maximum number of checkpoints whose last lookup is remembered."""

_log = logging.getLogger(__name__)


class Adapters:
    """Finds and fetches the adapters of SAMPLER checkpoints.

    Args:
        client: The Checkpoint server.
        recheck_s: See the setting `checkpoint_recheck_s`.
        rank_max, adapter_bytes_max: See the settings.
        local: The Checkpoint server's files, where it is on this machine.

    Attributes:
        leases: Hold the checkpoints that requests need.
    """

    def __init__(
        self,
        client: CheckpointClient,
        recheck_s: float,
        *,
        rank_max: int,
        adapter_bytes_max: int,
        local: LocalFiles | None = None,
    ) -> None:
        self.leases = Leases(client.renew_leases)
        self._client = client
        self._recheck_s = recheck_s
        self._rank_max = rank_max
        self._adapter_bytes_max = adapter_bytes_max
        self._local = local
        self._seen_s: OrderedDict[str, float] = OrderedDict()
        self._rechecks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the channel."""
        rechecks = list(self._rechecks)
        for task in rechecks:
            task.cancel()
        await asyncio.gather(*rechecks, return_exceptions=True)
        await self.leases.close()
        await self._client.close()

    async def find(
        self,
        path: CheckpointPath,
        base_model: str,
        digest: bytes,
        has: Callable[[str], bool],
        lease: Lease,
    ) -> Adapter:
        """Find the adapter of a path: the content that is asked for, or what the name means now.

        An adapter in memory is given without waiting for anybody when its digest is asked for; that
        its checkpoint was deleted is noticed a little later.

        Args:
            path: The checkpoint.
            base_model: What the adapter has to fit.
            digest: The content that is wanted; empty: any.
            has: Whether the adapter of a key is in memory.
            lease: Holds the checkpoint until the request ends.

        Raises:
            NotFound: There is no such checkpoint (CHECKPOINT_NOT_FOUND).
            FailedPrecondition: It is of another kind (WRONG_CHECKPOINT_KIND), of another base
                model, no adapter (INCOMPATIBLE_CHECKPOINT), or its name was given to other content
                (CHECKPOINT_REPLACED).
            Unavailable: The Checkpoint server does not answer.
        """
        if path.kind is not CheckpointKind.SAMPLER:
            message = f"{path} is for training; save one for the sampler"
            raise FailedPrecondition(message, Reason.WRONG_CHECKPOINT_KIND)
        key = _key(path, digest)
        if digest and key in self._seen_s and has(key):
            self._recheck_soon(path, key)
            return Adapter(key, functools.partial(self._fetch, path, digest, None, lease))
        found = await self._client.get(path, lease.take())
        check_digest(found, digest)
        return self.adapter_of(found, base_model, lease)

    def adapter_of(self, found: CheckpointInfo, base_model: str, lease: Lease) -> Adapter:
        """The adapter of a checkpoint of which the Checkpoint server has just spoken.

        Raises:
            FailedPrecondition: As in `find`.
        """
        path = found.path
        if found.base_model != base_model:
            message = f"{path} is of base model {found.base_model!r}, not {base_model!r}"
            raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)
        if not found.tuning.is_adapter:
            message = (
                f"{path} holds {found.tuning.noun}, which this Sampler does not serve; export it "
                "and serve the folder as a base model"
            )
            raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)
        rank = found.tuning.adapter_rank
        if rank > self._rank_max or found.size_bytes > self._adapter_bytes_max:
            message = (
                f"{path} has rank {rank} and {found.size_bytes} bytes; rank_max is "
                f"{self._rank_max}, adapter_bytes_max {self._adapter_bytes_max}"
            )
            raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)
        key = _key(path, found.digest)
        self._saw(key)
        return Adapter(key, functools.partial(self._fetch, path, found.digest, found, lease))

    def told(self, base_model: str) -> AsyncGenerator[CheckpointInfo | None]:
        """See `CheckpointClient.watch`."""
        return self._client.watch(base_model)

    async def _fetch(
        self, path: CheckpointPath, digest: bytes, found: CheckpointInfo | None, lease: Lease
    ) -> ModelState:
        if self._local is not None and found is not None:
            here = await asyncio.to_thread(_read_here, self._local, found)
            if here is not None:
                return here
        files: dict[str, bytearray] = {}
        async with self._client.reader(path, lease.take()) as reader:
            if reader.info.digest != digest:  # whoever asks again is told what became of it
                message = f"{path} was replaced before it was read"
                raise Unavailable(message, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=0.1)
            async for name, data in reader.pieces():
                files.setdefault(name, bytearray()).extend(data)
                failpoints.hit("sampler_mid_swap")
        # Checking a large one takes longer than the event loop may stand still.
        return await asyncio.to_thread(_read, files, reader.info.tuning)

    # --- is it still there? -------------------------------------------------------------------

    def _saw(self, key: str) -> None:
        self._seen_s[key] = time.monotonic()
        self._seen_s.move_to_end(key)
        if len(self._seen_s) > REMEMBERED_MAX:
            self._seen_s.popitem(last=False)

    def _recheck_soon(self, path: CheckpointPath, key: str) -> None:
        if time.monotonic() - self._seen_s[key] > self._recheck_s:
            self._saw(key)
            task = asyncio.create_task(self._recheck(path, key))
            self._rechecks.add(task)
            task.add_done_callback(self._rechecks.discard)

    async def _recheck(self, path: CheckpointPath, key: str) -> None:
        try:
            async with self.leases.held(path) as lease:
                await self._client.get(path, lease.take())
        except NotFound:
            self._seen_s.pop(key, None)  # whoever wants it next is told
        except TinsmithError as error:
            _log.warning("whether %s is still there is not known: %s", path, error)


def _read_here(local: LocalFiles, found: CheckpointInfo) -> ModelState | None:
    parse = functools.partial(state_files.from_files, tuning=found.tuning)
    return local.read(found.files, found.size_bytes, parse)


def _key(path: CheckpointPath, digest: bytes) -> str:
    return f"{path}@{digest.hex()}"


def _read(files: Mapping[str, bytearray], tuning: Tuning) -> ModelState:
    return state_files.from_files({name: bytes(data) for name, data in files.items()}, tuning)
