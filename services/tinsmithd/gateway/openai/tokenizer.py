"""A base model's tokenizer, read from the files that its Sampler has, without transformers."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from tinsmithd.gateway.openai.templates import ChatTemplate, TemplateProblem
from tinsmithd.gateway.problems import Problem

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_METASPACE = "▁"


class Tokenizer:
    """Text to tokens and back, and chats to prompts.

    Args:
        files: As `Sampler.GetTokenizer` gives them, by their names.

    Raises:
        Problem: 501: there is no file that can be read without transformers.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        if TOKENIZER_FILE not in files:
            raise Problem(501, f"the base model has no {TOKENIZER_FILE}; only gRPC serves it")
        try:
            self._rust = RustTokenizer.from_buffer(bytes(files[TOKENIZER_FILE]))
            described = json.loads(files[TOKENIZER_FILE])
            config = json.loads(files.get(CONFIG_FILE, b"{}"))
        except Exception as error:  # the library raises nothing narrower
            raise Problem(501, f"the base model's tokenizer cannot be read: {error}") from None
        self._rust.no_truncation()
        self._rust.no_padding()
        kinds = set(_kinds(described.get("decoder")))
        self._byte_level = "ByteLevel" in kinds
        self._metaspace = bool({"Metaspace", "Replace"} & kinds)
        self._added = {i: t.content for i, t in self._rust.get_added_tokens_decoder().items()}
        self._longest = max(map(len, self._rust.get_vocab()), default=1)
        self._special = _special_tokens(config)
        self._templates = _templates(files, config)
        self._read: dict[str, ChatTemplate] = {}

    def encode(self, text: str, *, begins: bool) -> list[int]:
        """Tokens of a text.

        Args:
            text: The text.
            begins: Put before it what the tokenizer begins a text with, such as `bos_token`.
        """
        found: list[int] = self._rust.encode(text, add_special_tokens=begins).ids
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        text: str = self._rust.decode(list(tokens), skip_special_tokens=True)
        return text

    def characters_max(self, tokens: int) -> int:
        """Most characters that so many tokens can have."""
        return tokens * self._longest

    def piece(self, token: int) -> tuple[str, bytes | None]:
        """A token by itself, for a person, and its bytes in UTF-8 where they can be said."""
        if token in self._added:
            return self._added[token], self._added[token].encode()
        piece: str | None = self._rust.id_to_token(token)
        if piece is None:
            return f"token_id:{token}", None
        if self._byte_level:
            if all(char in _BYTE_OF for char in piece):
                data = bytes(_BYTE_OF[char] for char in piece)
                return data.decode(errors="replace"), data
            return piece, piece.encode()
        if found := _BYTE.fullmatch(piece):
            data = bytes([int(found[1], 16)])
            return data.decode(errors="replace"), data
        text = piece.replace(_METASPACE, " ") if self._metaspace else self.decode([token])
        return text, text.encode()

    def template(self, *, tools: bool) -> ChatTemplate:
        """The chat template.

        Args:
            tools: The one for chats with tools, where there are several.

        Raises:
            Problem: 400: there is none, or it takes no tools.
        """
        if not self._templates:
            raise Problem(400, "model: its tokenizer has no chat template", "", "model")
        names = ("tool_use", "default") if tools else ("default",)
        name = next((n for n in names if n in self._templates), next(iter(self._templates)))
        if name not in self._read:
            try:
                self._read[name] = ChatTemplate(self._templates[name], self._special)
            except TemplateProblem as problem:
                raise Problem(501, str(problem)) from None
        if tools and not self._read[name].takes_tools:
            why = "tools: the model's chat template takes none"
            raise Problem(400, why, "UNSUPPORTED_PARAMETER", "tools")
        return self._read[name]


def _kinds(decoder: Any) -> list[str]:
    """Kinds of a decoder and of those in it."""
    if not isinstance(decoder, dict):
        return []
    inner = [kind for each in decoder.get("decoders", []) for kind in _kinds(each)]
    return [str(decoder.get("type")), *inner]


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _SPECIAL:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[name] = content
    return found


def _templates(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by their names; a file of its own wins over the configuration's."""
    if TEMPLATE_FILE in files:
        return {"default": files[TEMPLATE_FILE].decode(errors="replace")}
    given = config.get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        return {each["name"]: each["template"] for each in given}
    return {}


def _byte_of() -> dict[str, int]:
    """The characters by which byte-level tokenizers, since GPT-2's, write bytes: printable ones
    stand for themselves, the others for the next characters from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    found = {chr(byte): byte for byte in plain}
    return found | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_of()
