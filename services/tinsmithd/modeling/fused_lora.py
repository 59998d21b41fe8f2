"""A linear layer and its LoRA adapter as one operation.

It computes the same function as PEFT's layer, `y = x W^T + b + s (x A^T) B^T`, with fewer passes
over memory: it adds the update in place, forward and backward, and keeps nothing of the size of
`y`. W is frozen. Over a base of lower precision the adapter computes in that precision, as under
autocast, and its gradients have its own.
"""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor
from torch.nn.functional import linear

from tinsmithd.modeling.grouped_experts import ExpertLora


class FusedLoraLinear(lora.Linear):
    """PEFT's LoRA layer over `torch.nn.Linear`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Map `(..., d_in)` to `(..., d_out)` with the active adapter."""
        name = _active(self)
        if name is None:
            return self.base_layer(x)
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        return _adapted(self, name, x)


class ParamWrapper(lora.ParamWrapper):
    """PEFT's LoRA layer over a weight; PEFT knows its layers of this kind by this name alone.

    The weight is that of a linear layer, or one of all experts, whose module takes the adapter as
    an argument of that name (`modeling.grouped_experts`).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute what is wrapped, with the active adapter."""
        name = _active(self)
        if name is None:
            return self.base_layer(x, *args, **kwargs)
        if isinstance(self.get_base_layer(), torch.nn.Linear):
            return _adapted(self, name, x)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        kwargs[self.parameter_name] = ExpertLora(a, b, self.scaling[name])
        return self.base_layer(x, *args, **kwargs)


def adapter_layer(target: Any, adapter_name: str, **settings: Any) -> lora.LoraLayer:
    """Make the layer that replaces a linear one, or wraps a module of which it adapts a weight."""
    made = ParamWrapper if settings.get("parameter_name") else FusedLoraLinear
    return made(target, adapter_name, **settings)


def _active(layer: Any) -> str | None:
    """The adapter that a layer computes with, if any."""
    names = layer.active_adapters
    is_on = not layer.disable_adapters and len(names) == 1 and names[0] in layer.lora_A
    return names[0] if is_on else None


def _adapted(layer: Any, name: str, x: Tensor) -> Tensor:
    """A linear layer with an adapter on it."""
    base, scaling = layer.get_base_layer(), layer.scaling[name]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if not hasattr(base.weight, "ds_id"):
        apply: Any = _Function.apply
        made: Tensor = apply(x, base.weight, base.bias, a, b, scaling)
        return made
    # DeepSpeed gathers a partitioned weight only in the base layer's own forward.
    y: Tensor = base(x)
    wide: Tensor = y + linear(linear(x.to(a.dtype), a), b) * scaling
    return wide.to(y.dtype)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        update = rows @ a_cast.t()
        y = linear(rows, weight, bias)
        y.addmm_(update, b_cast.t(), alpha=s)
        ctx.save_for_backward(rows, update, weight, a_cast, b_cast)
        ctx.scaling, ctx.shape, ctx.dtype = s, x.shape, a.dtype
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(  # type: ignore[override]  # torch types it for any number of gradients
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        rows, update, weight, a, b = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        grad_update = (g @ b).mul_(ctx.scaling)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ weight).addmm_(grad_update, a).reshape(ctx.shape)
        if ctx.needs_input_grad[3]:
            grad_a = (grad_update.t() @ rows).to(ctx.dtype)
        if ctx.needs_input_grad[4]:
            grad_b = (update.t() @ g).mul_(ctx.scaling).t().to(ctx.dtype)
        return grad_x, None, None, grad_a, grad_b, None
