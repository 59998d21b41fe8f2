"""A linear layer and its LoRA adapter as one operation.

It computes the same function as PEFT's layer, `y = x W^T + b + s (x A^T) B^T`, with fewer passes
over memory: it adds the update in place, forward and backward, and keeps nothing of the size of
`y`. W is frozen. Over a base of lower precision the adapter computes in that precision, as under
autocast, and its gradients have its own.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from torch import Tensor


class FusedLoraLinear(Linear):
    """PEFT's LoRA layer over `torch.nn.Linear`, as one operation where that is possible."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Map `(..., d_in)` to `(..., d_out)` with the active adapter."""
        base: Any = self.base_layer
        names = self.active_adapters
        if self.disable_adapters or len(names) != 1 or names[0] not in self.lora_A:
            return base(x)
        # DeepSpeed gathers a partitioned weight only in the base layer's own forward.
        if args or kwargs or hasattr(base.weight, "ds_id"):
            return super().forward(x, *args, **kwargs)
        name = names[0]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        apply: Any = _Function.apply
        return apply(x, base.weight, base.bias, a, b, self.scaling[name])


def fused_or_wrapped(target: Any, adapter_name: str, **settings: Any) -> LoraLayer:
    """Make the layer that replaces a linear layer, or wraps it where its weight is adapted."""
    if settings.get("parameter_name"):
        return ParamWrapper(target, adapter_name, **settings)
    return FusedLoraLinear(target, adapter_name, **settings)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        update = rows @ a_cast.t()
        y = torch.nn.functional.linear(rows, weight, bias)
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
