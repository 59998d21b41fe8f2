"""Puts the Checkpoint server together."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from tinsmith.v1.checkpoint_service_pb2 import DESCRIPTOR
from tinsmith.v1.checkpoint_service_pb2_grpc import add_CheckpointServiceServicer_to_server
from tinsmithd.checkpoint.keeper import Keeper
from tinsmithd.checkpoint.servicer import CheckpointServicer
from tinsmithd.config import CheckpointConfig
from tinsmithd.rpc.server import RpcServer

SERVICE_NAME: str = DESCRIPTOR.services_by_name["CheckpointService"].full_name
_log = logging.getLogger(__name__)


class CheckpointServer:
    """The Checkpoint server: construct, `await start()`, `await run()` or `await stop()`.

    Raises:
        StoreBusy: Another server has the data folder.
    """

    def __init__(self, config: CheckpointConfig, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        folder = Path(config.data_folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._keeper = Keeper(folder, checkpoint_bytes_max=config.checkpoint_bytes_max, clock=clock)
        self._rpc = RpcServer(config, SERVICE_NAME)
        servicer = CheckpointServicer(self._keeper)
        add_CheckpointServiceServicer_to_server(servicer, self._rpc.grpc_server)
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port it listens on, after `start`."""
        return self._rpc.port

    async def start(self) -> None:
        """Bind and serve."""
        await self._rpc.start()
        await self._rpc.set_serving(True)
        self._sweeper = asyncio.create_task(self._sweep())

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        await self._rpc.until_signal()
        await self.stop()

    async def stop(self) -> None:
        """Stop gracefully."""
        await self._rpc.stop()
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        self._keeper.close()

    async def _sweep(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._keeper.sweep)
            except OSError:
                _log.exception("the sweep failed and is tried again later")
            await asyncio.sleep(self._config.sweep_interval_s)
