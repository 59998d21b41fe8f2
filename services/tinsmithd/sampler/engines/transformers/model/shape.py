"""The sizes of a decoder, as caches and attention need them."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one decoder.

    Attributes:
        layers: Number of layers.
        heads: Query heads of a layer.
        kv_heads: Key and value heads of a layer; `heads` is a multiple.
        head_dim: Size of a head.
        hidden: Size of a hidden state.
        vocab: Number of token ids that have logits.
        context: Maximum tokens of a sequence.
        dtype: Of weights, hidden states, keys and values.
        device: Where they are.
        scaling: Factor on attention's scores.
        windows: For each layer the number of tokens that a token sees, itself included; None where
            it sees all before it.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    context: int
    dtype: torch.dtype
    device: torch.device
    scaling: float
    windows: tuple[int | None, ...]

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @classmethod
    def of(cls, model: Any) -> "ModelShape":
        """The shape of a causal language model of transformers, of a supported family."""
        config, layers = model.config, model.model.layers
        attentions = [layer.self_attn for layer in layers]
        first, weight = attentions[0], model.get_input_embeddings().weight
        return cls(
            layers=len(layers),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=first.head_dim,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            context=config.max_position_embeddings,
            dtype=weight.dtype,
            device=weight.device,
            scaling=first.scaling,
            windows=tuple(getattr(attention, "sliding_window", None) for attention in attentions),
        )
