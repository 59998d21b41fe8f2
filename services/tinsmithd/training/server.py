"""Puts the Training server together: its rooms, its faces, the link to the ranks, the launcher."""

import asyncio
import contextlib
from pathlib import Path

from tinsmith.internal.v1.trainer_link_service_pb2_grpc import (
    add_TrainerLinkServiceServicer_to_server,
)
from tinsmith.v1.training_service_pb2 import DESCRIPTOR
from tinsmith.v1.training_service_pb2_grpc import add_TrainingServiceServicer_to_server
from tinsmithd.checkpoint_client import CheckpointClient, Patience
from tinsmithd.config import TrainingConfig, limits_from
from tinsmithd.errors import TinsmithError
from tinsmithd.files import SNAPSHOTS_FOLDER
from tinsmithd.processes import collect_between_calls
from tinsmithd.rpc import link_secret
from tinsmithd.rpc.auth import ClusterKey
from tinsmithd.rpc.collectors import DiskCollector
from tinsmithd.rpc.private import NamesInterceptor, PrivateServer, SecretInterceptor
from tinsmithd.rpc.server import RpcServer
from tinsmithd.tenants import TenantCounter
from tinsmithd.tls import names_of, of_cluster
from tinsmithd.training.journal import Journal, NoJournal, SqliteStore
from tinsmithd.training.lane import LaneLimits
from tinsmithd.training.metrics import TrainingCollector
from tinsmithd.training.models import (
    CallLimits,
    Checkpoints,
    Copies,
    Deposits,
    DiskSnapshotStore,
    DiskStaging,
    ModelLimits,
    Models,
    QuotaLimits,
    Releases,
    SeatLimits,
    SnapshotRule,
    SnapshotStore,
    check_snapshots,
)
from tinsmithd.training.ranks.launcher import Launcher
from tinsmithd.training.ranks.link import TrainerLinkServicer
from tinsmithd.training.servicer import TrainingServicer

SERVICE_NAME: str = DESCRIPTOR.services_by_name["TrainingService"].full_name
WATCH_INTERVAL_S = 0.2
IDLE_SWEEP_INTERVAL_S = 60.0
CALLS_SHARE_OF_GRACE = 0.8
"""Share of `stop_grace_s` for calls under way. In the rest, who still waits is told: after it gRPC
cuts what is open."""
RECOVERY_NAME = f"{SERVICE_NAME}/recovery"
"""A name in health: SERVING while the ranks have all models, NOT_SERVING while some come back."""


def _storage(config: TrainingConfig) -> tuple[Journal, SnapshotStore | None]:
    if config.durability == "none":
        return NoJournal(), None
    folder = Path(config.data_folder)
    store = SqliteStore(folder, sync=config.durability == "fsync")
    return Journal(store), DiskSnapshotStore(folder / SNAPSHOTS_FOLDER)


def limits_of(config: TrainingConfig) -> ModelLimits:
    """The bounds on models and calls that the settings say."""
    return limits_from(
        ModelLimits,
        config,
        seats=limits_from(SeatLimits, config),
        lane=limits_from(LaneLimits, config),
        quotas=limits_from(QuotaLimits, config),
        calls=limits_from(
            CallLimits,
            config,
            snapshots=SnapshotRule(config.snapshot_steps, config.snapshot_interval_s),
            exact_replay=config.replay_check == "exact",
        ),
    )


class TrainingServer:
    """The Training server: construct, `await start()`, `await run()` or `await stop()`.

    Attributes:
        port: The port it listens on, after `start`.

    Raises:
        ConfigError: A file of keys cannot be used.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        patience = Patience(config.checkpoint_answer_s_max, config.checkpoint_stall_s_max)
        self._certificates = of_cluster(config)
        key = ClusterKey(config.cluster_key_file, "training.cluster_key_file")
        self._client = CheckpointClient(
            config.checkpoint_target, patience, key, certificates=self._certificates
        )
        staging = DiskStaging(Path(config.data_folder) / "staged", config.staged_bytes_max)
        folder = config.checkpoint_folder
        deposits = Deposits(Path(folder).absolute() if folder else None)
        copies = Copies(config.state_copies_max)
        checkpoints = Checkpoints(self._client, staging, copies, deposits)
        self._journal, snapshots = _storage(config)
        self._models = Models(limits_of(config), checkpoints, self._journal, snapshots)
        self._releases = Releases(self._client, self._models.exists)
        self._models.on_deleted(self._releases.deleted)
        self._rpc = RpcServer(config, SERVICE_NAME, (RECOVERY_NAME,), self._certificates)
        self._measure()
        add_TrainingServiceServicer_to_server(
            TrainingServicer(config, self._models), self._rpc.grpc_server
        )
        self._link = TrainerLinkServicer(
            self._models.place, lambda: self._journal.epoch, config.rank_lease_s
        )
        self._link_server: PrivateServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def _measure(self) -> None:
        """Let metrics say how everything is."""
        config, metrics = self._config, self._rpc.metrics
        self._models.place.counts.of_tenants = TenantCounter(metrics.tenants)
        metrics.registry.register(
            TrainingCollector(self._models, self._journal, metrics.tenants, config.peak_flops)
        )
        if self._journal.keeps:
            metrics.registry.register(DiskCollector(Path(config.data_folder)))

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._rpc.port

    @property
    def link_port(self) -> int:
        """The port where ranks attach."""
        return 0 if self._link_server is None else self._link_server.port

    async def start(self) -> None:
        """Read the journal, bind, serve, and start the ranks if this server has to.

        Raises:
            StoreDamaged: Nobody can use the journal.
            FormatUnknown: A later release wrote the journal or the snapshots.
            Fenced: Another Training server has taken over.
            ConfigError: The secret of the rank link is not one.
            OSError: An address is not free.
        """
        if self._config.link_secret_file:  # refuse a wrong one before claiming anything
            link_secret.read(self._config.link_secret_file, link_secret.SERVER_KEY)
        if self._journal.keeps:
            check_snapshots(Path(self._config.data_folder) / SNAPSHOTS_FOLDER)
        contents = await self._journal.open()
        # A Training server that this one replaced may still run: it can write neither the journal
        # nor checkpoints any more.
        self._client.writer_name = contents.cluster_id
        self._client.writer_epoch = contents.epoch
        await self._models.recall(
            *(contents.models, contents.deleted, contents.starts, contents.used_ids)
        )
        # If this process was stopped meanwhile, another one may own what it read.
        with contextlib.suppress(TinsmithError):  # reading works on a full disk, too
            await self._journal.commit()
        secret_file = await self._start_link()
        try:
            await self._rpc.start()
        except OSError:  # such as a port that is taken
            if self._link_server is not None:
                await self._link_server.stop()
            raise
        self._tasks = [
            asyncio.create_task(self._watch()),
            asyncio.create_task(self._sweep()),
            asyncio.create_task(self._releases.run()),
            asyncio.create_task(self._link.watch()),
            asyncio.create_task(self._journal.failed()),
            asyncio.create_task(
                collect_between_calls(lambda: not self._models.counts.pending_calls)
            ),
        ]
        if self._config.spawn_ranks:
            host = self._config.link_bind_address.rpartition(":")[0]
            if host in ("", "0.0.0.0", "[::]"):
                host = "127.0.0.1"
            address = f"{host}:{self.link_port}"
            launcher = Launcher(self._config, address, secret_file)
            self._link.starter = launcher
            self._tasks.append(asyncio.create_task(launcher.run()))

    async def _start_link(self) -> Path:
        """Let ranks attach; returns the file with the secret that they must show."""
        config = self._config
        file = Path(config.link_secret_file or link_secret.made_in(Path(config.data_folder)))
        names = NamesInterceptor(names_of(config.cluster_names), "training.cluster_names")
        secret = SecretInterceptor(link_secret.read(file, link_secret.SERVER_KEY))
        # Without a certificate of its own this server has nothing to speak TLS with.
        shown = self._certificates if config.cluster_tls_certificate_file else None
        self._link_server = PrivateServer(config, [secret, names], shown)
        add_TrainerLinkServiceServicer_to_server(self._link, self._link_server.grpc_server)
        await self._link_server.start(
            config.link_bind_address, "ranks attach", config.link_port_file
        )
        return file

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            LaunchError: The ranks cannot start.
            Fenced: Another Training server has taken over.
        """
        serving = asyncio.create_task(self._rpc.until_signal())
        done, _ = await asyncio.wait([serving, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        await self.stop()
        for task in done:
            task.result()

    async def stop(self) -> None:
        """Stop gracefully; returns when all calls and the ranks ended."""
        stopping = asyncio.create_task(self._rpc.stop())
        grace_s = 0.0 if self._journal.fenced.is_set() else self._config.stop_grace_s
        await self._models.stop(CALLS_SHARE_OF_GRACE * grace_s)
        # Only now: calls under way need the ranks, and the ranks' stream is a call that never ends.
        self._link.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await stopping
        if self._link_server is not None:
            await self._link_server.stop()
        await self._journal.close()
        await self._client.close()

    async def _watch(self) -> None:
        """Let health say what is true."""
        while True:
            await self._rpc.set_serving(self._models.ready)
            await self._rpc.set_serving(self._models.recovering == 0, RECOVERY_NAME)
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(IDLE_SWEEP_INTERVAL_S)
            await self._models.delete_idle()
