"""Tiny random Hugging Face models with a byte-level tokenizer: real code paths, no download.

Whoever writes one needs torch and transformers. A process of tests that does without them lets a
fork of the template write it, which has imported them: that takes seconds of every run.
"""

import json
import sys
from pathlib import Path
from typing import Any

import programs

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
"""What the names of its classes in transformers begin with."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EOS_TOKEN = "<eos>"


def write_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    vocab_size: int = 320,
    context_length: int = 512,
    tie: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Write a model folder and return it.

    Args:
        folder: Where to; it is made.
        family: One of `FAMILIES`.
        vocab_size: At least 257: one token per byte, then the end-of-sequence token; ids above
            are never made by the tokenizer.
        context_length: `max_position_embeddings`.
        tie: Share the embedding with the head.
        seed: Of the random weights.
        settings: More entries of `config.json`.
    """
    choices = {"family": family, "vocab_size": vocab_size, "context_length": context_length}
    choices |= {"tie": tie, "seed": seed, **settings}
    if "torch" in sys.modules:
        _write(folder, **choices)
    else:
        done = programs.run("tiny_models", str(folder), json.dumps(choices), forked=True)
        assert done.returncode == 0, done.stderr
    return folder


def _write(
    folder: Path,
    *,
    family: str,
    vocab_size: int,
    context_length: int,
    tie: bool,
    seed: int,
    **settings: Any,
) -> None:
    import torch
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": tie,
        # Wide enough that predictions differ from token to token.
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": None,
    }
    if family == "qwen3_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    sizes |= settings
    torch.manual_seed(seed)
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**sizes)
    getattr(transformers, f"{FAMILIES[family]}ForCausalLM")(config).save_pretrained(folder)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level BPE without merges: each byte is a token, so every text has one exact encoding.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS_TOKEN])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))


if __name__ == "__main__":
    _write(Path(sys.argv[1]), **json.loads(sys.argv[2]))
