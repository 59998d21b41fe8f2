"""Puts the Checkpoint server together.

HEALTH. The service's own name is SERVING while checkpoints can be read: that is what most calls
do, and a load balancer that takes a server away for a disk which is full or read-only would turn
"nothing can be saved" into "nothing can be loaded". A write that cannot be made says so itself,
with an error that can be retried. The name is NOT_SERVING while the catalogue cannot be looked
into or the folder of blobs is gone or unreadable; one damaged checkpoint changes nothing.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from tinsmith.v1.checkpoint_service_pb2 import DESCRIPTOR
from tinsmith.v1.checkpoint_service_pb2_grpc import add_CheckpointServiceServicer_to_server
from tinsmithd.checkpoint.metrics import CheckpointCollector
from tinsmithd.checkpoint.opening import open_keeper
from tinsmithd.checkpoint.rules import REAL_CLOCKS, Clocks
from tinsmithd.checkpoint.servicer import CheckpointServicer
from tinsmithd.checkpoint.watchers import Watchers
from tinsmithd.config import CheckpointConfig
from tinsmithd.errors import TinsmithError
from tinsmithd.files import private_folder
from tinsmithd.rpc.budget import Budget
from tinsmithd.rpc.metrics import DiskCollector
from tinsmithd.rpc.server import RpcServer

PROBE_INTERVAL_S = 5.0
RECLAIMS_PER_LEASE = 5
RECLAIM_PAUSE = 9.0
"""Pause after a reclaim, in times of what it took of a processor: it gets a tenth of one."""

SERVICE_NAME: str = DESCRIPTOR.services_by_name["CheckpointService"].full_name
_log = logging.getLogger(__name__)


class CheckpointServer:
    """The Checkpoint server: construct, `await start()`, `await run()` or `await stop()`.

    Raises:
        StoreBusy: Another server has the data folder.
        CatalogueUnusable: The catalogue is damaged.
    """

    def __init__(self, config: CheckpointConfig, clocks: Clocks = REAL_CLOCKS) -> None:
        self._config = config
        folder = Path(config.data_folder)
        private_folder(folder)
        self._keeper = open_keeper(
            folder,
            checkpoint_bytes_max=config.checkpoint_bytes_max,
            lease_s=config.lease_s,
            epoch_step_max=config.writer_epoch_step_max,
            clocks=clocks,
        )
        self._rpc = RpcServer(config, SERVICE_NAME)
        registry = self._rpc.metrics.registry
        registry.register(CheckpointCollector(self._keeper.catalogue))
        registry.register(DiskCollector(folder))
        staged = Budget("staged_bytes_max", config.staged_bytes_max, config.peer_share_max)
        self._reclaimable = asyncio.Event()
        self._watchers = Watchers()
        servicer = CheckpointServicer(
            config, self._keeper, staged, self._reclaimable, self._watchers
        )
        add_CheckpointServiceServicer_to_server(servicer, self._rpc.grpc_server)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def port(self) -> int:
        """The port it listens on, after `start`."""
        return self._rpc.port

    async def start(self) -> None:
        """Bind and serve."""
        await self._rpc.start()
        await self._rpc.set_serving(True)
        self._tasks = [
            asyncio.create_task(self._sweep()),
            asyncio.create_task(self._reclaim()),
            asyncio.create_task(self._watch()),
        ]

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        await self._rpc.until_signal()
        await self.stop()

    async def stop(self) -> None:
        """Stop gracefully."""
        self._watchers.close()
        await self._rpc.stop()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._keeper.close()

    async def _sweep(self) -> None:
        while True:
            await self._try(self._keeper.sweep)
            await asyncio.sleep(self._config.sweep_interval_s)

    async def _reclaim(self) -> None:
        # What was given back goes at once, what was not soon after its lease, however long that is.
        interval_s = self._config.lease_s / RECLAIMS_PER_LEASE
        while True:
            self._reclaimable.clear()
            took_s = await self._try(self._keeper.reclaim)
            # It looks at every checkpoint. Where those are many, a while passes between two.
            pause_s = interval_s if took_s is None else RECLAIM_PAUSE * took_s
            await asyncio.sleep(min(pause_s, interval_s))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._reclaimable.wait()

    async def _try(self, sweep: Callable[[], None]) -> float | None:
        """Returns the processor time that it took, seconds; None where it failed."""
        try:
            return await asyncio.to_thread(_processor_time, sweep)
        except (OSError, TinsmithError) as error:
            _log.error("a sweep failed and is tried again later: %s", error)
            return None

    async def _watch(self) -> None:
        serving = True
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            try:
                await asyncio.to_thread(self._keeper.probe)
                reason = ""
            except TinsmithError as error:
                reason = error.message
            if serving == bool(reason):
                serving = not reason
                _log.warning("reads: %s", reason or "possible again")
                await self._rpc.set_serving(serving)


def _processor_time(work: Callable[[], None]) -> float:
    began_s = time.thread_time()
    work()
    return time.thread_time() - began_s
