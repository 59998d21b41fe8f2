"""What a request has made and its reader has not taken yet.

The engine never waits for a reader: what it makes is put in at once. It is kept in two flat arrays
per sequence, so that a call whose reader takes nothing costs 16 bytes per token, and
`sample_tokens_max` bounds the number of tokens. A reader that comes late gets all of it at once.
"""

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from tinsmithd.domain import Output, PromptScores, SampledTokens, StopReason


@dataclass
class _Tokens:
    """The unread tokens of one sequence."""

    tokens: "array[int]" = field(default_factory=lambda: array("q"))
    logprobs: "array[float]" = field(default_factory=lambda: array("d"))
    stop_reason: StopReason | None = None


class Unread:
    """A buffer with one writer and one reader, on one event loop."""

    def __init__(self) -> None:
        self._scores: PromptScores | None = None
        self._sequences: dict[int, _Tokens] = {}
        self._error: Exception | None = None
        self._ended = False
        self._changed = asyncio.Event()
        self._pause: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        """Add what was made."""
        if output.prompt_scores is not None:
            self._scores = output.prompt_scores
        for made in output.tokens:
            unread = self._sequences.setdefault(made.sequence_index, _Tokens())
            unread.tokens.extend(made.tokens)
            unread.logprobs.extend(made.logprobs)
            unread.stop_reason = made.stop_reason
        self._changed.set()

    def end(self, error: Exception | None = None) -> None:
        """Put nothing more in; the reader hears of an error once it has read what was made."""
        self._error, self._ended = error, True
        if self._pause is not None:
            _end_pause(self._pause)
        self._changed.set()

    async def read(self, pause_s: Callable[[], float]) -> AsyncIterator[Output]:
        """All that comes, until its end.

        Args:
            pause_s: How long to gather more after each output; the end is given out at once.

        Raises:
            Exception: What it ended with.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._scores is not None:
                scores, self._scores = self._scores, None
                yield Output(prompt_scores=scores)
            if self._sequences:
                sequences, self._sequences = self._sequences, {}
                yield Output(tokens=[_sampled(i, made) for i, made in sequences.items()])
            if self._ended:
                if self._scores or self._sequences:  # more came while the last was being read
                    self._changed.set()
                    continue
                if self._error is not None:
                    raise self._error
                return
            await self._gather(pause_s())

    async def _gather(self, pause_s: float) -> None:
        """Wait so long, or until the end."""
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


def _sampled(index: int, made: _Tokens) -> SampledTokens:
    return SampledTokens(index, made.tokens.tolist(), made.logprobs.tolist(), made.stop_reason)
