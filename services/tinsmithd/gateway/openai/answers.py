"""Answers in the two forms, whole and as the events of a stream."""

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinsmithd.gateway.openai.calls import Part, Scores
from tinsmithd.gateway.openai.choices import Choice, Piece, of_chat, of_completion
from tinsmithd.gateway.openai.tokenizer import Tokenizer


@dataclass
class Job:
    """One request as it is carried out.

    Attributes:
        model: The model as the caller named it.
        tokenizer: Its tokenizer.
        prompts: Tokens of each prompt, int (P,).
        samples: How many samples of each.
        stops: Stop strings.
        chat: Whether it is a chat.
        logprobs: Whether logprobs are wanted.
        top: How many of the likeliest tokens besides.
        echoes: The texts of the prompts, where the answer is to begin with them.
        samples_tokens: Whether any token is to be sampled.
        usage: Whether a stream ends with what it took.
    """

    model: str
    tokenizer: Tokenizer
    prompts: Sequence[Sequence[int]]
    samples: int
    stops: Sequence[str]
    chat: bool
    logprobs: bool
    top: int
    echoes: Sequence[str] | None = None
    samples_tokens: bool = True
    usage: bool = False
    cached_tokens: int = 0
    choices: list[Choice] = field(init=False)
    name: str = field(init=False)
    created_s: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.name = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.choices = [
            Choice(self.tokenizer, prompt, self.stops)
            for prompt in self.prompts
            for _ in range(self.samples)
        ]

    async def pieces(self, parts: AsyncIterator[Part]) -> AsyncIterator[tuple[int, Piece]]:
        """What is new, with the number of its choice."""
        if not self.samples_tokens and not self.logprobs:
            for index in range(len(self.choices)):
                yield index, self._begin(index, None)
        async for part in parts:
            if isinstance(part, Scores):
                self.cached_tokens += part.cached_tokens
                if self.echoes is not None:
                    first = part.call * self.samples
                    for index in range(first, first + self.samples):
                        yield index, self._begin(index, part)
                continue
            index = part.call * self.samples + part.sequence
            yield index, self.choices[index].add(part)

    def _begin(self, index: int, scores: Scores | None) -> Piece:
        """The first piece of a choice that echoes its prompt, or that has nothing else."""
        prompt = index // self.samples
        text = "" if self.echoes is None else self.echoes[prompt]
        piece = self.choices[index].begin(text, self.prompts[prompt], scores)
        self.choices[index].set_offsets(piece, self.tokenizer)
        if not self.samples_tokens:
            piece.finish_reason = "length"
        return piece

    def used(self) -> Mapping[str, Any]:
        """What the request took, tokens."""
        prompt = sum(map(len, self.prompts))
        made = sum(choice.made for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and every event has."""
        return {"id": self.name, "object": kind, "created": self.created_s, "model": self.model}

    def logprobs_of(self, piece: Piece) -> Mapping[str, Any] | None:
        """A piece's logprobs in the form of this kind of request."""
        if not self.logprobs:
            return None
        if self.chat:
            return of_chat(piece, self.tokenizer, self.top)
        return of_completion(piece, self.tokenizer)


async def whole(job: Job, parts: AsyncIterator[Part]) -> Mapping[str, Any]:
    """The answer in one."""
    found = [Piece() for _ in job.choices]
    async for index, piece in job.pieces(parts):
        found[index].extend(piece)
    choices: list[Mapping[str, Any]] = []
    for index, piece in enumerate(found):
        choice: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason}
        choice["logprobs"] = job.logprobs_of(piece)
        if job.chat:
            choice["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
        else:
            choice["text"] = piece.text
        choices.append(choice)
    kind = "chat.completion" if job.chat else "text_completion"
    return {**job.head(kind), "choices": choices, "usage": job.used()}


async def events(job: Job, parts: AsyncIterator[Part]) -> AsyncGenerator[Mapping[str, Any], None]:
    """The answer as it is made."""
    kind = "chat.completion.chunk" if job.chat else "text_completion"
    head = job.head(kind)
    if job.usage:
        head["usage"] = None
    spoken: set[int] = set()
    async for index, piece in job.pieces(parts):
        shown = piece.text or piece.finish_reason or (job.logprobs and piece.tokens)
        if not shown:
            continue  # such as a part of a character
        choice: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason}
        choice["logprobs"] = job.logprobs_of(piece)
        if job.chat:
            choice["delta"] = (
                {"content": piece.text} if piece.text or not piece.finish_reason else {}
            )
            if index not in spoken:
                spoken.add(index)
                choice["delta"] = {"role": "assistant", "content": piece.text}
        else:
            choice["text"] = piece.text
        yield {**head, "choices": [choice]}
    if job.usage:
        yield {**head, "choices": [], "usage": job.used()}
