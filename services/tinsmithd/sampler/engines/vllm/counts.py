"""What vLLM says of its steps, added up."""

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from tinsmithd.sampler.engines.interface import EngineStats


class Counts(StatLoggerBase):
    """Adds up; vLLM makes it by calling it, and calls it once for each answer of its core."""

    def __init__(self) -> None:
        self._running = self._waiting = 0
        self._kv_share = 0.0
        self._kv_tokens_max = 0
        self._steps = self._rows = 0
        self._asked_tokens = self._cached_tokens = self._sampled_tokens = 0

    def __call__(self, vllm_config: Any, engine_index: int) -> "Counts":
        """Stand where vLLM would have made a new one."""
        return self

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take what vLLM says after a step."""
        if scheduler_stats is not None:
            self._running = scheduler_stats.num_running_reqs
            self._waiting = scheduler_stats.num_waiting_reqs
            self._kv_share = scheduler_stats.kv_cache_usage
            self._asked_tokens += scheduler_stats.prefix_cache_stats.queries
            self._cached_tokens += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self._steps += 1
            self._rows += iteration_stats.num_generation_tokens
            self._sampled_tokens += iteration_stats.num_generation_tokens

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def has_room_for(self, kv_tokens_max: int) -> None:
        """Take how many tokens' keys and values there is room for."""
        self._kv_tokens_max = kv_tokens_max

    def stats(self, adapter_bytes: int) -> EngineStats:
        """All of it in our words."""
        return EngineStats(
            sequences=self._running,
            waiting=self._waiting,
            kv_tokens=round(self._kv_share * self._kv_tokens_max),
            kv_tokens_max=self._kv_tokens_max,
            adapter_bytes=adapter_bytes,
            steps=self._steps,
            step_rows=self._rows,
            prompt_tokens_computed=self._asked_tokens - self._cached_tokens,
            prompt_tokens_cached=self._cached_tokens,
            sampled_tokens=self._sampled_tokens,
        )
