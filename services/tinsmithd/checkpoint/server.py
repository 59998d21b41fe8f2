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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tinsmith.v1.checkpoint_service_pb2 import DESCRIPTOR
from tinsmith.v1.checkpoint_service_pb2_grpc import add_CheckpointServiceServicer_to_server
from tinsmithd.checkpoint.metrics import CheckpointCollector, Counts
from tinsmithd.checkpoint.opening import open_keeper
from tinsmithd.checkpoint.place import place_of
from tinsmithd.checkpoint.rules import REAL_CLOCKS, Clocks
from tinsmithd.checkpoint.servicer import CheckpointServicer
from tinsmithd.checkpoint.store import whole
from tinsmithd.checkpoint.watchers import Watchers
from tinsmithd.config import CheckpointConfig
from tinsmithd.errors import TinsmithError
from tinsmithd.files import private_folder
from tinsmithd.processes import collect_between_calls
from tinsmithd.rpc.budget import Budget
from tinsmithd.rpc.collectors import DiskCollector
from tinsmithd.rpc.private import NamesInterceptor, PrivateServer
from tinsmithd.rpc.server import RpcServer
from tinsmithd.tls import names_of, of_cluster

PROBE_INTERVAL_S = 5.0
STORE_THREADS = 64
"""Calls that wait for an object store at a time."""
RECLAIMS_PER_LEASE = 5
RECLAIM_PAUSE = 9.0
"""Pause after a reclaim, in times of what it took of a processor: it gets a tenth of one."""

SERVICE_NAME: str = DESCRIPTOR.services_by_name["CheckpointService"].full_name
_log = logging.getLogger(__name__)


class CheckpointServer:
    """The Checkpoint server: construct, `await start()`, `await run()` or `await stop()`.

    Raises:
        StoreBusy: Another server has the data folder.
        StoreUnusable: The object store cannot be used as it is set.
        CatalogueUnusable: The catalogue is damaged.
        ConfigError: A certificate, or the file of keys, cannot be used.
    """

    def __init__(self, config: CheckpointConfig, clocks: Clocks = REAL_CLOCKS) -> None:
        self._config = config
        folder = Path(config.data_folder)
        private_folder(folder)
        self._keeper = open_keeper(
            folder,
            checkpoint_bytes_max=config.checkpoint_bytes_max,
            lease_s=config.lease_s,
            place=place_of(config),
            epoch_step_max=config.writer_epoch_step_max,
            clocks=clocks,
        )
        certificates = of_cluster(config)
        self._rpc = RpcServer(config, SERVICE_NAME, cluster=certificates)
        staged = Budget("staged_bytes_max", config.staged_bytes_max, config.peer_share_max)
        self._counts = Counts()
        metrics, catalogue = self._rpc.metrics, self._keeper.catalogue
        metrics.registry.register(
            CheckpointCollector(catalogue, staged, self._counts, metrics.tenants)
        )
        metrics.registry.register(DiskCollector(folder))
        self._reclaimable = asyncio.Event()
        self._watchers = Watchers()
        servicer = CheckpointServicer(
            config, self._keeper, staged, self._reclaimable, self._watchers
        )
        add_CheckpointServiceServicer_to_server(servicer, self._rpc.grpc_server)
        self._cluster: PrivateServer | None = None
        if config.cluster_address:
            names = NamesInterceptor(names_of(config.cluster_names), "checkpoint.cluster_names")
            first = [*self._rpc.first, names]
            self._cluster = PrivateServer(
                config, first, certificates, ring=self._rpc.ring, ends_stalls=True
            )
            add_CheckpointServiceServicer_to_server(servicer, self._cluster.grpc_server)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def port(self) -> int:
        """The port it listens on, after `start`."""
        return self._rpc.port

    async def start(self) -> None:
        """Bind and serve."""
        config = self._config
        if self._cluster is not None:
            await self._cluster.start(
                config.cluster_address, "the cluster's servers call", config.cluster_port_file
            )
        await self._rpc.start()
        await self._rpc.set_serving(True)
        self._tasks = [
            asyncio.create_task(self._sweep()),
            asyncio.create_task(self._reclaim()),
            asyncio.create_task(self._watch()),
            asyncio.create_task(collect_between_calls(lambda: self._rpc.is_idle)),
        ]
        if self._keeper.shared:
            loop = asyncio.get_running_loop()
            # Who waits for a store takes no processor, and must not keep others from asking it.
            loop.set_default_executor(ThreadPoolExecutor(STORE_THREADS, "store"))
            tell = self._watchers.tell_all
            self._keeper.catalogue.told.append(
                lambda news: loop.call_soon_threadsafe(tell, news.made)
            )
            self._tasks.append(asyncio.create_task(self._follow()))

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        await self._rpc.until_signal()
        await self.stop()

    async def stop(self) -> None:
        """Stop gracefully."""
        self._watchers.close()
        stopping = asyncio.create_task(self._rpc.stop())
        if self._cluster is not None:
            await self._cluster.stop(self._config.stop_grace_s)
        await stopping
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

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._config.store_follow_interval_s)
            with contextlib.suppress(TinsmithError):  # `_watch` says it
                await asyncio.to_thread(self._keeper.catalogue.refresh)

    async def _try(self, sweep: Callable[[], None]) -> float | None:
        """Returns the processor time that it took, seconds; None where it failed."""
        try:
            return await asyncio.to_thread(_processor_time, sweep)
        except (OSError, TinsmithError) as error:
            self._counts.sweeps_failed += 1
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
                reason = whole(error)
            if serving == bool(reason):
                serving = not reason
                _log.warning("reads: %s", reason or "possible again")
                await self._rpc.set_serving(serving)


def _processor_time(work: Callable[[], None]) -> float:
    began_s = time.thread_time()
    work()
    return time.thread_time() - began_s
