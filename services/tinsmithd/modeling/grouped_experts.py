"""The experts of a layer, and the LoRA adapters on them, as one operation on rows sorted by expert.

Token t passes through its k experts e, whose results are added up by their shares p:

    y_t = sum_e p_te D_e(act(gate) * up),    (gate, up) = U_e(x_t)
    U_e(x) = W_e x + s B_e A_e x,    and D_e alike

It computes the function of transformers and PEFT, which forms W + s B A of all experts in each
forward and keeps it for the way back. Here no copy of a weight is made: the products are grouped
ones, of rows that stand next to those of the same expert. For the way back x, (gate, up), the
shares and both narrow A_e x are kept; what is made of them is made again.

Shapes: `T` tokens, `k` experts of a token, `S = T k` rows, `E` experts, `d` the residual stream,
`f` the width of an expert, `r` the rank of each expert's adapter, `o` and `i` outputs and inputs of
a product.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, pad
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tinsmithd.modeling.base import BaseModel

EXPERTS = "tinsmith_grouped"
"""Name of grouped experts for `set_experts_implementation`."""

_ROW_BYTES = 16
"""Grouped products take rows of a multiple of these bytes."""

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExpertLora:
    """The adapters on one weight of all experts, as PEFT has them.

    Attributes:
        a: `(E * r, i)`; the rows of an expert stand together.
        b: `(o, r * E)`; the columns of a rank stand together.
        scaling: s.
    """

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class _Routing:
    """Which rows go where.

    Attributes:
        order_S: For each row, sorted by expert, its place among all (token, expert) pairs.
        ends_E: int32, the end of each expert's rows.
        top_k: k.
    """

    order_S: Tensor
    ends_E: Tensor
    top_k: int

    @functools.cached_property
    def _rows_S(self) -> Tensor:
        """For each pair its row. To take rows by number is faster than to put them, and on a GPU
        needs no sorting to come out the same each time."""
        return self.order_S.argsort()

    def spread(self, x_Td: Tensor) -> Tensor:
        """The rows of tokens: `(S, d)`."""
        return x_Td.index_select(0, self.order_S // self.top_k)

    def in_place(self, rows: Tensor) -> Tensor:
        """Rows in the order of their pairs."""
        return rows.index_select(0, self._rows_S)

    def gather(self, rows_Sd: Tensor) -> Tensor:
        """Sum up the rows of each token, always in the same order: `(T, d)`."""
        return self.in_place(rows_Sd).view(-1, self.top_k, rows_Sd.shape[1]).sum(1)


def use_grouped_experts(base: BaseModel) -> None:
    """Make a model compute its experts, where it has some, as this module does."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, grouped_experts)
    if base.info.active_expert_count:
        base.model.set_experts_implementation(EXPERTS)


def grouped_experts(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    gate_up_proj: ExpertLora | None = None,
    down_proj: ExpertLora | None = None,
) -> Tensor:
    """Compute all experts of a layer; the forward of transformers' module of experts.

    Args:
        module: It has `gate_up_proj` `(E, 2 f, d)`, `down_proj` `(E, d, f)` and `act_fn`.
        hidden_states: `(T, d)`.
        top_k_index: int64 `(T, k)`, the experts of each token.
        top_k_weights: `(T, k)`, their shares.
        gate_up_proj: The adapters on the weights of that name, if any.
        down_proj: Likewise.

    Returns:
        `(T, d)`.
    """
    experts_S, order_S = top_k_index.reshape(-1).sort(stable=True)
    numbers = torch.arange(module.num_experts, device=experts_S.device)
    ends_E = torch.searchsorted(experts_S, numbers, right=True, out_int32=True)
    loras = (gate_up_proj, down_proj)
    factors = [factor for lora in loras for factor in ((lora.a, lora.b) if lora else (None, None))]
    apply: Any = _Function.apply
    made: Tensor = apply(
        *(hidden_states, top_k_weights, module.gate_up_proj, module.down_proj, *factors),
        *(order_S, ends_E, [lora.scaling if lora else 0.0 for lora in loras], module.act_fn),
    )
    return made


class _Function(torch.autograd.Function):
    """See `grouped_experts`. Only parameters are saved of weights, never views of them: DeepSpeed
    takes a parameter's memory away after its layer and brings it back for the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]  # torch types it for any arguments
        ctx: Any,
        x_Td: Tensor,
        shares_Tk: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gate_up_a: Tensor | None,
        gate_up_b: Tensor | None,
        down_a: Tensor | None,
        down_b: Tensor | None,
        order_S: Tensor,
        ends_E: Tensor,
        scalings: list[float],
        act: Activation,
    ) -> Tensor:
        routing = _Routing(order_S, ends_E, shares_Tk.shape[1])
        up_lora = _made(gate_up_a, gate_up_b, scalings[0], len(ends_E), x_Td.dtype)
        both_S2f, up_Sr = _product(routing.spread(x_Td), gate_up, up_lora, ends_E)
        inner_Sf = _gated(both_S2f, shares_Tk.reshape(-1).index_select(0, order_S), act)
        down_lora = _made(down_a, down_b, scalings[1], len(ends_E), x_Td.dtype)
        rows_Sd, down_Sr = _product(inner_Sf, down, down_lora, ends_E)
        trained = gate_up_a is not None or gate_up.requires_grad
        ctx.save_for_backward(
            *(x_Td if trained else None, shares_Tk, both_S2f, up_Sr, down_Sr, order_S, ends_E),
            *(gate_up, down, gate_up_a, gate_up_b, down_a, down_b),
        )
        ctx.scalings, ctx.act = scalings, act
        return routing.gather(rows_Sd)

    @staticmethod
    def backward(ctx: Any, grad_Td: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_Td, shares_Tk, both_S2f, up_Sr, down_Sr, order_S, ends_E, *weights = ctx.saved_tensors
        gate_up, down, gate_up_a, gate_up_b, down_a, down_b = weights
        needed = ctx.needs_input_grad
        routing = _Routing(order_S, ends_E, shares_Tk.shape[1])
        with torch.enable_grad():
            both = both_S2f.detach().requires_grad_()
            shares_S = shares_Tk.detach().reshape(-1).index_select(0, order_S).requires_grad_()
            inner_Sf = _gated(both, shares_S, ctx.act)
        of_down = _Backward(
            routing.spread(grad_Td),
            inner_Sf.detach(),
            down,
            _made(down_a, down_b, ctx.scalings[1], len(ends_E), grad_Td.dtype),
            ends_E,
        )
        grad_both, grad_shares_S = torch.autograd.grad(inner_Sf, (both, shares_S), of_down.rows())
        grad_down, grad_down_a, grad_down_b = of_down.weights(needed[3], down_a, down_Sr)
        of_up = _Backward(
            grad_both,
            None if x_Td is None else routing.spread(x_Td),
            gate_up,
            _made(gate_up_a, gate_up_b, ctx.scalings[0], len(ends_E), grad_Td.dtype),
            ends_E,
        )
        grad_x = routing.gather(of_up.rows()) if needed[0] else None
        grad_up, grad_up_a, grad_up_b = of_up.weights(needed[2], gate_up_a, up_Sr)
        return (
            *(grad_x, routing.in_place(grad_shares_S).view_as(shares_Tk), grad_up, grad_down),
            *(grad_up_a, grad_up_b, grad_down_a, grad_down_b),
            *(None, None, None, None),
        )


def _gated(both_S2f: Tensor, shares_S: Tensor, act: Activation) -> Tensor:
    """What goes into the second product: its shares are in it already, since it is linear."""
    gate_Sf, up_Sf = both_S2f.chunk(2, -1)
    return act(gate_Sf) * up_Sf * shares_S[:, None]


@dataclass(frozen=True)
class _Factors:
    """The adapters on one weight in a product's dtype, their ranks padded with zeros."""

    a_Eri: Tensor
    b_Eor: Tensor
    scaling: float


def _made(
    a: Tensor | None, b: Tensor | None, scaling: float, experts: int, dtype: torch.dtype
) -> _Factors | None:
    """Bring an adapter's weights into the order of its experts; made anew on the way back."""
    if a is None or b is None:
        return None
    rank = len(a) // experts
    more = -rank % (_ROW_BYTES // dtype.itemsize)
    a_Eri = a.detach().view(experts, rank, -1).to(dtype)
    # Turned as a table of two sides, for which there is a kernel that goes by blocks.
    b_Eor = b.detach().view(-1, experts).t().contiguous().view(experts, -1, rank).to(dtype)
    if more:
        a_Eri, b_Eor = pad(a_Eri, (0, 0, 0, more)), pad(b_Eor, (0, more))
    return _Factors(a_Eri, b_Eor, scaling)


def _product(
    rows_Si: Tensor, weight_Eoi: Tensor, lora: _Factors | None, ends_E: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Each row times its expert's weight, with what the adapter adds.

    Returns:
        `(S, o)`, and A times the rows `(S, r)` where there is an adapter.
    """
    y_So = grouped_mm(rows_Si, weight_Eoi.transpose(1, 2), offs=ends_E)
    if lora is None:
        return y_So, None
    update_Sr = grouped_mm(rows_Si, lora.a_Eri.transpose(1, 2), offs=ends_E)
    more_So = grouped_mm(update_Sr, lora.b_Eor.transpose(1, 2), offs=ends_E)
    return y_So.add_(more_So, alpha=lora.scaling), update_Sr


class _Backward:
    """The gradients of `_product`.

    Args:
        grad_So: That of its result.
        rows_Si: Its rows; None where neither weight nor adapter is trained.
        weight_Eoi: Its weight.
        lora: Its adapter, if any.
        ends_E: Ends of the experts' rows.
    """

    def __init__(
        self,
        grad_So: Tensor,
        rows_Si: Tensor | None,
        weight_Eoi: Tensor,
        lora: _Factors | None,
        ends_E: Tensor,
    ) -> None:
        self._grad_So, self._rows_Si, self._weight_Eoi = grad_So.contiguous(), rows_Si, weight_Eoi
        self._lora, self._ends_E = lora, ends_E
        if lora is not None:
            self._grad_Sr = self._grouped(self._grad_So, lora.b_Eor).mul_(lora.scaling)

    def rows(self) -> Tensor:
        """Of the rows, `(S, i)`."""
        grad_Si = self._grouped(self._grad_So, self._weight_Eoi)
        if self._lora is not None:
            grad_Si.add_(self._grouped(self._grad_Sr, self._lora.a_Eri))
        return grad_Si

    def weights(
        self, trained: bool, a: Tensor | None, update_Sr: Tensor | None
    ) -> Iterator[Tensor | None]:
        """Of the weight, if it is trained, and of the adapter `a` and its b in their own shapes.

        `update_Sr` is what `_product` gave.
        """
        rows_Si, lora = self._rows_Si, self._lora
        yield self._grouped(self._grad_So.t(), rows_Si) if trained and rows_Si is not None else None
        if lora is None or a is None or rows_Si is None or update_Sr is None:
            yield from (None, None)
            return
        rank = len(a) // len(self._ends_E)
        grad_Eri = self._grouped(self._grad_Sr.t(), rows_Si)[:, :rank]
        yield grad_Eri.to(a.dtype).reshape(a.shape)
        grad_Eor = self._grouped(self._grad_So.t(), update_Sr * lora.scaling)[..., :rank]
        turned = grad_Eor.to(a.dtype).flatten(1).t().contiguous()  # (o * rank, E)
        yield turned.view(grad_Eor.shape[1], -1)

    def _grouped(self, left: Tensor, right: Tensor) -> Tensor:
        return grouped_mm(left, right, offs=self._ends_E)
