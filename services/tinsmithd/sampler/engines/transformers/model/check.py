"""Checks at start that a decoder computes what the model of transformers does."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmithd.modeling.logits import float_product
from tinsmithd.modeling.weight_files import refused
from tinsmithd.sampler.engines.transformers.model.decoder import Decoder
from tinsmithd.sampler.engines.transformers.model.shape import ModelShape

CHECK_TOKENS = 24
"""Tokens of the sequence that both compute."""

GAP_MAX = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Maximum mean gap of logprobs, in nats. A model computed wrongly is off by whole nats, while in
bfloat16 a few hundredths come of rounding alone."""


class CausalAttend:
    """Attention of one sequence whose rows are all of its tokens, without a cache.

    Args:
        shape: Of the decoder.
    """

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        group, window = self._shape.group, self._shape.windows[layer]
        places = torch.arange(len(q), device=q.device)
        back = places[:, None] - places[None]
        mask = (back >= 0) if window is None else (back >= 0) & (back < window)
        keys, values = (t.transpose(0, 1).repeat_interleave(group, 0) for t in (k, v))
        found = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask[None, None],
            scale=self._shape.scaling,
        )
        return found[0].transpose(0, 1).reshape(len(q), -1)


class Expected:
    """What the model of transformers computes of a few tokens, before a decoder takes it apart."""

    @torch.inference_mode()
    def __init__(self, model: Any) -> None:
        vocab, device = model.config.vocab_size, model.get_input_embeddings().weight.device
        self.tokens = torch.arange(1, CHECK_TOKENS + 1, device=device) * 7919 % vocab
        hidden = model.model(input_ids=self.tokens[None], use_cache=False).last_hidden_state[0]
        weight = model.get_output_embeddings().weight
        self.logprobs = float_product(hidden, weight).log_softmax(-1)

    def gap(self, decoder: Decoder) -> float:
        """The mean absolute gap to a decoder's logprobs, over tokens and vocabulary, in nats."""
        positions = torch.arange(len(self.tokens), device=self.tokens.device)
        attend = CausalAttend(decoder.shape)
        hidden = decoder.forward(self.tokens, positions, attend, None)
        logprobs = decoder.logits(hidden, None).log_softmax(-1)
        return float((logprobs - self.logprobs).abs().mean())

    def check(self, name: str, decoder: Decoder) -> None:
        """Refuse a model that the decoder computes otherwise.

        Raises:
            NotFound: See above (BASE_MODEL_NOT_FOUND).
        """
        gap, gap_max = self.gap(decoder), GAP_MAX[decoder.shape.dtype]
        if not gap <= gap_max:
            message = (
                f"its logprobs differ from those of transformers by {gap:.2g} nats in the mean, "
                f"more than {gap_max:g}"
            )
            raise refused(name, message)
