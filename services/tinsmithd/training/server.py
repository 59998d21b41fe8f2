"""Puts the Training server together: rules, faces, the link to the ranks, and their launcher."""

import asyncio
import contextlib
import logging

from tinsmith.internal.v1.trainer_link_service_pb2_grpc import (
    add_TrainerLinkServiceServicer_to_server,
)
from tinsmith.v1.training_service_pb2 import DESCRIPTOR
from tinsmith.v1.training_service_pb2_grpc import add_TrainingServiceServicer_to_server
from tinsmithd.config import TrainingConfig
from tinsmithd.rpc.server import RpcServer
from tinsmithd.training.checkpoints import CheckpointClient
from tinsmithd.training.launcher import Launcher
from tinsmithd.training.link import TrainerLinkServicer
from tinsmithd.training.models import ModelLimits, Models
from tinsmithd.training.scheduler import LaneLimits
from tinsmithd.training.servicer import TrainingServicer

SERVICE_NAME: str = DESCRIPTOR.services_by_name["TrainingService"].full_name
WATCH_INTERVAL_S = 0.2
IDLE_SWEEP_INTERVAL_S = 60.0
_log = logging.getLogger(__name__)


class TrainingServer:
    """The Training server: construct, `await start()`, `await run()` or `await stop()`.

    Attributes:
        port: The port it listens on, after `start`.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._checkpoints = CheckpointClient(config.checkpoint_target)
        limits = ModelLimits(
            models_max=config.models_max,
            data_per_call_max=config.data_per_call_max,
            targets_per_position_max=config.targets_per_position_max,
            ephemeral_ttl_s=config.ephemeral_ttl_s,
            model_idle_ttl_s=config.model_idle_ttl_s,
            quantum_tokens=config.quantum_tokens,
            lane=LaneLimits(
                lane_calls_max=config.lane_calls_max,
                lane_bytes_max=config.lane_bytes_max,
                gap_wait_s_max=config.gap_wait_s_max,
                answers_kept_max=config.answers_kept_max,
                answer_bytes_kept_max=config.answer_bytes_kept_max,
            ),
        )
        self._models = Models(limits, self._checkpoints)
        self._rpc = RpcServer(config, SERVICE_NAME)
        add_TrainingServiceServicer_to_server(
            TrainingServicer(config, self._models), self._rpc.grpc_server
        )
        self._link = TrainerLinkServicer(self._models)
        add_TrainerLinkServiceServicer_to_server(self._link, self._rpc.grpc_server)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._rpc.port

    async def start(self) -> None:
        """Bind, serve, and start the ranks where this server is to do that."""
        await self._rpc.start()
        self._tasks = [
            asyncio.create_task(self._watch_trainer()),
            asyncio.create_task(self._sweep()),
        ]
        if self._config.spawn_ranks:
            self._tasks.append(asyncio.create_task(Launcher(self._config, self.port).run()))

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            LaunchError: The ranks cannot start.
        """
        serving = asyncio.create_task(self._rpc.until_signal())
        done, _ = await asyncio.wait([serving, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        await self.stop()
        for task in done:
            task.result()

    async def stop(self) -> None:
        """Stop gracefully; returns when all calls and the ranks ended."""
        stopping = asyncio.create_task(self._rpc.stop())
        await self._models.drained(self._config.stop_grace_s)
        # Only now: calls under way needed the ranks, and their stream is a call that never ends.
        self._link.close()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        await stopping
        await self._checkpoints.close()

    async def _watch_trainer(self) -> None:
        serving = False
        while True:
            if serving != self._models.ready:
                serving = self._models.ready
                await self._rpc.set_serving(serving)
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(IDLE_SWEEP_INTERVAL_S)
            await self._models.delete_idle()
