"""Tokenizers as other models have them, small and made here."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers

WORDS = ("Hello", "world", "User", "Stop", "a", "b", "c", "the", "end", ".", ":", "!", "ed", "s")


def llama2_tokenizer(words: tuple[str, ...] = WORDS) -> Tokenizer:
    """SentencePiece's way, as Llama-2 has it: "▁" for a space and before each text, whose first
    space is dropped when it is decoded, and byte tokens for what has no token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [f"▁{word}" for word in words] + list(words)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def write_llama2_tokenizer(folder: Path) -> dict[str, bytes]:
    """Write its files as transformers 4 does, in place of those that a folder has.

    Returns:
        They.
    """
    special = {
        name: {"content": content, "lstrip": False, "normalized": False, "rstrip": False}
        for name, content in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(index): {**special[name], "single_word": False, "special": True}
            for index, name in enumerate(("unk_token", "bos_token", "eos_token"))
        },
        "additional_special_tokens": [],
        "bos_token": "<s>",
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    files = {
        "tokenizer.json": llama2_tokenizer().to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "special_tokens_map.json": (json.dumps(special, indent=2) + "\n").encode(),
        "added_tokens.json": b'{\n  "<s>": 1\n}\n',
        "tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\xff",
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files
