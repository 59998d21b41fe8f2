"""Samples as OpenAI's clients see them: text, logprobs in two forms, and why it ended."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmithd.completion_text import CompletionText
from tinsmithd.gateway.openai.calls import Scores, Tokens
from tinsmithd.gateway.openai.cut import Cut
from tinsmithd.gateway.openai.tokenizer import Tokenizer

LOGPROB_LEAST = -9999.0
"""What is less, such as minus infinity, is no number in JSON; OpenAI says this for it."""


@dataclass
class Piece:
    """What is new of one choice.

    Attributes:
        text: New text.
        tokens: New tokens, n of them.
        logprobs: n; None where nothing is known, as of a prompt's first token.
        topk: n; the likeliest tokens with their logprobs, where they were asked for.
        offsets: n; where each token begins in the choice's text, characters.
        finish_reason: "stop" or "length", with the last piece.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    topk: list[Sequence[tuple[int, float]]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def extend(self, other: "Piece") -> None:
        """Put another piece behind this one."""
        self.text += other.text
        self.tokens += other.tokens
        self.logprobs += other.logprobs
        self.topk += other.topk
        self.offsets += other.offsets
        self.finish_reason = other.finish_reason


class Choice:
    """Follows one sample.

    Args:
        tokenizer: The model's.
        prompt: The tokens before it, int (P,).
        stops: Stop strings, which its text does not have.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._text = CompletionText(tokenizer.decode, prompt)
        self._cut = Cut(stops)
        self._characters = 0
        self.made = 0

    def begin(self, text: str, prompt: Sequence[int], scores: Scores | None) -> Piece:
        """The prompt as the first piece, for who asked to have it echoed."""
        piece = Piece(text=text)
        if scores is not None and scores.logprobs is not None:
            piece.tokens = list(map(int, prompt))
            piece.logprobs = _known(scores.logprobs)
            piece.topk = _likeliest(scores.topk_tokens, scores.topk_logprobs)
        return piece

    def set_offsets(self, piece: Piece, tokenizer: Tokenizer) -> None:
        """Say where the tokens of an echoed prompt begin."""
        text = CompletionText(tokenizer.decode, ())
        for token in piece.tokens:
            piece.offsets.append(min(self._characters, len(piece.text)))
            self._characters += len(text.add(token))
        self._characters = len(piece.text)

    def add(self, part: Tokens) -> Piece:
        """Take new tokens."""
        piece = Piece(tokens=part.tokens.tolist(), logprobs=_known(part.logprobs))
        piece.topk = _likeliest(part.topk_tokens, part.topk_logprobs)
        self.made += len(piece.tokens)
        for token in piece.tokens:
            piece.offsets.append(self._characters)
            new = self._text.add(token)
            self._characters += len(new)
            piece.text += self._cut.add(new)
        if part.stop_reason:
            piece.text += self._cut.add(self._text.rest())
            piece.text += self._cut.rest()
            is_length = part.stop_reason == pb.STOP_REASON_LENGTH and not self._cut.stopped
            piece.finish_reason = "length" if is_length else "stop"
        return piece


def _known(logprobs: np.ndarray) -> list[float | None]:
    return [None if math.isnan(each) else _finite(each) for each in logprobs.tolist()]


def _finite(logprob: float) -> float:
    return max(logprob, LOGPROB_LEAST)


def _likeliest(
    tokens: np.ndarray | None, logprobs: np.ndarray | None
) -> list[Sequence[tuple[int, float]]]:
    if tokens is None or logprobs is None:
        return []
    return [
        [(token, _finite(value)) for token, value in zip(*row, strict=True) if value == value]
        for row in zip(tokens.tolist(), logprobs.tolist(), strict=True)
    ]


# --- the two forms --------------------------------------------------------------------------------


def of_chat(piece: Piece, tokenizer: Tokenizer, top: int) -> Mapping[str, Any]:
    """Logprobs of a piece as `chat.completion` has them.

    Args:
        piece: The piece.
        tokenizer: Writes its tokens.
        top: How many of the likeliest tokens to have at each.
    """
    topk = piece.topk or [()] * len(piece.tokens)
    content = [
        {
            **_entry(tokenizer, token, logprob),
            "top_logprobs": [_entry(tokenizer, *each) for each in likeliest[:top]],
        }
        for token, logprob, likeliest in zip(piece.tokens, piece.logprobs, topk, strict=True)
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    text, data = tokenizer.piece(token)
    return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}


def of_completion(piece: Piece, tokenizer: Tokenizer) -> Mapping[str, Any]:
    """Logprobs of a piece as `text_completion` has them."""
    tops: list[Mapping[str, float] | None] | None = None
    if piece.topk:
        tops = [
            None if logprob is None else _by_text(tokenizer, token, logprob, likeliest)
            for token, logprob, likeliest in zip(
                piece.tokens, piece.logprobs, piece.topk, strict=True
            )
        ]
    return {
        "tokens": [_key(tokenizer, token) for token in piece.tokens],
        "token_logprobs": piece.logprobs,
        "top_logprobs": tops,
        "text_offset": piece.offsets,
    }


def _by_text(
    tokenizer: Tokenizer, token: int, logprob: float, likeliest: Sequence[tuple[int, float]]
) -> Mapping[str, float]:
    """The likeliest tokens, and the one that is there; of two with one text the likelier."""
    found: dict[str, float] = {}
    for each, value in [*likeliest, (token, logprob)]:
        key = _key(tokenizer, each)
        found[key] = max(value, found.get(key, value))
    return found


def _key(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or its bytes where they are a part of a character alone."""
    text, data = tokenizer.piece(token)
    if data is None or "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
