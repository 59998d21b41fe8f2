"""What a base model takes of the ranks, said from its `config.json` alone: formulas, no torch.

They describe the engine as it is; `tests/conformance/test_sizes.py` holds each to what the engine
really has in memory.
"""

from tinsmithd.sizes.activations import Activations, activations, spread_bytes
from tinsmithd.sizes.architecture import Architecture, Unreadable, read_architecture
from tinsmithd.sizes.plan import Layout, Machine, Plan, Wanted, make_plan
from tinsmithd.sizes.ranks import RankBytes, rank_bytes
from tinsmithd.sizes.weights import adapter_weights, base_weights, element_count

__all__ = [
    "Activations",
    "Architecture",
    "Layout",
    "Machine",
    "Plan",
    "RankBytes",
    "Unreadable",
    "Wanted",
    "activations",
    "adapter_weights",
    "base_weights",
    "element_count",
    "make_plan",
    "rank_bytes",
    "read_architecture",
    "spread_bytes",
]
