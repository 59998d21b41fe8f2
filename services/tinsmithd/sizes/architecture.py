"""Reads the shape of a base model from its `config.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinsmithd.text import bounded

CONFIG_FILE = "config.json"
CONFIG_BYTES_MAX = 16 * 1024 * 1024
NUMBER_MAX = 1 << 31
LAYERS_MAX = 10_000

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Architectures whose formulas are known here: those that `modeling.supported` has."""

BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2}
_FILE_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Unreadable(ValueError):
    """There is no configuration, or none that the formulas are for; the message is a sentence."""


@dataclass(frozen=True)
class Architecture:
    """The shape of a base model.

    Attributes:
        name: For a person.
        model_type: One of `MODEL_TYPES`.
        layer_count: Decoder layers.
        hidden_size: Width of the residual stream.
        head_count: Query heads.
        kv_head_count: Key and value heads.
        head_size: Width of a head.
        ffn_size: Width of the MLP of a layer without experts.
        vocab_size: Tokens.
        context_length: Tokens of the longest sequence that it was made for.
        tied: Whether the head is the embedding's weight.
        qkv_bias: Whether queries, keys and values have biases.
        output_bias: Whether the output of attention has one.
        mlp_bias: Whether the MLP has biases.
        qk_norm: Whether queries and keys are normalised.
        expert_count: Experts of a layer that has them.
        active_expert_count: Experts that a token passes through.
        expert_ffn_size: Width of an expert.
        expert_layers: Which layers have experts.
        normalises_experts: Whether the shares of a token's experts are made to sum to 1.
        file_dtype_bytes: Bytes of an element in the files.
    """

    name: str
    model_type: str
    layer_count: int
    hidden_size: int
    head_count: int
    kv_head_count: int
    head_size: int
    ffn_size: int
    vocab_size: int
    context_length: int
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    expert_count: int = 0
    active_expert_count: int = 0
    expert_ffn_size: int = 0
    expert_layers: tuple[int, ...] = ()
    normalises_experts: bool = False
    file_dtype_bytes: int = 2

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.head_count * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, or of all value heads."""
        return self.kv_head_count * self.head_size

    @property
    def experts_of_token(self) -> int:
        """Experts that a token passes through in a layer that has some; 0 where none has."""
        return self.active_expert_count if self.expert_layers else 0


def read_architecture(path: Path) -> Architecture:
    """Read a folder's `config.json`, or the file itself.

    Raises:
        Unreadable: See there.
    """
    file = path / CONFIG_FILE if path.is_dir() else path
    try:
        if file.stat().st_size > CONFIG_BYTES_MAX:
            raise Unreadable(f"{file} is too large for a {CONFIG_FILE}")
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"no such folder or {CONFIG_FILE}" if not file.exists() else error.strerror
        message = f"{bounded(str(file), 200)}: {what}; give a folder in Hugging Face format"
        raise Unreadable(f"{message}, or the path of a {CONFIG_FILE}: nothing is fetched") from None
    except ValueError:
        raise Unreadable(f"{file} is not JSON") from None
    if not isinstance(document, Mapping):
        raise Unreadable(f"{file} is not a JSON object")
    folder = file.resolve().parent.name
    return architecture_of(document, folder if file.name == CONFIG_FILE else file.stem)


def architecture_of(document: Mapping[str, Any], name: str) -> Architecture:
    """The architecture that a configuration describes.

    An entry that is missing has the value that transformers gives it.

    Args:
        document: What `config.json` has.
        name: For a person.

    Raises:
        Unreadable: See there.
    """
    model_type = document.get("model_type")
    if model_type not in MODEL_TYPES:
        kind = bounded(str(model_type), 60)
        known = ", ".join(MODEL_TYPES)
        raise Unreadable(f"architecture {kind!r} is not one of {known}")
    read = _Reader(document)
    heads = read.number("num_attention_heads")
    hidden = read.number("hidden_size")
    kv_heads = read.number("num_key_value_heads", 4 if model_type == "qwen3_moe" else heads)
    head_size = read.number("head_dim", 128 if model_type == "qwen3" else hidden // heads)
    if head_size == 0:
        raise Unreadable(f"hidden_size {hidden} is less than num_attention_heads, {heads}")
    if heads % kv_heads:
        raise Unreadable(f"num_attention_heads {heads} is no multiple of {kv_heads} KV heads")
    layers = read.number("num_hidden_layers")
    if layers > LAYERS_MAX:
        raise Unreadable(f"{CONFIG_FILE}: num_hidden_layers is {layers}, at most {LAYERS_MAX}")
    _check_of_no_size(read, layers)
    experts = _experts(read, layers) if model_type == "qwen3_moe" else {}
    has_bias = read.flag("attention_bias") and model_type != "qwen2"
    file_dtype = document.get("dtype", document.get("torch_dtype"))
    return Architecture(
        name=bounded(name, 100),
        model_type=model_type,
        layer_count=layers,
        hidden_size=hidden,
        head_count=heads,
        kv_head_count=kv_heads,
        head_size=head_size,
        ffn_size=read.number("intermediate_size"),
        vocab_size=read.number("vocab_size"),
        context_length=read.number("max_position_embeddings"),
        tied=read.flag("tie_word_embeddings"),
        qkv_bias=has_bias or model_type == "qwen2",
        output_bias=has_bias,
        mlp_bias=read.flag("mlp_bias") and model_type == "llama",
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        file_dtype_bytes=_FILE_DTYPES.get(str(file_dtype), 2),
        **experts,
    )


def _check_of_no_size(read: "_Reader", layer_count: int) -> None:
    """What changes no size is refused all the same where no model could be made of it."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(read.document.get(key) or {}, Mapping):
            raise Unreadable(f"{CONFIG_FILE}: {key} is not an object")
    kinds = read.list_of("layer_types", str)
    if kinds and len(kinds) != layer_count:
        message = f"{len(kinds)} layer_types for {layer_count} layers (num_hidden_layers)"
        raise Unreadable(f"{CONFIG_FILE}: {message}")


def _experts(read: "_Reader", layer_count: int) -> dict[str, Any]:
    count = read.number("num_experts", read.number("num_local_experts", 128))
    step = read.number("decoder_sparse_step", 1)
    without = read.list_of("mlp_only_layers", int)
    return {
        "expert_count": count,
        "active_expert_count": read.number("num_experts_per_tok", 8),
        "expert_ffn_size": read.number("moe_intermediate_size", 768),
        "expert_layers": tuple(
            i for i in range(layer_count) if i not in without and (i + 1) % step == 0
        ),
        "normalises_experts": read.flag("norm_topk_prob"),
    }


class _Reader:
    """Reads entries, which are claims."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document

    def number(self, key: str, default: int | None = None) -> int:
        value = self.document.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < NUMBER_MAX:
            shown = "missing" if value is None else bounded(repr(value), 60)
            raise Unreadable(f"{CONFIG_FILE}: {key} is {shown}, not a whole number above 0")
        return value

    def list_of(self, key: str, kind: type) -> list[Any]:
        value = self.document.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(each) is kind for each in value):
            what = "whole numbers" if kind is int else "texts"
            raise Unreadable(f"{CONFIG_FILE}: {key} is not a list of {what}")
        return value

    def flag(self, key: str) -> bool:
        value = self.document.get(key)
        if value is not None and not isinstance(value, bool):
            shown = bounded(repr(value), 60)
            raise Unreadable(f"{CONFIG_FILE}: {key} is {shown}, not true or false")
        return bool(value)
