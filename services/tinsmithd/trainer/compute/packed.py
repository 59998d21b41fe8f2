"""Computes some data in one forward and at most one backward, without padding or full logits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinsmithd.domain import Datum, LossFn
from tinsmithd.modeling.device_copies import to_device
from tinsmithd.modeling.trained import HeadLayer
from tinsmithd.trainer.compute.head import Head, HeadResult, head_pass
from tinsmithd.trainer.compute.losses import may_have_gradient
from tinsmithd.trainer.compute.shared_rows import SharedRows
from tinsmithd.trainer.compute.spread import Spread
from tinsmithd.trainer.prefixes import Layout, lay_out

Sink = Callable[[Tensor, Tensor], None]
"""Takes a parameter and its gradient, as soon as there is one."""

_CHECKPOINT = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class PackedResult:
    """Result of some data.

    Attributes:
        logprobs: float32 on the device, flat: of one datum after the other, each in the order of
            its `target_tokens`.
        loss: Their summed loss, a scalar in float64 on the device; of this rank's tokens, where the
            data are spread over ranks.
        gradients: One per parameter, or None where it has none; empty without backward, or if a
            sink took them.
    """

    logprobs: Tensor
    loss: Tensor
    gradients: list[Tensor | None]


def compute_packed(
    causal_lm: Any,
    head: HeadLayer,
    parameters: Sequence[torch.nn.Parameter],
    data: Sequence[Datum],
    loss_fn: LossFn,
    device: torch.device,
    *,
    backward: bool,
    recompute: bool = False,
    sink: Sink | None = None,
    spread: Spread | None = None,
    shares: bool = False,
) -> PackedResult:
    """Compute loss, logprobs and gradients of some data.

    No number is read back from the device, so one call follows the other without a pause there.

    Args:
        causal_lm: The Hugging Face model with the right adapter active, which takes
            `segment_lengths` (`modeling.packing`).
        head: Its head.
        parameters: The parameters that need gradients.
        data: The data.
        loss_fn: The loss.
        device: Device of the model.
        backward: Whether to compute gradients; without them no graph is built.
        recompute: Keep only each layer's input, and compute the layer again in the backward pass.
        sink: Takes the head's gradient; it gets those of all other parameters by hooks.
        spread: Where other ranks compute a share of the data's tokens; gradients are then those
            that go through this rank's.
        shares: Whether tokens that several data begin with are computed once; not where they are
            spread.
    """
    layout = lay_out([datum.tokens for datum in data], share=shares)
    lengths = [len(datum.tokens) for datum in data]
    arrays = {name: _stack(data, name) for name in data[0].loss_fn_inputs}
    inputs = {n: to_device(torch.from_numpy(array), device) for n, array in arrays.items()}
    own = slice(None) if spread is None else spread.own
    positions = shared = None
    if device.type != "cpu" or layout.shares:  # else it costs nothing to look
        found: np.ndarray = may_have_gradient(loss_fn, arrays)[own].nonzero()[0]
        positions = found
        shared = SharedRows(layout.places(), found, device) if layout.shares else None
    with torch.set_grad_enabled(backward), _recomputing(causal_lm, backward and recompute):
        hidden = _hidden(causal_lm, layout, device, spread)
    settings: dict[str, Any] = {"backward": backward, "spread": spread}
    settings |= {"positions": positions, "shared": shared}
    result = _through_head(head, hidden.detach(), loss_fn, inputs, lengths, **settings)
    gradients: list[Tensor | None] = []
    if backward and sink is not None:
        _backward_into(sink, hidden, head, result)
    elif backward:
        gradients = _backward(hidden, head, parameters, result)
    of_all = result.logprobs if spread is None else spread.whole(result.logprobs)
    return PackedResult(_without_padding(of_all, data), result.loss, gradients)


def _hidden(causal_lm: Any, layout: Layout, device: torch.device, spread: Spread | None) -> Tensor:
    """Hidden states `(T, d)` below the head, of this rank's tokens."""
    own = slice(None) if spread is None else spread.own
    output = causal_lm.model(
        input_ids=to_device(torch.from_numpy(layout.row()[own]), device)[None],
        position_ids=to_device(torch.from_numpy(layout.positions()[own]), device)[None],
        segment_lengths=layout.lengths,
        segment_contexts=layout.contexts if layout.shares else None,
        spread=spread,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _stack(data: Sequence[Datum], name: str) -> np.ndarray:
    """One loss input of all data as `(T, K)`, zeros where a datum has fewer than K."""
    wide = [datum.loss_fn_inputs[name].reshape(len(datum.tokens), -1) for datum in data]
    width = max(array.shape[1] for array in wide)
    padded = [np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in wide]
    return np.concatenate(padded)


def _without_padding(rows_TK: Tensor, data: Sequence[Datum]) -> Tensor:
    """Rows of some data, flat, without what stands there for targets that a datum has not."""
    counts = [datum.loss_fn_inputs["target_tokens"].size for datum in data]
    if sum(counts) == rows_TK.numel():
        return rows_TK.reshape(-1)
    lengths = [len(datum.tokens) for datum in data]
    parts = zip(rows_TK.split(lengths), counts, lengths, strict=True)
    return torch.cat([rows[:, : count // length].reshape(-1) for rows, count, length in parts])


def _through_head(
    layer: HeadLayer,
    hidden: Tensor,
    loss_fn: LossFn,
    inputs: Mapping[str, Tensor],
    lengths: Sequence[int],
    **settings: Any,
) -> HeadResult:
    """What `head_pass` gives, with its settings, where DeepSpeed may have to gather the weight."""
    module = layer.module

    def run(_: Tensor) -> HeadResult:
        weight = module.weight.detach()
        head = Head(weight, layer.lora_a, layer.lora_b, layer.scaling, layer.trained)
        return head_pass(hidden, head, loss_fn, inputs, lengths, **settings)

    if not hasattr(module.weight, "ds_id"):
        return run(hidden)
    with torch.no_grad(), _forward_replaced(module, run):
        # DeepSpeed gathers a partitioned weight only around a call of its module.
        result: HeadResult = module(hidden)
    return result


@contextmanager
def _forward_replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.forward
    module.forward = forward
    try:
        yield
    finally:
        module.forward = before


def _backward(
    hidden: Tensor,
    head: HeadLayer,
    parameters: Sequence[torch.nn.Parameter],
    result: HeadResult,
) -> list[Tensor | None]:
    of_head = {id(head.lora_a): result.grad_a, id(head.lora_b): result.grad_b}
    below = [p for p in parameters if id(p) not in of_head]
    if head.trained:  # an input embedding that shares the weight adds its own gradient
        of_head[id(head.module.weight)] = result.grad_weight
    found: dict[int, Tensor | None] = {}
    # There is no graph unless a layer below the head is adapted.
    if below and hidden.requires_grad:
        gradients = torch.autograd.grad(hidden, below, result.grad_hidden, allow_unused=True)
        found = {id(p): g for p, g in zip(below, gradients, strict=True)}
    return [_sum(of_head.get(id(p)), found.get(id(p))) for p in parameters]


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _backward_into(sink: Sink, hidden: Tensor, head: HeadLayer, result: HeadResult) -> None:
    assert result.grad_weight is not None
    sink(head.module.weight, result.grad_weight)
    torch.autograd.backward(hidden, result.grad_hidden)


@contextmanager
def _recomputing(causal_lm: Any, wanted: bool) -> Iterator[None]:
    """Checkpoint the activations of every layer, by the attributes that transformers reads."""
    layers = causal_lm.model.layers
    for layer in layers:
        layer._gradient_checkpointing_func = _CHECKPOINT
        layer.gradient_checkpointing = wanted
        layer.training = wanted  # of this module alone, so that no dropout below it is on
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False
