"""Bytes that a token keeps for the backward pass.

`d` is the residual stream's width, `q` and `kv` those of all heads, `f` the MLP's, `b` the bytes of
an element. Norms compute in float32. What is kept is what the operations of transformers' layers,
packed attention, `modeling.fused_lora` and `modeling.grouped_experts` save for their gradients;
weights are not among it.
"""

from dataclasses import dataclass

from tinsmithd.sizes.architecture import BYTES_OF_DTYPE, Architecture
from tinsmithd.tunings import LoraConfig, Tuning

_WIDE = 4
"""Bytes of a float32."""
_INDEX = 8
"""Bytes of an int64."""
_ROW_BYTES = 16
"""Rows of grouped products have a multiple of these."""

CHUNK_BYTES, CHUNK_TOKENS_MAX = 96 * 1024 * 1024, 512
CHUNK_SHARE, CHUNK_STEP = 128, 128
"""As `trainer.compute.head` has them."""


@dataclass(frozen=True)
class Activations:
    """Memory of a micro-batch.

    Attributes:
        plain_bytes: Of a token, where nothing is recomputed.
        recomputed_bytes: Of a token, where the backward pass computes each layer again.
        layer_bytes: Of a token in the layer that keeps most: while a layer is recomputed it is
            there besides.
        head_bytes: Of the buffers in which the head's logits are made, some positions at a time.
    """

    plain_bytes: int
    recomputed_bytes: int
    layer_bytes: int
    head_bytes: int


def activations(
    model: Architecture,
    tuning: Tuning,
    *,
    dtype: str,
    partitioned: bool,
    gpu_bytes: int | None = None,
) -> Activations:
    """What a token keeps.

    Args:
        model: The base model.
        tuning: What is trained.
        dtype: "float32" or "bfloat16", of the weights.
        partitioned: Whether the base is partitioned (stage 3), where PEFT's own layers compute.
        gpu_bytes: Memory of the device; None is a CPU.
    """
    b = BYTES_OF_DTYPE[dtype]
    layer = _Layer(model, tuning, b, partitioned)
    with_experts = set(model.expert_layers)
    each = [layer.kept(i, i in with_experts) for i in range(model.layer_count)]
    # Beside the layers: the angles of a position, the last norm, for the embedding the token.
    rest = 2 * model.head_size * b + layer.norm() if any(each) else 0
    rest += _INDEX if layer.full else 0
    return Activations(
        plain_bytes=sum(each) + rest,
        # Each layer keeps its input alone.
        recomputed_bytes=model.layer_count * model.hidden_size * b + rest,
        layer_bytes=max(each),
        head_bytes=head_tokens(model, gpu_bytes) * model.vocab_size * (2 * _WIDE + b),
    )


def head_tokens(model: Architecture, gpu_bytes: int | None) -> int:
    """Positions whose logits are made at once."""
    each = _WIDE * model.vocab_size
    if gpu_bytes is None:
        return max(1, min(CHUNK_TOKENS_MAX, CHUNK_BYTES // each))
    tokens = gpu_bytes // CHUNK_SHARE // each
    return max(1, tokens - tokens % CHUNK_STEP if tokens > CHUNK_STEP else tokens)


def spread_bytes(model: Architecture, *, dtype: str, ranks: int) -> int:
    """What a token of a datum that several ranks compute together keeps besides, in one layer.

    Where there are fewer key heads than ranks, each rank has a copy of one.

    Args:
        model: The base model.
        dtype: "float32" or "bfloat16", of the weights.
        ranks: Their number.
    """
    copies = max(0, ranks * model.head_size - model.kv_size)
    return BYTES_OF_DTYPE[dtype] * 2 * copies


class _Layer:
    def __init__(self, model: Architecture, tuning: Tuning, b: int, partitioned: bool) -> None:
        self._model, self._b = model, b
        self.full = not tuning.is_adapter
        self._lora = tuning if isinstance(tuning, LoraConfig) else None
        self._partitioned = partitioned

    def kept(self, index: int, with_experts: bool) -> int:
        """Bytes of one layer."""
        model, b = self._model, self._b
        begins = self._lora is not None and not self._lora.train_attn and not index
        mlp = self._experts(begins) if with_experts else self._mlp()
        # Below the first adapter there is nothing to go back to.
        lora = self._lora
        if lora is not None and not (lora.train_attn or lora.train_mlp):
            return 0
        if begins:
            return mlp
        first = self.norm() if index or self.full else 0
        if not model.qk_norm:
            heads = 0
        else:
            heads = _WIDE * (model.query_size + model.kv_size)
            heads += _WIDE * (model.head_count + model.kv_head_count)
            if self.full:
                heads += b * (model.query_size + model.kv_size)
        # queries, keys, values, what came of them, and the logarithm of the sum of each row
        attention = b * (2 * model.query_size + 2 * model.kv_size) + _WIDE * model.head_count
        return first + self._attention_layers() + heads + attention + self.norm() + mlp

    def norm(self) -> int:
        """Its input in float32, the root, and for the gradient of its weight what it made."""
        d = self._model.hidden_size
        return _WIDE * d + _WIDE + (self._b * d if self.full else 0)

    def _linear(self, size: int, count: int, trained: bool) -> int:
        """`count` linear layers that read the same input."""
        if self.full:
            return self._b * size
        if not trained or self._lora is None:
            return 0
        if self._partitioned and self._b != _WIDE:
            return count * _WIDE * (size + self._lora.rank)  # PEFT makes a float32 input for each
        return self._b * (size + count * self._lora.rank)

    def _attention_layers(self) -> int:
        model = self._model
        trained = self._lora is not None and self._lora.train_attn
        return self._linear(model.hidden_size, 3, trained) + self._linear(
            model.query_size, 1, trained
        )

    def _mlp(self) -> int:
        model, b = self._model, self._b
        trained = self._lora is not None and self._lora.train_mlp
        between = 3 * b * model.ffn_size  # gate, its activation, up
        return (
            self._linear(model.hidden_size, 2, trained)
            + between
            + self._linear(model.ffn_size, 1, trained)
        )

    def _experts(self, begins: bool) -> int:
        """Of the experts; where adapters begin with them, nothing goes back to the router."""
        model, b, k = self._model, self._b, self._model.active_expert_count
        trained = self.full or (self._lora is not None and self._lora.train_mlp)
        router = _WIDE * model.expert_count + _INDEX * k
        if model.normalises_experts:
            router += _WIDE * (k + 1)
        # Where each row goes, its share, gate and up; for trained weights the input of all.
        kept = k * (_INDEX + b) + k * b * 2 * model.expert_ffn_size
        kept += b * model.hidden_size if trained else 0
        if self._lora is not None and self._lora.train_mlp:  # A times the rows of both products
            step = _ROW_BYTES // b
            kept += 2 * k * b * step * -(-self._lora.expert_adapter_rank // step)
        return kept + (0 if begins else router)
