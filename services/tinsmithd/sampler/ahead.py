"""Brings adapters in as they are saved, so that they are there when the first call comes.

It is told of them by the Checkpoint server. That is a hint: what it misses, or has no room for, is
fetched when a call asks for it, and only takes longer then.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict

from tinsmithd.domain import CheckpointInfo
from tinsmithd.errors import TinsmithError
from tinsmithd.sampler.adapters import Adapters
from tinsmithd.sampler.loaded_adapters import LoadedAdapters

FETCHES_MAX = 2
"""Adapters that are brought in at once."""
MODELS_MAX = 256
"""Models whose newest weights wait to be brought in; the one that waited longest leaves first."""
RETRY_S_FIRST = 1.0
RETRY_S_MAX = 30.0

_log = logging.getLogger(__name__)


class Ahead:
    """Brings in what it is told of. Lives on one event loop.

    Args:
        adapters: Finds and fetches them.
        loaded: Takes them.
        base_model: What they have to fit.
        bytes_max: Size of the largest one; 0: none.
    """

    def __init__(
        self, adapters: Adapters, loaded: LoadedAdapters, base_model: str, bytes_max: int
    ) -> None:
        self._adapters = adapters
        self._loaded = loaded
        self._base_model = base_model
        self._bytes_max = bytes_max
        # By model: of one that is saved faster than fetched, only the newest counts.
        self._told: OrderedDict[str, CheckpointInfo] = OrderedDict()
        self._more = asyncio.Semaphore(0)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to listen."""
        if self._bytes_max:
            bringing = [self._bring() for _ in range(FETCHES_MAX)]
            self._tasks = [asyncio.create_task(work) for work in (self._listen(), *bringing)]

    async def close(self) -> None:
        """Listen no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self) -> None:
        delay_s = RETRY_S_FIRST
        while True:
            try:
                async with contextlib.aclosing(self._adapters.told(self._base_model)) as told:
                    async for found in told:
                        delay_s = RETRY_S_FIRST
                        if found is not None and found.size_bytes <= self._bytes_max:
                            self._take(found)
            except TinsmithError as error:
                _log.info("new adapters are fetched when they are asked for: %s", error)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RETRY_S_MAX)

    def _take(self, found: CheckpointInfo) -> None:
        if found.path.model_id not in self._told:
            self._more.release()
        self._told[found.path.model_id] = found
        if len(self._told) > MODELS_MAX:
            self._told.popitem(last=False)

    async def _bring(self) -> None:
        while True:
            await self._more.acquire()
            if not self._told:
                continue  # it had to leave
            _, found = self._told.popitem(last=False)
            try:
                async with self._adapters.leases.held(found.path) as lease:
                    adapter = self._adapters.adapter_of(found, self._base_model, lease)
                    await self._loaded.bring_ahead(adapter)
            except TinsmithError as error:
                _log.debug("%s is not fetched ahead: %s", found.path, error)
            except Exception:
                _log.exception("%s was not fetched ahead", found.path)
