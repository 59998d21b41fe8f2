"""A decoder: tokens and positions in, hidden states and logits out.

It holds the weights of a base model in the form that its products need. What a row gives depends on
its token, its position, what `attend` gives it and its adapter, and on no other row.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.head import Head
from tinsmithd.sampler.engines.transformers.model.layer import Attend, Layer, Norm, Turn
from tinsmithd.sampler.engines.transformers.model.linear import Product, RowRule, Rows
from tinsmithd.sampler.engines.transformers.model.lora_rows import LoraRows
from tinsmithd.sampler.engines.transformers.model.shape import ModelShape


class Decoder:
    """The arithmetic of one model. It takes the weights out of the model that it is made of.

    Args:
        model: A causal language model of transformers, of a supported family. Nothing can be
            computed with it afterwards.
        rule: How many rows products have; see `invariance`.

    Attributes:
        shape: Its sizes.
        rule: As given.
        head: Makes logits.
    """

    def __init__(self, model: Any, rule: RowRule) -> None:
        self.shape = ModelShape.of(model)
        self.rule = rule
        inner, head = model.model, model.get_output_embeddings()
        self._embedding = inner.embed_tokens.weight.detach()
        self._rotary = inner.rotary_emb
        self.head = Head(head.weight.detach())
        self._norm = Norm(inner.norm.weight.detach(), inner.norm.variance_epsilon)
        self._layers = [Layer(module, i, rule) for i, module in enumerate(inner.layers)]
        nothing = torch.nn.Parameter(self._embedding.new_empty(0), requires_grad=False)
        inner.embed_tokens.weight = head.weight = nothing

    def products(self) -> Iterator[Head | Product]:
        """All products with weights of the base model, the head's first."""
        yield self.head
        for layer in self._layers:
            yield from layer.products()

    @torch.inference_mode()
    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        loras: LoraRows | None,
        *,
        sequences: int = 0,
    ) -> Tensor:
        """Compute the hidden states of rows.

        Args:
            tokens_T: int64 `(T,)`, T at least 1.
            positions_T: int64 `(T,)`, of each token in its sequence.
            attend: Attention; see `Attend`.
            loras: The adapters of the T rows; None: no row has any.
            sequences: How many rows, the first, are next tokens of sequences. The others are of
                prompts: their last bits may be others.

        Returns:
            `(T, hidden)` after the last norm, of the shape's dtype.
        """
        count = len(tokens_T)
        rows = Rows(self.rule, count, sequences)
        h = F.embedding(rows.filled(tokens_T), self._embedding)
        cos, sin = self._rotary(h, rows.filled(positions_T)[None])
        turn = Turn(cos[0], sin[0])
        for layer in self._layers:
            layer.add(h, turn, rows, attend, loras)
        return self._norm(h)[:count]

    @torch.inference_mode()
    def logits(self, hidden_N: Tensor, loras: LoraRows | None) -> Tensor:
        """Compute logits for scores, in float32 and never rounded to less.

        Args:
            hidden_N: `(N, hidden)`, as `forward` gives them, N at least 1.
            loras: The adapters of the N rows; None: no row has any.

        Returns:
            float32 `(N, vocab)`.
        """
        rows = Rows(self.rule, len(hidden_N), 0)
        hidden = rows.filled(hidden_N)
        logits = self.head(hidden, rows)
        if loras is not None:
            logits = loras.added_to_logits(hidden, logits)
        return logits[: rows.count]

    @torch.inference_mode()
    def draw_logits(self, hidden_N: Tensor, loras: LoraRows | None) -> Tensor:
        """As `logits`, for draws: faster at few rows; the last bits may be others."""
        compute = self.head.compute_few
        if compute is None:
            return self.logits(hidden_N, loras)
        if loras is None:
            return compute(hidden_N)
        count = len(hidden_N)
        hidden_N = F.pad(hidden_N, (0, 0, 0, self.rule.padded(count) - count))
        logits = compute(hidden_N)
        return loras.added_to_logits(hidden_N, logits)[:count]
