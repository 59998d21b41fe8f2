"""Several sequences in one forward without padding.

Their tokens stand one after the other in a batch of one; every linear layer sees them all at once,
positions start anew with each sequence, and attention stays inside each. `segment_lengths` reaches
the attention layers as an extra argument of the model's forward.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "tinsmith_packed"
"""Name of this attention for `set_attn_implementation`."""


def use_packed_attention(model: Any) -> None:
    """Make a model take `segment_lengths`; without them it computes as before."""
    AttentionInterface.register(ATTENTION, packed_attention)
    model.set_attn_implementation(ATTENTION)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    segment_lengths: Sequence[int] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment.

    Args:
        module: The attention layer.
        query: `(1, heads, T, head_dim)`.
        key: `(1, kv_heads, T, head_dim)`.
        value: As `key`.
        attention_mask: Must be None: there is no padding.
        scaling: Factor on the scores.
        segment_lengths: Tokens of each segment, in order, T in all; None means one segment.

    Returns:
        `(1, T, heads, head_dim)`, and no attention weights.
    """
    assert attention_mask is None
    lengths = segment_lengths or [query.shape[2]]
    # Neighbours of equal length are one batch.
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    # Split, not sliced: a slice's way back would fill a gradient of all tokens for each segment.
    tensors = (query, key, value)
    pieces = zip(*(tensor.split_with_sizes(sizes, dim=2) for tensor in tensors), strict=True)
    parts = []
    for (length, count), piece in zip(runs, pieces, strict=True):
        batch = [_unpack(tensor[0], count) for tensor in piece]
        found, _weights = sdpa_attention_forward(
            module, *batch, attention_mask=None, scaling=scaling, is_causal=True
        )
        parts.append(found.reshape(1, count * length, *found.shape[2:]))
    return torch.cat(parts, dim=1), None


def _unpack(packed: Tensor, count: int) -> Tensor:
    """`(heads, count * L, head_dim)` as `(count, heads, L, head_dim)`."""
    heads, total, head_dim = packed.shape
    return packed.reshape(heads, count, total // count, head_dim).transpose(0, 1)
