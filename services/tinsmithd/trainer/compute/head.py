"""Logprobs, loss and gradients of the head, some positions at a time.

A loss of this API is a sum over tokens of a function of each target's logprob, so the logits
determine their own gradient at once. The forward pass makes, uses and drops them chunk by chunk
(the idea of Liger's fused linear cross-entropy, Hsu et al. 2024, for every loss). With

    logits = h W^T + s (h A^T) B^T,    p = softmax(logits),    g_k = d loss / d logprob(y_k)

the gradient is `d logits = sum_k g_k (onehot(y_k) - p)`, and all other gradients are matrix
products with it. Positions whose g are all zero take no part in them. Nothing is read back from a
device in between, so that its kernels follow each other without waiting for the host.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmithd.domain import LossFn
from tinsmithd.modeling.device_copies import to_device
from tinsmithd.modeling.logits import float_logits
from tinsmithd.trainer.compute.losses import (
    SEQUENCE_RATIO,
    is_sequence_wise,
    loss_sum,
    sequence_ratios,
)
from tinsmithd.trainer.compute.shared_rows import SharedRows
from tinsmithd.trainer.compute.spread import Spread

CHUNK_BYTES = 96 * 1024 * 1024
"""Maximum bytes of the logits of one chunk on a CPU, float32; there are two such buffers."""

CHUNK_TOKENS_MAX = 512
"""Maximum positions of a chunk there: more are slower, since the logits leave the cache."""

CHUNK_SHARE = 128
"""On a GPU the logits of a chunk may take one part in so many of its memory: each chunk reads the
whole weight, so with few positions the product waits for memory."""

CHUNK_STEP = 128
"""There a chunk has a multiple of so many positions, if it has as many: kernels have tiles."""


@dataclass(frozen=True)
class Head:
    """The weights that turn hidden states into logits.

    Attributes:
        weight: `(V, d)`, of the model's dtype.
        lora_a: float32 `(r, d)`, or None where the head has no adapter.
        lora_b: float32 `(V, r)`, likewise.
        scaling: alpha / rank.
        trained: Whether `weight` needs a gradient.
    """

    weight: Tensor
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0
    trained: bool = False


@dataclass(frozen=True)
class HeadResult:
    """Result of the head for T positions.

    Attributes:
        logprobs: float32 `(T, K)`, detached.
        loss: The sum, a scalar in float64 on the device.
        grad_hidden: `(T, d)` of the hidden states' dtype; None without backward.
        grad_a: float32 `(r, d)`, likewise, or None where the head has no adapter.
        grad_b: float32 `(V, r)`, likewise.
        grad_weight: float32 `(V, d)`, likewise, or None where the head's weight is not trained.
    """

    logprobs: Tensor
    loss: Tensor
    grad_hidden: Tensor | None = None
    grad_a: Tensor | None = None
    grad_b: Tensor | None = None
    grad_weight: Tensor | None = None


@torch.no_grad()
def head_pass(
    hidden: Tensor,
    head: Head,
    loss_fn: LossFn,
    inputs: Mapping[str, Tensor],
    segment_lengths: Sequence[int],
    *,
    backward: bool,
    spread: Spread | None = None,
    positions: np.ndarray | None = None,
    shared: SharedRows | None = None,
) -> HeadResult:
    """Compute logprobs and loss and, with `backward`, the loss's gradients.

    Args:
        hidden: Hidden states `(T, d)`; with `shared` one of each of its rows, `(U, d)`.
        head: The head.
        loss_fn: The loss.
        inputs: Inputs of the loss, each `(T, K)`; `target_tokens` int64, the others float32. The
            padding of a datum that has fewer targets than K has weight 0.
        segment_lengths: Number of tokens of each datum, in order, T in all.
        backward: Whether to compute gradients.
        spread: Where other ranks have hidden states of these data: `hidden` and the result are of
            this rank's tokens, `inputs` and `segment_lengths` of those of all ranks.
        positions: Numbers of the rows of `hidden` that may have a gradient, ascending; None looks
            at the gradients, for which a device other than a CPU would be waited for.
        shared: Where several positions have the same hidden state; not with `spread`. The gradient
            of hidden states is then of its rows, too.
    """
    own = slice(None) if spread is None else spread.own
    wanted = inputs["target_tokens"][own]
    scratch = _Scratch(hidden, head)
    logprobs = torch.empty(wanted.shape, dtype=torch.float32, device=hidden.device)
    if is_sequence_wise(loss_fn):
        # A token's loss needs the logprobs of its whole datum, which a first pass computes.
        for chunk in scratch.chunks():
            at, rows = _members(chunk, shared)
            logprobs[at], _ = scratch.logprobs(hidden[chunk], wanted[at], rows)
        whole = logprobs if spread is None else spread.whole(logprobs)
        inputs = {**inputs, SEQUENCE_RATIO: sequence_ratios(whole, inputs, segment_lengths)}
    inputs = {name: value[own] for name, value in inputs.items()}
    gradients = _Gradients(hidden, head, positions, shared) if backward else None
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for chunk in scratch.chunks():
        at, rows = _members(chunk, shared)
        lp, probabilities = scratch.logprobs(hidden[chunk], wanted[at], rows)
        logprobs[at] = lp
        here = {name: value[at] for name, value in inputs.items()}
        with torch.enable_grad():
            leaf = lp.requires_grad_(backward)
            part = loss_sum(loss_fn, leaf, here)
        loss += part.detach()
        if gradients is not None:
            (g,) = torch.autograd.grad(part, leaf)
            gradients.add(chunk, hidden[chunk], probabilities, wanted[at], g)
    if gradients is None:
        return HeadResult(logprobs, loss)
    return HeadResult(logprobs, loss, gradients.hidden, gradients.a, gradients.b, gradients.weight)


def _members(chunk: slice, shared: SharedRows | None) -> tuple[slice | Tensor, Tensor | None]:
    """Which positions are in the rows of a chunk, and in which of them; None where each is its own
    row."""
    if shared is None:
        return chunk, None
    members = shared.members(chunk)
    return members.positions, members.rows


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Positions of a chunk: always the same on a device, whatever else is in its memory."""
    if device.type != "cuda":
        return max(1, min(CHUNK_TOKENS_MAX, CHUNK_BYTES // (4 * vocab_size)))
    tokens = torch.cuda.get_device_properties(device).total_memory // CHUNK_SHARE
    tokens //= 4 * vocab_size
    return max(1, tokens - tokens % CHUNK_STEP if tokens > CHUNK_STEP else tokens)


class _Scratch:
    """Buffers for one chunk of logits, which all chunks share."""

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self._head = head
        self._count = len(hidden)
        vocab_size = head.weight.shape[0]
        self._step = max(1, min(chunk_tokens(vocab_size, hidden.device), self._count))
        shape = (self._step, vocab_size)
        self._logits = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        self._p = torch.empty(shape, dtype=torch.float32, device=hidden.device)

    def chunks(self) -> list[slice]:
        return [
            slice(i, min(i + self._step, self._count)) for i in range(0, self._count, self._step)
        ]

    def logprobs(
        self, hidden: Tensor, wanted: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logprobs of the wanted tokens, and all probabilities `(c, V)`, a buffer.

        Args:
            hidden: `(c, d)`.
            wanted: `(m, K)`.
            rows: `(m,)`, the row of each; None where m is c, each its own.

        Returns:
            Logprobs `(m, K)`, probabilities.
        """
        head = self._head
        out = self._logits[: len(hidden)]
        logits = float_logits(hidden, head.weight, head.lora_a, head.lora_b, head.scaling, out=out)
        p = torch.softmax(logits, dim=1, out=self._p[: len(hidden)])
        # The largest probability is 1 / sum(exp(logit - largest logit)).
        logsumexp = logits.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()
        if rows is not None:
            return logits[rows[:, None], wanted] - logsumexp[rows], p
        return logits.gather(1, wanted) - logsumexp, p


class _Gradients:
    """Sums up the gradients of hidden states and head, chunk by chunk."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        positions: np.ndarray | None,
        shared: SharedRows | None,
    ) -> None:
        self._head, self._shared = head, shared
        self._positions = positions
        if positions is not None and shared is None:
            self._on_device = to_device(torch.from_numpy(positions), hidden.device)
        self.hidden = torch.zeros_like(hidden)
        self.a = None if head.lora_a is None else torch.zeros_like(head.lora_a)
        self.b = None if head.lora_b is None else torch.zeros_like(head.lora_b)
        self.weight = torch.zeros_like(head.weight, dtype=torch.float32) if head.trained else None

    def _rows(self, chunk: slice, g: Tensor) -> Tensor:
        """Rows of a chunk that take part."""
        if self._positions is None:
            return (g != 0).any(1).nonzero()[:, 0]
        first, end = np.searchsorted(self._positions, (chunk.start, chunk.stop))
        rows: Tensor = self._on_device[first:end] - chunk.start
        return rows

    def add(self, chunk: slice, hidden: Tensor, p: Tensor, wanted: Tensor, g: Tensor) -> None:
        """Add one chunk; `p` is overwritten."""
        parts = None if self._shared is None else self._shared.parts(chunk)
        rows = self._rows(chunk, g) if parts is None else parts.rows
        if not len(rows):
            return
        if some := len(rows) < len(hidden):
            hidden, p = hidden[rows], p[rows]
        if parts is not None:
            g = g[parts.members]
            d_logits = p.mul_(-parts.summed(g.sum(1))[:, None])
            # Of one dimension, where equal targets of a row are summed in their order.
            at = parts.places[:, None] * p.shape[1] + wanted[parts.members]
            d_logits.view(-1).scatter_add_(0, at.view(-1), g.reshape(-1))
        else:
            if some:
                wanted, g = wanted[rows], g[rows]
            d_logits = p.mul_(-g.sum(1, keepdim=True)).scatter_add_(1, wanted, g)
        self._take(chunk, hidden, d_logits, rows if some else None)

    def _take(self, chunk: slice, hidden: Tensor, d_logits: Tensor, rows: Tensor | None) -> None:
        """Add what follows of the gradients of some logits, of `rows` of a chunk or of all."""
        head = self._head
        whole = self.hidden[chunk] if rows is None else None
        d_hidden = torch.mm(d_logits.to(head.weight.dtype), head.weight, out=whole)
        if self.weight is not None:
            self.weight.addmm_(d_logits.t(), hidden.float())
        if self.a is not None and self.b is not None:
            assert head.lora_a is not None
            assert head.lora_b is not None
            wide = hidden.to(self.a.dtype)
            d_update = (d_logits @ head.lora_b).mul_(head.scaling)
            self.a.addmm_(d_update.t(), wide)
            self.b.addmm_(d_logits.t(), wide @ head.lora_a.t(), alpha=head.scaling)
            d_hidden += (d_update @ head.lora_a).to(d_hidden.dtype)
        if rows is not None:
            self.hidden[chunk][rows] = d_hidden
