"""The weights of a base model and of its adapters: names and shapes, as transformers and PEFT have.

Sizes of partitions depend on single weights, and a list of them can be compared with a real model's
name by name.
"""

import math
from collections.abc import Iterator, Mapping

from tinsmithd.sizes.architecture import Architecture
from tinsmithd.tunings import LoraConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of weights by name."""

_ADAPTER_PREFIX = "base_model.model."
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def element_count(shapes: Shapes) -> int:
    """Elements of all weights together."""
    return sum(math.prod(shape) for shape in shapes.values())


def base_weights(model: Architecture) -> Shapes:
    """The weights of a base model, those that are shared once."""
    width = model.hidden_size
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, width)}
    with_experts = set(model.expert_layers)
    for layer in range(model.layer_count):
        prefix = f"model.layers.{layer}."
        found |= {prefix + name: shape for name, shape in _attention(model)}
        mlp = _expert_mlp(model) if layer in with_experts else _mlp(model)
        found |= {prefix + name: shape for name, shape in mlp}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{norm}.weight"] = (width,)
    found["model.norm.weight"] = (width,)
    if not model.tied:
        found["lm_head.weight"] = (model.vocab_size, width)
    return found


def active_count(model: Architecture) -> int:
    """Elements of the weights that a token passes through, embeddings and head included."""
    idle = 0
    for name, shape in base_weights(model).items():
        if ".mlp.experts." in name:
            of_one = math.prod(shape) // model.expert_count
            idle += of_one * max(0, model.expert_count - model.active_expert_count)
    return element_count(base_weights(model)) - idle


def adapter_weights(model: Architecture, lora: LoraConfig) -> Shapes:
    """The weights of an adapter, by their names in PEFT's files."""
    found: dict[str, tuple[int, ...]] = {}
    targets = [*_ATTENTION] if lora.train_attn else []
    targets += [*_MLP] if lora.train_mlp else []
    for name, shape in base_weights(model).items():
        layer = name.removesuffix(".weight")
        if ".mlp.experts." in name:
            found |= _on_experts(layer, shape, lora.expert_adapter_rank) if lora.train_mlp else {}
        elif layer.rpartition(".")[2] in targets and layer != name:  # not a bias
            found |= _on_layer(layer, shape, lora.rank)
    if lora.train_unembed:
        found |= _on_layer("lm_head", (model.vocab_size, model.hidden_size), lora.rank)
    return found


def _attention(model: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = model.hidden_size
    for letter, size in (("q", model.query_size), ("k", model.kv_size), ("v", model.kv_size)):
        yield f"self_attn.{letter}_proj.weight", (size, width)
        if model.qkv_bias:
            yield f"self_attn.{letter}_proj.bias", (size,)
    yield "self_attn.o_proj.weight", (width, model.query_size)
    if model.output_bias:
        yield "self_attn.o_proj.bias", (width,)
    if model.qk_norm:
        yield "self_attn.q_norm.weight", (model.head_size,)
        yield "self_attn.k_norm.weight", (model.head_size,)


def _mlp(model: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = model.hidden_size, model.ffn_size
    for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
        yield f"mlp.{name}_proj.weight", shape
        if model.mlp_bias:
            yield f"mlp.{name}_proj.bias", shape[:1]


def _expert_mlp(model: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    count, width, inner = model.expert_count, model.hidden_size, model.expert_ffn_size
    yield "mlp.gate.weight", (count, width)
    yield "mlp.experts.gate_up_proj", (count, 2 * inner, width)
    yield "mlp.experts.down_proj", (count, width, inner)


def _on_layer(layer: str, shape: tuple[int, ...], rank: int) -> Shapes:
    (size_out, size_in), start = shape, _ADAPTER_PREFIX + layer
    return {f"{start}.lora_A.weight": (rank, size_in), f"{start}.lora_B.weight": (size_out, rank)}


def _on_experts(parameter: str, shape: tuple[int, ...], rank: int) -> Shapes:
    """PEFT wraps the module of the experts once for each of its parameters, the first innermost."""
    count, size_out, size_in = shape
    module, _, name = parameter.rpartition(".")
    start = _ADAPTER_PREFIX + module + (".base_layer" if name == "gate_up_proj" else "")
    return {
        f"{start}.lora_A.weight": (count * rank, size_in),
        f"{start}.lora_B.weight": (size_out, count * rank),
    }
