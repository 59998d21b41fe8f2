"""Decides when a sequence ends."""

from collections.abc import Collection, Sequence

from tinsmithd.completion_text import CompletionText, Decode
from tinsmithd.domain import SamplingParams, StopReason


class StopCheck:
    """Follows one sequence of new tokens.

    Args:
        params: Its stop tokens, stop strings and length.
        eos_ids: The model's end-of-sequence tokens, which count when `params.stop_at_eos`.
        decode: Turns token ids into text.
        prompt: The tokens before the new ones. Stop strings count in the new text alone.
    """

    def __init__(
        self,
        params: SamplingParams,
        eos_ids: Collection[int],
        decode: Decode,
        prompt: Sequence[int] = (),
    ) -> None:
        self._max_tokens = params.max_tokens
        self._tokens = set(params.stop_tokens)
        if params.stop_at_eos:
            self._tokens.update(eos_ids)
        self._strings = params.stop_strings
        self._made = 0
        self._end = ""
        self._end_chars = max(map(len, self._strings), default=0) - 1
        """Maximum characters at the end of the text that may become part of a stop string."""
        self._text = CompletionText(decode, prompt) if self._strings else None

    def add(self, token: int) -> StopReason | None:
        """Take the next token; returns why the sequence ends with it, or None."""
        self._made += 1
        if token in self._tokens or self._completes_stop(token):
            return StopReason.STOP
        return StopReason.LENGTH if self._made >= self._max_tokens else None

    def _completes_stop(self, token: int) -> bool:
        if self._text is None:
            return False
        text = self._end + self._text.add(token)
        if any(string in text for string in self._strings):
            return True
        self._end = text[-self._end_chars :] if self._end_chars else ""
        return False
