"""Adapters of SAMPLER checkpoints, each under a key that says what it holds."""

import asyncio
import functools
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from concurrent.futures import Future

from tinsmithd import failpoints
from tinsmithd.checkpoint_client import CheckpointClient, Found, LocalFiles, check_digest
from tinsmithd.domain import CheckpointInfo, CheckpointKind, CheckpointPath, ModelState, Tuning
from tinsmithd.errors import FailedPrecondition, NotFound, Reason, TinsmithError, Unavailable
from tinsmithd.sampler.leases import Lease, Leases
from tinsmithd.sampler.loaded_adapters import Adapter, Fetched
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
        self._not_here: OrderedDict[bytes, None] = OrderedDict()
        """Digests of what is damaged where it lies."""
        self._beside: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the channel."""
        beside = list(self._beside)
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
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
        for what, value, limit, most in (
            ("rank", found.tuning.adapter_rank, "rank_max", self._rank_max),
            ("size in bytes", found.size_bytes, "adapter_bytes_max", self._adapter_bytes_max),
        ):
            if value > most:
                message = f"the {what} of {path} is {value}; {limit} is {most}"
                raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)
        key = _key(path, found.digest)
        self._saw(key)
        return Adapter(key, functools.partial(self._fetch, path, found.digest, found, lease))

    def told(self, base_model: str) -> AsyncGenerator[CheckpointInfo | None]:
        """See `CheckpointClient.watch`."""
        return self._client.watch(base_model)

    async def _fetch(
        self, path: CheckpointPath, digest: bytes, found: CheckpointInfo | None, lease: Lease
    ) -> Fetched:
        if self._local is not None and found is not None and digest not in self._not_here:
            here = await asyncio.to_thread(_read_here, self._local, found)
            if here is not None:
                return Fetched(here.content, self._begin(self._proven(digest, here.proof)))
        files: dict[str, bytearray] = {}
        async with self._client.reader(path, lease.take()) as reader:
            if reader.info.digest != digest:  # whoever asks again is told what became of it
                message = f"{path} was replaced before it was read"
                raise Unavailable(message, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=0.1)
            async for name, data in reader.pieces():
                files.setdefault(name, bytearray()).extend(data)
                failpoints.hit("sampler_mid_swap")
        # Checking a large one takes longer than the event loop may stand still.
        return Fetched(await asyncio.to_thread(_read, files, reader.info.tuning))

    async def _proven(self, digest: bytes, proof: Future[bool]) -> None:
        """End once files that were read where they lie are seen to be those of a digest.

        Raises:
            Unavailable: They are not: whoever asks again has them sent (CHECKPOINT_UNAVAILABLE).
        """
        if await asyncio.wrap_future(proof):
            return
        self._not_here[digest] = None
        if len(self._not_here) > REMEMBERED_MAX:
            self._not_here.popitem(last=False)
        message = f"files of {digest.hex()[:12]} are damaged where they lie"
        _log.warning("%s", message)
        raise Unavailable(message, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=0.1)

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Do something beside all else; a TinsmithError is for whoever waits for it, if anybody."""
        task = asyncio.create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[None]) -> None:
        self._beside.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TinsmithError):
            _log.error("what was to be done beside calls failed", exc_info=error)

    # --- is it still there? -------------------------------------------------------------------

    def _saw(self, key: str) -> None:
        self._seen_s[key] = time.monotonic()
        self._seen_s.move_to_end(key)
        if len(self._seen_s) > REMEMBERED_MAX:
            self._seen_s.popitem(last=False)

    def _recheck_soon(self, path: CheckpointPath, key: str) -> None:
        if time.monotonic() - self._seen_s[key] > self._recheck_s:
            self._saw(key)
            self._begin(self._recheck(path, key))

    async def _recheck(self, path: CheckpointPath, key: str) -> None:
        try:
            async with self.leases.held(path) as lease:
                await self._client.get(path, lease.take())
        except NotFound:
            self._seen_s.pop(key, None)  # whoever wants it next is told
        except TinsmithError as error:
            _log.warning("whether %s is still there is not known: %s", path, error)


def _read_here(local: LocalFiles, found: CheckpointInfo) -> Found[ModelState] | None:
    return local.read(found.files, found.size_bytes, functools.partial(_read, tuning=found.tuning))


def _key(path: CheckpointPath, digest: bytes) -> str:
    return f"{path.owner} {path}@{digest.hex()}"


def _read(files: Mapping[str, state_files.Content], tuning: Tuning) -> ModelState:
    # The Checkpoint server has looked at the values of what has this digest.
    return state_files.from_files(files, tuning, values=False)
