"""What this engine is told, without vLLM."""

from dataclasses import dataclass

OWNER_VARIABLE = "TINSMITH_VLLM_OWNER"
"""Tells vLLM's processes which one they belong to."""


@dataclass(frozen=True)
class VllmSettings:
    """The names are those of the settings without `vllm_`; 0 leaves it to vLLM.

    Attributes:
        dtype: "auto" is the one of the model's files.
        batch_rows_max: Maximum sequences that are computed at once.
        tensor_parallel_size: GPUs that hold the model together.
        memory_share: Share of each GPU's memory that it may take.
        context_tokens_max: Maximum tokens of a prompt and its completion; 0 is the model's own.
        kv_cache_bytes_max: Keys and values.
        rank_max: Maximum rank of an adapter.
        batch_adapters_max: Adapters of which sequences are computed at once.
        adapters_max: Adapters that vLLM keeps; what it drops it reads from disk again.
    """

    dtype: str = "auto"
    batch_rows_max: int = 0
    tensor_parallel_size: int = 0
    memory_share: float = 0
    context_tokens_max: int = 0
    kv_cache_bytes_max: int = 0
    rank_max: int = 32
    batch_adapters_max: int = 8
    adapters_max: int = 256
