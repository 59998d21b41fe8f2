"""Model shapes that the benchmark runs on, with random weights: speed does not depend on values."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.qwen3 import Qwen3ForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

SEED = 0
ACTIVE_EXPERTS = 8
SHARD_SIZE = "300MB"
"""Maximum size of a weight file."""


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes.

    Attributes:
        name: Also the name of its folder.
        tied: The head shares the embedding's weight.
        family: "llama", "qwen3", or "qwen3_moe", whose experts are as wide as `ffn`.
        experts: Experts of each layer; a token passes through 8 of them.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = True
    context: int = 4096
    family: str = "llama"
    experts: int = 0

    @property
    def head_parameters(self) -> int:
        """Parameters of the output head."""
        return self.hidden * self.vocab

    @property
    def matmul_parameters(self) -> int:
        """Parameters that each token is multiplied with, head included."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        mlp = 3 * self.hidden * self.ffn * (ACTIVE_EXPERTS if self.experts else 1)
        return self.layers * (attention + mlp) + self.head_parameters

    @property
    def head_share(self) -> float:
        """Part of the matmul work that the head takes."""
        return self.head_parameters / self.matmul_parameters


T = Shape("T", 128, 2, 4, 2, 32, 384, 1024)
"""Half a million parameters: for tests of the benchmark itself, and for many models at once."""
S = Shape("S", 384, 8, 6, 2, 64, 1024, 12_288)
"""The shape of most ratios: 12.6 M and a head of 4.7 M, whose share is that of Qwen2.5-0.5B."""
H = Shape("H", 256, 4, 4, 2, 64, 768, 151_936)
"""The vocabulary of Qwen on a small body: for memory."""
SMOLLM2_135M = Shape("smollm2-135m", 576, 30, 9, 3, 64, 1536, 49_152, context=8192)
E = Shape("E", 256, 2, 4, 2, 64, 128, 1024, family="qwen3_moe", experts=128)
"""Qwen3-30B-A3B scaled down: 128 experts, of which a token passes through 8; 100 MB of them."""
QWEN3_0_6B = Shape("qwen3-0.6b", 1024, 28, 16, 8, 128, 3072, 151_936, family="qwen3")
QWEN3_4B = Shape("qwen3-4b", 2560, 36, 32, 8, 128, 9728, 151_936, family="qwen3")

L = Shape("L", 2048, 16, 16, 4, 128, 5632, 32_000, tied=False, family="qwen3")
"""852 M parameters, 1.7 GB in bfloat16: for what loading takes."""

SHAPES = {shape.name: shape for shape in (T, S, H, E, SMOLLM2_135M, QWEN3_0_6B, QWEN3_4B, L)}


def write_model(shape: Shape, root: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a Hugging Face folder with random weights, unless it is there; returns it."""
    folder = root / shape.name
    done = folder / "tokenizer_config.json"  # the last file written
    if not done.exists():
        transformers_logging.disable_progress_bar()
        torch.manual_seed(SEED)
        model = _model(shape, dtype)
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        vocabulary = {"<eos>": 0} | {f"t{index}": index for index in range(1, 16)}
        words = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<eos>"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return folder


def _model(shape: Shape, dtype: torch.dtype) -> torch.nn.Module:
    sizes = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.context,
        "initializer_range": 0.05,  # wide enough that predictions differ from token to token
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        "dtype": dtype,
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that no larger copy is made first
    try:
        if shape.family == "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**sizes))
        if shape.family == "qwen3_moe":
            experts = {"num_experts": shape.experts, "num_experts_per_tok": ACTIVE_EXPERTS}
            config = Qwen3MoeConfig(**sizes, **experts, moe_intermediate_size=shape.ffn)
            return Qwen3MoeForCausalLM(config)
        return LlamaForCausalLM(LlamaConfig(**sizes))
    finally:
        torch.set_default_dtype(before)
