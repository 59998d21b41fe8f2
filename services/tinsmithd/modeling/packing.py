"""Several sequences in one forward without padding.

Their tokens stand one after the other in a batch of one. Every linear layer sees them all at once,
positions start anew with each sequence, and attention stays inside each. A sequence may go on where
others end (`segment_contexts`): its tokens see theirs, too. Both reach the attention layers as
extra arguments of the model's forward. One kernel computes all segments where the device has one
(`varlen`), else each length is computed by itself. Whatever else a layer asks of its attention
happens inside each segment, or the model is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tinsmithd.modeling import in_context, varlen
from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.weight_files import refused

ATTENTION = "tinsmith_packed"
"""Name of packed attention for `set_attn_implementation`."""

WINDOW_BLOCK_TOKENS_MIN = 256
"""Minimum queries that windowed attention computes together; with wider windows, a window's."""

CONTEXT_BLOCK_TOKENS = 1024
"""Queries that attention in a context computes together."""


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
    segment_contexts: varlen.Contexts | None = None,
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
        segment_contexts: For each segment the numbers of those that stand before its tokens, the
            first of them first, all of smaller numbers; None means none has any.
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
    contexts = segment_contexts or [()] * len(lengths)
    if kernel is None or (any(contexts) and not kernel.in_contexts):
        found = _by_segment(query, key, value, scaling, sliding_window, lengths, contexts)
    else:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        found = varlen.attend(kernel, q, k, v, lengths, contexts, scaling, sliding_window)[None]
    return found if spread is None else spread.to_tokens(found), None


def _loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    contexts: varlen.Contexts,
    window: int | None,
) -> Tensor:
    """What a kernel must compute; see `varlen.Loop`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return _by_segment(q, k, v, None, window, lengths, contexts)[0]


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    lengths: Sequence[int],
    contexts: varlen.Contexts,
) -> Tensor:
    """Attention of one segment after the other; `(1, T, heads, head_dim)`."""
    # The layer's own number would be wrong where ranks share the heads.
    heads = _Heads(query.shape[1] // key.shape[1])
    # Neighbours of equal length in the same context are one batch.
    alike = groupby(zip(lengths, contexts, strict=True))
    runs = [(length, context, len(list(run))) for (length, context), run in alike]
    sizes = [length * count for length, _, count in runs]
    # Slices instead of a split would each fill a gradient of all tokens in the backward pass.
    tensors = (query, key, value)
    pieces = zip(*(tensor.split_with_sizes(sizes, dim=2) for tensor in tensors), strict=True)
    parts = []
    has_contexts = any(contexts)
    seen: list[tuple[Tensor, Tensor]] = []
    """Keys and values of each segment so far, each a batch of one."""
    for (length, context, count), piece in zip(runs, pieces, strict=True):
        q, k, v = (_unpack(tensor[0], count) for tensor in piece)
        if has_contexts:
            seen.extend(zip(k.split(1), v.split(1), strict=True))
        above = [seen[number] for number in context]
        if sliding_window is None and in_context.serves(q, above):
            found = in_context.attend(q, k, v, above, scaling)
            parts.append(found.reshape(1, count * length, *found.shape[2:]))
            continue
        if above:
            k, v = (
                _after(some, own)
                for some, own in zip(zip(*above, strict=True), (k, v), strict=True)
            )
        if not context and (sliding_window is None or length <= sliding_window):
            found, _weights = sdpa_attention_forward(
                *(heads, q, k, v), attention_mask=None, scaling=scaling, is_causal=True
            )
        else:
            found = _masked(heads, q, k, v, scaling=scaling, window=sliding_window)
        parts.append(found.reshape(1, count * length, *found.shape[2:]))
    return torch.cat(parts, dim=1)


def _after(above: Sequence[Tensor], own: Tensor) -> Tensor:
    """Keys or values of some segments, each `(1, kv_heads, L, head_dim)`, in front of those of
    each of a batch."""
    return torch.cat([*(part.expand(len(own), -1, -1, -1) for part in above), own], dim=2)


def _masked(
    heads: "_Heads",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention of sequences in which a token sees the `window` tokens up to itself, or all.

    There may be more keys than queries: the queries are those of the last tokens. Some queries at a
    time meet all keys that any of them sees, so time and memory grow with tokens times window.
    """
    count, before = query.shape[2], key.shape[2] - query.shape[2]
    size = CONTEXT_BLOCK_TOKENS if window is None else max(window, WINDOW_BLOCK_TOKENS_MIN)
    starts = range(0, count, size)
    pieces = query.split_with_sizes([min(size, count - start) for start in starts], dim=2)
    parts = []
    for start, queries in zip(starts, pieces, strict=True):
        row, end = before + start, before + start + queries.shape[2]
        first = 0 if window is None else max(0, row - window + 1)
        rows = torch.arange(row, end, device=query.device)[:, None]
        columns = torch.arange(first, end, device=query.device)[None]
        mask = columns <= rows
        if window is not None:
            mask &= columns > rows - window
        seen = (tensor[:, :, first:end] for tensor in (key, value))
        if before:
            groups = heads.num_key_value_groups
            parts.append(_folded(queries, *seen, mask=mask, groups=groups, scaling=scaling))
            continue
        found, _weights = sdpa_attention_forward(
            heads, queries, *seen, attention_mask=mask[None, None], scaling=scaling
        )
        parts.append(found)
    return torch.cat(parts, dim=1)


def _folded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor,
    groups: int,
    scaling: float | None,
) -> Tensor:
    """Masked attention in which the heads of a key head are rows: no key is copied for each."""
    batch, heads, count, head_dim = query.shape
    rows = query.reshape(batch, heads // groups, groups * count, head_dim)
    found = functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=mask.repeat(groups, 1)[None, None], scale=scaling
    )
    return found.reshape(batch, heads, count, head_dim).transpose(1, 2)


@dataclass(frozen=True)
class _Heads:
    """What transformers' attention asks of a layer."""

    num_key_value_groups: int


def _unpack(packed: Tensor, count: int) -> Tensor:
    """`(heads, count * L, head_dim)` as `(count, heads, L, head_dim)`."""
    heads, total, head_dim = packed.shape
    return packed.reshape(heads, count, total // count, head_dim).transpose(0, 1)
