"""Several sequences in one forward without padding.

Their tokens stand one after the other in a batch of one. Every linear layer sees them all at once,
positions start anew with each sequence, and attention stays inside each. `segment_lengths` reaches
the attention layers as an extra argument of the model's forward. One kernel computes all segments
where the device has one (`varlen`), else each length is computed by itself. Whatever else a layer
asks of its attention happens inside each segment, or the model is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tinsmithd.modeling import varlen
from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.weight_files import refused

ATTENTION = "tinsmith_packed"
"""Name of packed attention for `set_attn_implementation`."""

WINDOW_BLOCK_TOKENS_MIN = 256
"""Minimum queries that windowed attention computes together; with wider windows, a window's."""


class SpreadOverRanks(Protocol):
    """Exchanges tokens and heads with the ranks that have the other tokens of this forward."""

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens of this rank's share of the heads."""

    def to_tokens(self, found: Tensor) -> Tensor:
        """All heads of this rank's tokens."""


class UnsupportedAttention(ValueError):
    """A layer asks something of its attention that packing does not do."""


def use_packed_attention(base: BaseModel) -> str:
    """Make a model take `segment_lengths`; without them it computes as before.

    Returns:
        Name of the kernel that computes it; empty where none does.

    Raises:
        NotFound: Its layers ask something of their attention that packing does not do
            (BASE_MODEL_NOT_FOUND).
    """
    device = next(base.model.parameters()).device
    kernel = varlen.choose(device, base.model.dtype, varlen.shape_of(base.model.config), _loop)
    AttentionInterface.register(ATTENTION, partial(packed_attention, kernel=kernel))
    base.model.set_attn_implementation(ATTENTION)
    # A forward of two data of one token each shows what the layers ask for.
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device)
    try:
        with torch.no_grad():
            base.model.model(
                input_ids=tokens, position_ids=tokens, segment_lengths=[1, 1], use_cache=False
            )
    except UnsupportedAttention as error:
        raise refused(base.info.name, f"its layers are trained with {error}") from error
    return "" if kernel is None else kernel.name


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segment_lengths: Sequence[int] | None = None,
    spread: SpreadOverRanks | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,  # the layer has applied them
    use_cache: bool = False,
    kernel: varlen.Kernel | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment.

    Args:
        module: The attention layer.
        query: `(1, heads, T, head_dim)`.
        key: `(1, kv_heads, T, head_dim)`.
        value: As `key`.
        attention_mask: Must be None: there is no padding.
        scaling: Factor on the scores.
        sliding_window: Tokens that a token sees, itself included; None lets it see all before.
        segment_lengths: Tokens of each segment, in order, T in all; None means one segment.
        spread: Where other ranks have tokens of these segments; T is then this rank's number of
            them, and `segment_lengths` are those of all ranks.
        dropout: Must be 0.
        is_causal: Must not be False.
        position_ids: Not used.
        use_cache: Must be False.
        kernel: Computes all segments at once; None computes each length by itself.
        others: All other arguments; each must be None or False.

    Returns:
        `(1, T, heads, head_dim)`, and no attention weights.

    Raises:
        UnsupportedAttention: An argument is not what it must be; the message names it.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    wrong = {name: x for name, x in others.items() if x is not None and x is not False}
    wrong |= {"attention_mask": attention_mask} if attention_mask is not None else {}
    wrong |= {"dropout": dropout} if dropout else {}
    wrong |= {"use_cache": use_cache} if use_cache else {}
    wrong |= {"is_causal": is_causal} if not is_causal else {}
    if wrong:
        raise UnsupportedAttention(f"{', '.join(sorted(wrong))}, which is not supported")
    if spread is not None:
        query, key, value = spread.to_heads(query, key, value)
    lengths = segment_lengths or [query.shape[2]]
    if kernel is None:
        found = _by_segment(query, key, value, scaling, sliding_window, lengths)
    else:
        starts = varlen.sequence_starts(tuple(lengths), query.device)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        found = kernel.compute(
            *(q, k, v, starts, max(lengths)), scale=scaling, window=sliding_window
        )[None]
    return found if spread is None else spread.to_tokens(found), None


def _loop(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None
) -> Tensor:
    """What a kernel must compute; see `varlen.Loop`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return _by_segment(q, k, v, None, window, lengths)[0]


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    lengths: Sequence[int],
) -> Tensor:
    """Attention of one segment after the other; `(1, T, heads, head_dim)`."""
    # The layer's own number would be wrong where ranks share the heads.
    heads = _Heads(query.shape[1] // key.shape[1])
    # Neighbours of equal length are one batch.
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    # Slices instead of a split would each fill a gradient of all tokens in the backward pass.
    tensors = (query, key, value)
    pieces = zip(*(tensor.split_with_sizes(sizes, dim=2) for tensor in tensors), strict=True)
    parts = []
    for (length, count), piece in zip(runs, pieces, strict=True):
        batch = [_unpack(tensor[0], count) for tensor in piece]
        if sliding_window is None or length <= sliding_window:
            found, _weights = sdpa_attention_forward(
                heads, *batch, attention_mask=None, scaling=scaling, is_causal=True
            )
        else:
            found = _within_window(heads, *batch, scaling=scaling, window=sliding_window)
        parts.append(found.reshape(1, count * length, *found.shape[2:]))
    return torch.cat(parts, dim=1)


def _within_window(
    heads: "_Heads",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int,
) -> Tensor:
    """Attention of sequences in which a token sees the `window` tokens up to itself.

    Some queries at a time meet all keys that any of them sees, so time and memory grow with tokens
    times window.
    """
    count = query.shape[2]
    size = max(window, WINDOW_BLOCK_TOKENS_MIN)
    starts = range(0, count, size)
    pieces = query.split_with_sizes([min(size, count - start) for start in starts], dim=2)
    parts = []
    for start, queries in zip(starts, pieces, strict=True):
        end, first = start + queries.shape[2], max(0, start - window + 1)
        rows = torch.arange(start, end, device=query.device)[:, None]
        columns = torch.arange(first, end, device=query.device)[None]
        mask = (columns <= rows) & (columns > rows - window)
        seen = (tensor[:, :, first:end] for tensor in (key, value))
        found, _weights = sdpa_attention_forward(
            heads, queries, *seen, attention_mask=mask[None, None], scaling=scaling
        )
        parts.append(found)
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class _Heads:
    """What transformers' attention asks of a layer."""

    num_key_value_groups: int


def _unpack(packed: Tensor, count: int) -> Tensor:
    """`(heads, count * L, head_dim)` as `(count, heads, L, head_dim)`."""
    heads, total, head_dim = packed.shape
    return packed.reshape(heads, count, total // count, head_dim).transpose(0, 1)
