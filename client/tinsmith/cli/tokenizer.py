"""The base model's tokenizer for a prompt from the shell.

The package tokenizers reads it in a moment; transformers, which needs seconds where torch is
installed, is for chat templates and for what tokenizers does not read.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tinsmith._tokenizer import load_tokenizer
from tinsmith.cli.failures import USAGE, Failed

FILE = "tokenizer.json"


class Tokenizer:
    """Text to tokens and back.

    Args:
        folder: That has the files of the base model's tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fast = _fast(folder / FILE)

    @cached_property
    def _whole(self) -> Any:
        return load_tokenizer(self._folder)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with what the tokenizer begins a text with."""
        if self._fast is None:
            return list(map(int, self._whole.encode(text)))
        return list(map(int, self._fast.encode(text).ids))

    def encode_chat(self, text: str, system: str) -> list[int]:
        """Tokens of a user's message in the chat template, up to where the answer begins.

        Args:
            text: The message.
            system: The system message; empty for none.

        Raises:
            Failed: There is no template.
        """
        if not getattr(self._whole, "chat_template", None):
            raise Failed("the base model has no chat template", "leave --chat out", USAGE)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        # As text first: what the template gives as tokens has another type in each release.
        prompt = self._whole.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return list(map(int, self._whole.encode(prompt, add_special_tokens=False)))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        one = self._whole if self._fast is None else self._fast
        return str(one.decode(list(tokens), skip_special_tokens=True))


def _fast(file: Path) -> Any:
    """None where that cannot read it."""
    try:
        from tokenizers import Tokenizer as Rust

        found = Rust.from_file(str(file))
    except Exception:  # the library raises nothing narrower; transformers may still read it
        return None
    found.no_truncation()
    found.no_padding()
    return found
