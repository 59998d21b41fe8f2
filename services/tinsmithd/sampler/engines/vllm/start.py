"""Starts vLLM, in processes of its own: its settings from ours."""

import os
from typing import Any

from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from tinsmithd.modeling.weight_files import refused
from tinsmithd.sampler.engines.vllm.base import KnownBase
from tinsmithd.sampler.engines.vllm.counts import Counts
from tinsmithd.sampler.engines.vllm.settings import VllmSettings
from tinsmithd.sampler.engines.vllm.workers import WorkerExtension

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Sizes of the room for an adapter that vLLM knows."""


def start(base: KnownBase, settings: VllmSettings, counts: Counts) -> AsyncLLM:
    """Start vLLM and load a model; takes seconds to minutes.

    Args:
        base: The model; its context is that of the settings by now.
        settings: See there.
        counts: Takes what it says of its steps.

    Raises:
        NotFound: vLLM cannot compute the model here (BASE_MODEL_NOT_FOUND).
        RuntimeError: It did not start; its log says why.
    """
    if current_platform.is_cpu():
        if base.adaptable.targets.mlp_parameters:
            text = "vLLM computes experts beside adapters on GPUs alone"
            raise refused(base.info.name, text)
        # With adapters vLLM compiles nothing that matters here, and that takes it 40 s.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    chosen: dict[str, Any] = {
        "max_num_seqs": settings.batch_rows_max,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.memory_share,
        "kv_cache_memory_bytes": settings.kv_cache_bytes_max,
    }
    args = AsyncEngineArgs(
        model=base.source,
        load_format="safetensors",
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=settings.dtype,
        max_model_len=base.info.context_length + 1,
        logprobs_mode="processed_logprobs",
        max_logprobs=-1,  # callers are bounded elsewhere
        enable_lora=True,
        max_lora_rank=min(rank for rank in RANKS if rank >= settings.rank_max),
        lora_target_modules=base.adaptable.modules,
        max_loras=settings.batch_adapters_max,
        max_cpu_loras=max(settings.adapters_max, settings.batch_adapters_max),
        enable_log_requests=False,
        disable_log_stats=True,
        worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
        **{name: value for name, value in chosen.items() if value},
    )
    return AsyncLLM.from_engine_args(args, stat_loggers=[counts])


def is_batch_invariant() -> bool:
    """Whether vLLM's own mode for that is on, which it has for GPUs."""
    return bool(envs.VLLM_BATCH_INVARIANT) and not current_platform.is_cpu()
