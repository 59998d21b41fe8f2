"""Decides when a sequence ends."""

from collections.abc import Callable, Collection, Sequence

from tinsmithd.domain import SamplingParams, StopReason


class StopCheck:
    """Follows one sequence of new tokens.

    Args:
        params: Its stop tokens, stop strings and length.
        eos_ids: The model's end-of-sequence tokens, which count when `params.stop_at_eos`.
        decode: Turns token ids into text.
    """

    def __init__(
        self,
        params: SamplingParams,
        eos_ids: Collection[int],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._max_tokens = params.max_tokens
        self._tokens = set(params.stop_tokens)
        if params.stop_at_eos:
            self._tokens.update(eos_ids)
        self._strings = params.stop_strings
        self._decode = decode
        self._made: list[int] = []

    def add(self, token: int) -> StopReason | None:
        """Take the next token in; says why the sequence ends with it, if it does."""
        self._made.append(token)
        # Text is decoded as a whole: a character or a stop string may be spread over tokens.
        if token in self._tokens or (self._strings and self._contains_stop()):
            return StopReason.STOP
        return StopReason.LENGTH if len(self._made) >= self._max_tokens else None

    def _contains_stop(self) -> bool:
        text = self._decode(self._made)
        return any(string in text for string in self._strings)
