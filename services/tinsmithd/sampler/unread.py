"""What a request has made and its reader has not taken yet.

The engine never waits for a reader: what it makes is put in at once. It is kept in flat arrays per
sequence, so that a call whose reader takes nothing costs 16 bytes per token, of which
`sample_tokens_max` bounds the number, and 8 per alternative, which `alternatives_max` bounds. A
reader that comes late gets all of it at once.
"""

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import numpy as np

from tinsmithd.domain import Output, PromptScores, SampledTokens, StopReason, TopKLogprobs


@dataclass
class _Tokens:
    """The unread tokens of one sequence."""

    tokens: "array[int]" = field(default_factory=lambda: array("q"))
    logprobs: "array[float]" = field(default_factory=lambda: array("d"))
    topk_k: int = 0
    topk_token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    topk_logprobs: "array[float]" = field(default_factory=lambda: array("f"))
    stop_reason: StopReason | None = None

    def add(self, made: SampledTokens) -> None:
        """Take more of them."""
        self.tokens.extend(made.tokens)
        self.logprobs.extend(made.logprobs)
        self.stop_reason = made.stop_reason
        if made.topk is not None:
            self.topk_k = made.topk.token_ids.shape[1]
            self.topk_token_ids.frombytes(made.topk.token_ids.astype(np.int32).tobytes())
            self.topk_logprobs.frombytes(made.topk.logprobs.astype(np.float32).tobytes())

    def as_sampled(self, index: int) -> SampledTokens:
        """All of them, as those of the sequence with this index."""
        topk = None
        if self.topk_k:
            topk = TopKLogprobs(
                np.array(self.topk_token_ids, np.int64).reshape(-1, self.topk_k),
                np.array(self.topk_logprobs, np.float32).reshape(-1, self.topk_k),
            )
        tokens, logprobs = self.tokens.tolist(), self.logprobs.tolist()
        return SampledTokens(index, tokens, logprobs, self.stop_reason, topk)


class Unread:
    """A buffer with one writer and one reader, on one event loop."""

    def __init__(self) -> None:
        self._scores: PromptScores | None = None
        self._cache_hits = 0
        self._sequences: dict[int, _Tokens] = {}
        self._error: Exception | None = None
        self._ended = False
        self._changed = asyncio.Event()
        self._pause: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        """Add what was made."""
        if output.prompt_scores is not None:
            self._scores = output.prompt_scores
        self._cache_hits += output.prompt_cache_hit_tokens
        for made in output.tokens:
            self._sequences.setdefault(made.sequence_index, _Tokens()).add(made)
        self._changed.set()

    def end(self, error: Exception | None = None) -> None:
        """Put nothing more in; the reader hears of an error once it has read what was made."""
        self._error, self._ended = error, True
        if self._pause is not None:
            _end_pause(self._pause)
        self._changed.set()

    async def read(
        self, pause_s: Callable[[], float], *, first_pause_s: float = 0.0
    ) -> AsyncIterator[Output]:
        """All that comes, until its end, which is given out at once.

        Args:
            pause_s: How long to gather more after each output.
            first_pause_s: How long before the first one.

        Raises:
            Exception: What it ended with.
        """
        if first_pause_s:
            await self._gather(first_pause_s)
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._scores is not None:
                scores, self._scores = self._scores, None
                yield Output(prompt_scores=scores, prompt_cache_hit_tokens=self._hits())
            if self._sequences:
                sequences, self._sequences = self._sequences, {}
                tokens = [made.as_sampled(index) for index, made in sequences.items()]
                yield Output(tokens=tokens, prompt_cache_hit_tokens=self._hits())
            if self._ended:
                if self._scores or self._sequences:  # more came while the last was being read
                    self._changed.set()
                    continue
                if self._error is not None:
                    raise self._error
                return
            await self._gather(pause_s())

    def _hits(self) -> int:
        hits, self._cache_hits = self._cache_hits, 0
        return hits

    async def _gather(self, pause_s: float) -> None:
        """Wait so long, or until the end."""
        if self._ended:
            return
        self._pause = asyncio.get_running_loop().create_future()
        timer = self._pause.get_loop().call_later(pause_s, _end_pause, self._pause)
        try:
            await self._pause
        finally:
            timer.cancel()
            self._pause = None


def _end_pause(pause: "asyncio.Future[None]") -> None:
    if not pause.done():
        pause.set_result(None)
