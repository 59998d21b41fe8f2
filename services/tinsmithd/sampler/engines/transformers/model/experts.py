"""Mixtures of experts: a router sends each row to a few of a layer's MLPs.

A row's result is the sum over its own experts, in the order of their numbers, so it does not depend
on where other rows are sent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.linear import (
    BLOCK_ROWS,
    Product,
    RowRule,
    Rows,
    cuts_of,
)


@dataclass(frozen=True)
class ExpertLora:
    """What one adapter adds to the experts of a layer; for row x of expert e, `s B_e A_e x`.

    Attributes:
        gate_up_a: `(experts, d, rank)`; the rank is that on experts.
        gate_up_b: `(experts, rank, 2 * ffn)`.
        down_a: `(experts, ffn, rank)`.
        down_b: `(experts, rank, d)`.
        scaling: alpha / rank, of that rank.
    """

    gate_up_a: Tensor
    gate_up_b: Tensor
    down_a: Tensor
    down_b: Tensor
    scaling: float

    @property
    def bytes(self) -> int:
        """What its weights take."""
        weights = (self.gate_up_a, self.gate_up_b, self.down_a, self.down_b)
        return sum(weight.nbytes for weight in weights)


ExpertRuns = Sequence[tuple[Tensor, ExpertLora]]
"""Which rows have which adapter on their experts: bool `(T,)`, and the adapter."""


class Experts:
    """The experts of one layer.

    Args:
        block: The module of transformers that has the layer's router and experts.
        rule: How many rows products have.
    """

    def __init__(self, block: Any, rule: RowRule) -> None:
        router, experts = block.gate, block.experts
        self._top_k: int = router.top_k
        self._normed: bool = router.norm_topk_prob
        self._rule = rule
        self._route = Product(router.weight.detach(), None)
        self._gate_up, self._down = (
            [Product(weight, None) for weight in weights.detach()]
            for weights in (experts.gate_up_proj, experts.down_proj)
        )

    def products(self) -> Iterator[Product]:
        """All products."""
        yield self._route
        yield from self._gate_up
        yield from self._down

    def __call__(self, x: Tensor, rows: Rows, runs: ExpertRuns = ()) -> Tensor:
        """Map all rows, `(T, d)`, to `(T, d)`; rows that fill up are zero."""
        scores = self._route(x, rows)[: rows.count]
        chances, chosen = scores.softmax(-1, dtype=torch.float32).topk(self._top_k, dim=-1)
        if self._normed:
            chances /= chances.sum(-1, keepdim=True)
        chances = chances.to(x.dtype)
        out = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            own, places = (chosen == expert).nonzero(as_tuple=True)
            made = self._one(expert, x, own, runs)
            made.mul_(chances[own, places, None])
            out.index_add_(0, own, made)
        return out

    def _one(self, expert: int, x: Tensor, own: Tensor, runs: ExpertRuns) -> Tensor:
        """What an expert makes of its own rows, of sequences and of prompts: `(len(own), d)`."""
        rows = Rows(self._rule, len(own), len(own))
        index = rows.filled(own)
        x = x[index]
        both = self._gate_up[expert](x, rows)
        here = [(mask[index].nonzero()[:, 0], lora) for mask, lora in runs]
        for at, lora in here:
            factors = (lora.gate_up_a[expert], lora.gate_up_b[expert])
            add_lora(both, x, at, *factors, lora.scaling)
        gate, up = both.chunk(2, 1)
        inner = F.silu(gate).mul_(up)
        made = self._down[expert](inner, rows)
        for at, lora in here:
            add_lora(made, inner, at, lora.down_a[expert], lora.down_b[expert], lora.scaling)
        return made[: rows.count]


def add_lora(y: Tensor, x: Tensor, at: Tensor, a: Tensor, b: Tensor, s: float) -> None:
    """Add `s x A B` to the rows `at` of y.

    Products of weights of any shape may depend on how many rows they have, so all have as many.
    """
    for start, read, kept in cuts_of(len(at), (BLOCK_ROWS,)):
        own = at[start : start + kept]
        index = F.pad(own, (0, read - kept), value=int(own[-1]))
        update = y[index].addmm_(torch.mm(x[index], a), b, alpha=s)
        y.index_copy_(0, own, update[:kept])
