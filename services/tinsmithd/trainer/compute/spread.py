"""One micro-batch on several ranks: each has a share of its tokens, in attention a share of heads.

Every layer but attention computes a token by itself, so a rank computes its own tokens. Before
attention the ranks exchange: each gets all tokens of some heads, and gives back what came of them
(Ulysses, Jacobs et al. 2023). So attention needs no other code, and a rank keeps its share of all
activations. A rank's gradients are those that go through its own tokens and heads: their sum over
the ranks is the gradient.

Symbols: `n` ranks, `T` tokens of the micro-batch, `t` of them on this rank, `D` the size of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def problem(config: Any, ranks: int) -> str:
    """Why a model's attention cannot be spread over so many ranks; empty where it can.

    A rank may hold a copy of a key head that others have too, but no part of a head.

    Args:
        config: The model's, as transformers has it.
        ranks: Their number.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % ranks:
        return f"its {heads} attention heads cannot be shared out evenly to {ranks} ranks"
    if kv_heads % ranks and ranks % kv_heads:
        return f"its {kv_heads} key/value heads cannot be shared out evenly to {ranks} ranks"
    return ""


def shares(tokens: int, ranks: int) -> list[int]:
    """Tokens of each rank: neighbours, and as many for each, but for one."""
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]


@dataclass(frozen=True)
class Spread:
    """How a micro-batch is spread over the ranks of a group, as seen by one of them.

    Attributes:
        group: The ranks; each calls the same methods in the same order.
        index: Number of this rank in the group.
        counts: Tokens of each rank of the group, none of them 0.
    """

    group: dist.ProcessGroup
    index: int
    counts: tuple[int, ...]

    @property
    def own(self) -> slice:
        """This rank's tokens."""
        start = sum(self.counts[: self.index])
        return slice(start, start + self.counts[self.index])

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens of this rank's heads.

        Args:
            query: `(1, heads, t, D)`.
            key: `(1, kv_heads, t, D)`.
            value: As `key`.

        Returns:
            `(1, heads / n, T, D)`, and twice `(1, max(kv_heads / n, 1), T, D)`.
        """
        ranks = len(self.counts)
        if copies := ranks // key.shape[1]:
            key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        per_rank = [x.shape[1] // ranks for x in (query, key, value)]
        # What goes to one rank stands together: (n, t, heads of a rank, D).
        cut = [
            x[0].unflatten(0, (ranks, count)).transpose(1, 2)
            for x, count in zip((query, key, value), per_rank, strict=True)
        ]
        sent = torch.cat(cut, dim=2).flatten(0, 1)
        received = _exchange(sent, [self.counts[self.index]] * ranks, self.counts, self.group)
        q, k, v = received.split(per_rank, dim=1)
        return tuple(x.transpose(0, 1)[None] for x in (q, k, v))  # type: ignore[return-value]

    def to_tokens(self, found: Tensor) -> Tensor:
        """All heads of this rank's tokens: `(1, T, heads / n, D)` to `(1, t, heads, D)`."""
        ranks, own = len(self.counts), self.counts[self.index]
        received = _exchange(found[0].contiguous(), self.counts, [own] * ranks, self.group)
        mine: Tensor = received.unflatten(0, (ranks, own)).transpose(0, 1).flatten(1, 2)
        return mine[None]

    @torch.no_grad()
    def whole(self, rows: Tensor) -> Tensor:
        """Rows of all tokens `(T, ...)`, of this rank's `(t, ...)`."""
        longest = max(self.counts)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(found, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(found, self.counts, strict=True)])


def _exchange(
    sent: Tensor, sent_counts: Any, received_counts: Any, group: dist.ProcessGroup
) -> Tensor:
    apply: Any = _Exchange.apply
    received: Tensor = apply(sent, list(sent_counts), list(received_counts), group)
    return received


class _Exchange(torch.autograd.Function):
    """Each rank gives each rank some rows; gradients go the same way back."""

    @staticmethod
    def forward(
        ctx: Any,
        sent: Tensor,
        sent_counts: list[int],
        received_counts: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.way_back = received_counts, sent_counts, group
        return _all_to_all(sent, sent_counts, received_counts, group)

    @staticmethod
    def backward(  # type: ignore[override]  # torch types it for any number of gradients
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad.contiguous(), *ctx.way_back), None, None, None


def _all_to_all(
    sent: Tensor, sent_counts: list[int], received_counts: list[int], group: dist.ProcessGroup
) -> Tensor:
    received = sent.new_empty((sum(received_counts), *sent.shape[1:]))
    dist.all_to_all_single(received, sent, received_counts, sent_counts, group=group)
    return received
