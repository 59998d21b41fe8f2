"""Caches of keys and values, and attention over them: no weights, no scheduling."""

from tinsmithd.sampler.engines.transformers.kv.arenas import Arena
from tinsmithd.sampler.engines.transformers.kv.cache import KvCache
from tinsmithd.sampler.engines.transformers.kv.parts import (
    KvStats,
    Prompt,
    Reservation,
    SequenceKv,
)
from tinsmithd.sampler.engines.transformers.kv.step import StepAttention

__all__ = ["Arena", "KvCache", "KvStats", "Prompt", "Reservation", "SequenceKv", "StepAttention"]
