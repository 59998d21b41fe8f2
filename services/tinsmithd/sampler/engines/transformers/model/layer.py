"""One layer of a decoder: its weights in the form that products need, and its arithmetic."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.experts import Experts
from tinsmithd.sampler.engines.transformers.model.linear import Product, RowRule, Rows
from tinsmithd.sampler.engines.transformers.model.lora_layout import Site
from tinsmithd.sampler.engines.transformers.model.lora_rows import LoraRows

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of one layer over what came before, with the rows' own keys and values.

Takes the layer's number, queries `(T, heads, head_dim)`, and keys and values `(T, kv_heads,
head_dim)`, which have their positions; gives `(T, heads * head_dim)`. It may keep none of them,
since they share memory with what the layer writes to next.
"""


class Norm:
    """Scales each row to a mean square of 1, and each of its elements by a weight.

    It rounds where transformers does: to the rows' dtype before the weight. On a CPU
    `rms_norm` is a dozen operations, which take twice the time of these at few rows.

    Args:
        weight: Of the last dimension, or of the last two where their rows are scaled each.
        eps: Added to the mean square.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight, self._eps = weight, eps
        self._sizes = (weight.shape[-1],)
        self._eps_1 = torch.tensor([eps]) if weight.device.type == "cpu" else None

    def __call__(self, x: Tensor) -> Tensor:
        """Map `(T, d)` to a new `(T, d)`."""
        if self._eps_1 is None:
            return F.rms_norm(x, self._sizes, None, self._eps).mul_(self._weight)
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        scale = torch.addcmul(self._eps_1, length, length, value=1 / self._sizes[0]).rsqrt_()
        return torch.mul(x, scale, out=torch.empty_like(x)).mul_(self._weight)


class Layer:
    """One layer.

    Args:
        module: The layer of transformers; its large weights are taken from it.
        index: Its number.
        rule: How many rows products of experts have.
    """

    def __init__(self, module: Any, index: int, rule: RowRule) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._index, self._head_dim = index, attention.head_dim
        queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
        heads, kv_heads = queries // self._head_dim, keys // self._head_dim
        self._sizes, self._turned = (heads, kv_heads, kv_heads), heads + kv_heads
        self._norm_1 = _norm(module.input_layernorm)
        self._norm_2 = _norm(module.post_attention_layernorm)
        self._norm_qk = _norm_qk(attention, heads, kv_heads)
        self._qkv = _take(attention.q_proj, attention.k_proj, attention.v_proj)
        self._o = _take(attention.o_proj)
        self._experts: Experts | None = None
        if hasattr(mlp, "experts"):
            self._experts = Experts(mlp, rule)
            return
        self._gate_up = _take(mlp.gate_proj, mlp.up_proj)
        self._down = _take(mlp.down_proj)
        self._act = F.silu if isinstance(mlp.act_fn, torch.nn.SiLU) else mlp.act_fn

    def products(self) -> Iterator[Product]:
        """All products with weights of the base model."""
        yield from (self._qkv, self._o)
        if self._experts is not None:
            yield from self._experts.products()
        else:
            yield from (self._gate_up, self._down)

    def add(
        self, h: Tensor, turn: "Turn", rows: Rows, attend: Attend, loras: LoraRows | None
    ) -> None:
        """Add the layer's result to all rows of h, `(T, d)`; attention sees those that count."""
        x = self._norm_1(h)
        y = self._qkv(x, rows)
        if loras is not None:
            y = loras.added(self._index, Site.QKV, x, y)
        heads = y.view(len(y), -1, self._head_dim)
        turned = heads[:, : self._turned]
        if self._norm_qk is not None:
            turned.copy_(self._norm_qk(turned))
        turn(turned)
        q, k, v = heads[: rows.count].split_with_sizes(self._sizes, 1)
        x = rows.filled(attend(self._index, q, k, v))
        y = self._o(x, rows)
        if loras is not None:
            y = loras.added(self._index, Site.O, x, y)
        h.add_(y)
        h.add_(self._mlp(self._norm_2(h), rows, loras))

    def _mlp(self, x: Tensor, rows: Rows, loras: LoraRows | None) -> Tensor:
        if self._experts is not None:
            runs = loras.experts(self._index) if loras is not None else ()
            return self._experts(x, rows, runs)
        both = self._gate_up(x, rows)
        if loras is not None:
            both = loras.added(self._index, Site.GATE_UP, x, both)
        gate, up = both.chunk(2, 1)
        inner = self._act(gate).mul_(up)
        y = self._down(inner, rows)
        if loras is not None:
            y = loras.added(self._index, Site.DOWN, inner, y)
        return y


class Turn:
    """Turns the pairs of each head's elements by angles that its row's position gives.

    Args:
        cos: `(T, head_dim)`.
        sin: `(T, head_dim)`.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._half = cos.shape[-1] // 2
        self._cos = cos[:, None]
        # With this sign, turning a half by the other is one product.
        self._sin = torch.cat((-sin[:, : self._half], sin[:, self._half :]), 1)[:, None]

    def __call__(self, heads: Tensor) -> None:
        """Turn `(T, heads, head_dim)` in place."""
        others = torch.roll(heads, self._half, -1).mul_(self._sin)
        heads.mul_(self._cos).add_(others)


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


def _norm_qk(attention: Any, heads: int, kv_heads: int) -> Norm | None:
    """The norm of queries and keys as one, where an architecture has it."""
    if not hasattr(attention, "q_norm"):
        return None
    queries, keys = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
    weight = torch.cat((queries.expand(heads, -1), keys.expand(kv_heads, -1)))
    return Norm(weight, attention.q_norm.variance_epsilon)


def _take(*modules: Any) -> Product:
    """One product of the weights of linear layers, which lose them."""
    weight = torch.cat([module.weight.detach() for module in modules])
    biases = [module.bias for module in modules]
    bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
    for module in modules:
        module.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
    return Product(weight, bias)
