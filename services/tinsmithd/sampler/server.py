"""Puts the Sampler together: it serves at once, and says so when the base model is loaded."""

import asyncio
import contextlib
import logging
from pathlib import Path

from tinsmith.v1.sampler_service_pb2 import DESCRIPTOR
from tinsmith.v1.sampler_service_pb2_grpc import add_SamplerServiceServicer_to_server
from tinsmithd.checkpoint_client import CheckpointClient, LocalFiles, Patience
from tinsmithd.config import ConfigError, SamplerConfig, limits_from
from tinsmithd.processes import collect_between_calls
from tinsmithd.rpc.auth import ClusterKey
from tinsmithd.rpc.server import RpcServer
from tinsmithd.sampler.adapters import Adapters
from tinsmithd.sampler.admission import Admission
from tinsmithd.sampler.ahead import Ahead
from tinsmithd.sampler.engines.interface import SamplingEngine
from tinsmithd.sampler.metrics import Room, SamplerCollector
from tinsmithd.sampler.places import PlaceLimits
from tinsmithd.sampler.servicer import SamplerServicer
from tinsmithd.tls import of_cluster

SERVICE_NAME: str = DESCRIPTOR.services_by_name["SamplerService"].full_name
_log = logging.getLogger(__name__)


def load_engine(config: SamplerConfig) -> SamplingEngine:
    """Load the base model; takes seconds to minutes and imports torch.

    Raises:
        NotFound: There is no such model (BASE_MODEL_NOT_FOUND).
        ConfigError: The engine that is asked for is not installed.
    """
    return _load_vllm(config) if config.engine == "vllm" else _load_transformers(config)


def _load_vllm(config: SamplerConfig) -> SamplingEngine:
    from tinsmithd.sampler.engines.vllm.opening import VllmSettings, is_installed, open_engine

    if not is_installed():
        message = "sampler.engine: vllm is not installed; pip install 'tinsmith[vllm]'"
        raise ConfigError(message)
    settings = VllmSettings(
        dtype=config.dtype,
        batch_rows_max=config.batch_rows_max,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        memory_share=config.vllm_memory_share,
        context_tokens_max=config.vllm_context_tokens_max,
        kv_cache_bytes_max=config.vllm_kv_cache_bytes_max,
        rank_max=config.vllm_rank_max,
        batch_adapters_max=config.vllm_batch_adapters_max,
        adapters_max=config.adapters_max,
    )
    return open_engine(config.base_model, settings)


def _load_transformers(config: SamplerConfig) -> SamplingEngine:
    import torch

    from tinsmithd.modeling.base import load_base
    from tinsmithd.sampler.engines.transformers.dtype import resolved_dtype
    from tinsmithd.sampler.engines.transformers.engine import EngineLimits, TransformersEngine

    if config.threads:
        torch.set_num_threads(config.threads)
    dtype = resolved_dtype(
        config.dtype, compiled=lambda: _is_compiled(config), on_progress=_log.info
    )
    base = load_base(config.base_model, dtype=dtype, on_progress=_log.info)
    limits = EngineLimits(
        kv_cache_bytes_max=config.kv_cache_bytes_max,
        prefix_cache_bytes_max=config.prefix_cache_bytes_max,
        prefill_tokens_per_step_max=config.prefill_tokens_per_step_max,
        batch_rows_max=max(config.batch_rows_max, config.num_samples_max),
        keep_rows_apart=config.batch_invariance,
        native=config.native,
        native_folder=config.native_folder,
    )
    return TransformersEngine(base, limits)


def _is_compiled(config: SamplerConfig) -> bool:
    """Whether compiled kernels would compute a model in float32: one without experts.

    Raises:
        NotFound: As `load_base`.
    """
    from tinsmithd.modeling.base import read_config
    from tinsmithd.sampler.engines.transformers.native import can_be_had

    if config.native == "never" or not can_be_had(config.native_folder):
        return False
    return not getattr(read_config(config.base_model), "num_experts", 0)


class SamplerServer:
    """The Sampler: construct, `await start()`, `await run()` or `await stop()`."""

    def __init__(self, config: SamplerConfig) -> None:
        self._config = config
        patience = Patience(config.checkpoint_answer_s_max, config.checkpoint_stall_s_max)
        key = ClusterKey(config.cluster_key_file, "sampler.cluster_key_file")
        certificates = of_cluster(config)
        client = CheckpointClient(
            config.checkpoint_target, patience, key, certificates=certificates
        )
        folder = config.checkpoint_folder
        self._adapters = Adapters(
            client,
            config.checkpoint_recheck_s,
            rank_max=config.rank_max,
            adapter_bytes_max=config.adapter_bytes_max,
            local=LocalFiles(Path(folder)) if folder else None,
        )
        self._ahead: Ahead | None = None
        self._servicer = SamplerServicer(config, self._adapters)
        self._rpc = RpcServer(config, SERVICE_NAME, cluster=certificates)
        add_SamplerServiceServicer_to_server(self._servicer, self._rpc.grpc_server)
        self._loading: asyncio.Task[None] | None = None
        self._failing: asyncio.Task[None] | None = None
        self._collecting: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port it listens on, after `start`."""
        return self._rpc.port

    async def start(self) -> None:
        """Bind, serve, and begin to load."""
        await self._rpc.start()
        self._loading = asyncio.create_task(self._load())

    async def loaded(self) -> None:
        """Wait until calls succeed.

        Raises:
            NotFound: There is no such base model.
        """
        assert self._loading is not None
        await self._loading

    async def _load(self) -> None:
        engine = await asyncio.to_thread(load_engine, self._config)
        config = self._config
        limits = PlaceLimits(
            config.running_max,
            config.waiting_max,
            config.batch_rows_max,
            tokens_max=engine.stats().kv_tokens_max,
        )
        admission = self._servicer.admission = Admission(
            engine,
            limits,
            adapters_max=config.adapters_max,
            adapters_bytes_max=config.adapters_bytes_max,
            fetches_max=config.fetches_max,
            tenants=self._rpc.metrics.tenants,
        )
        self._ahead = Ahead(
            self._adapters,
            admission.loaded,
            engine.info.name,
            config.ahead_bytes_max,
        )
        self._ahead.start()
        self._failing = asyncio.create_task(engine.failed())
        # After half a million objects of torch, which stay.
        self._collecting = asyncio.create_task(collect_between_calls(lambda: admission.idle))
        room = limits_from(Room, config)
        self._rpc.metrics.registry.register(SamplerCollector(admission, room))
        await self._rpc.set_serving(True)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            NotFound: There is no such base model.
            ConfigError: The engine is not installed.
            Exception: What the engine failed of. It is not in a known state then, so the process
                ends, and whoever keeps it running starts another one.
        """
        serving = asyncio.create_task(self._rpc.until_signal())
        working = asyncio.create_task(self._work())
        await asyncio.wait([serving, working], return_when=asyncio.FIRST_COMPLETED)
        await self.stop()
        if working.done() and not working.cancelled():
            working.result()

    async def _work(self) -> None:
        """Load, and then wait until the engine fails."""
        await self.loaded()
        assert self._failing is not None
        await self._failing

    async def stop(self) -> None:
        """Stop gracefully."""
        await self._rpc.stop()
        for task in (self._loading, self._failing, self._collecting):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        if self._ahead is not None:
            await self._ahead.close()
        if self._servicer.admission is not None:
            await self._servicer.admission.close()
        await self._adapters.close()
