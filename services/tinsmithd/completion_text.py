"""The text of tokens that come one by one."""

from collections.abc import Callable, Sequence

CONTEXT_TOKENS = (8, 9, 10, 11, 64)
"""Numbers of a prompt's last tokens that may be decoded with a completion. It is the first number
with which that text is not empty and does not begin in the middle of a character."""
CHARACTER_BYTES_MAX = 4
HELD_TOKENS_MAX = 8
"""Maximum tokens of one character; more cannot be one, since it has at most four bytes."""
_REPLACEMENT = "\ufffd"
"""A tokenizer writes it for bytes that are no character, or none yet."""

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text."""


class CompletionText:
    """The text of new tokens, piece by piece: decode(context + new) without decode(context).

    A tokenizer writes a token differently at the start of a text than after others (the Llama-2
    family drops a space there), and a character may be spread over tokens. So new tokens are
    decoded together with a few tokens before them, and never with all, which bounds the cost.

    Args:
        decode: Turns token ids into text.
        prompt: The tokens before the completion.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._text = ""
        for count in CONTEXT_TOKENS if len(prompt) else ():
            self._window = list(map(int, prompt[-count:]))
            self._text = decode(self._window)
            if self._text and not self._text.startswith(_REPLACEMENT):
                break
        if not self._text:
            self._window = []
        self._context = len(self._window)
        """Number of tokens in the window whose text was given out."""
        self._given = self._whole_chars()
        """Number of characters in the window that were given out."""

    def _whole_chars(self) -> int:
        """Number of characters in the context, without one that new tokens may complete."""
        text = self._text
        for dropped in range(1, CHARACTER_BYTES_MAX):
            if not text.endswith(_REPLACEMENT):
                break
            text = self._decode(self._window[:-dropped])
        return len(text.rstrip(_REPLACEMENT))

    def add(self, token: int) -> str:
        """Take the next token; returns the text that became certain with it."""
        window = [*self._window, token]
        text = self._decode(window)
        if text == self._text and not text.endswith(_REPLACEMENT):
            return ""  # a token without text and effect: the window need not grow
        self._window, self._text = window, text
        held = text.endswith(_REPLACEMENT) and len(window) - self._context < HELD_TOKENS_MAX
        new = (text.rstrip(_REPLACEMENT) if held else text)[self._given :]
        self._given += len(new)
        if not held:
            self._window = window[self._context :]
            self._text = self._decode(self._window)
            self._context, self._given = len(self._window), len(self._text)
        return new

    def rest(self) -> str:
        """What `add` held back for tokens that do not come any more."""
        new = self._text[self._given :]
        self._given = len(self._text)
        return new
