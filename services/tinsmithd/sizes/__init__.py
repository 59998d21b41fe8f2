"""What a base model takes of the ranks, said from its `config.json` alone: formulas, no torch.

They describe the engine as it is; `tests/conformance/test_sizes.py` holds each to what the engine
really has in memory.
"""

from tinsmithd.sizes.activations import Activations, activations, spread_bytes
from tinsmithd.sizes.architecture import (
    Architecture,
    Unreadable,
    architecture_of,
    read_architecture,
)
from tinsmithd.sizes.plan import Layout, Machine, Plan, Wanted, make_plan
from tinsmithd.sizes.ranks import RankBytes, rank_bytes
from tinsmithd.sizes.weights import adapter_weights, base_weights, element_count
from tinsmithd.sizes.work import NO_WORK, Work, peak_flops

__all__ = [
    "NO_WORK",
    "Activations",
    "Architecture",
    "Layout",
    "Machine",
    "Plan",
    "RankBytes",
    "Unreadable",
    "Wanted",
    "Work",
    "activations",
    "adapter_weights",
    "architecture_of",
    "base_weights",
    "element_count",
    "make_plan",
    "peak_flops",
    "rank_bytes",
    "read_architecture",
    "spread_bytes",
]
