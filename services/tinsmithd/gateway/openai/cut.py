"""Ends a text where a stop string begins."""

from collections.abc import Sequence


class Cut:
    """Follows a text that comes in pieces, and gives out what comes before the first stop string.

    What may be the beginning of one is held back until it is none. A piece costs time in proportion
    to its length and to the number of strings, however they overlap (Knuth, Morris and Pratt 1977).

    Args:
        strings: The stop strings, none of them empty.

    Attributes:
        stopped: A stop string has come; what follows has no meaning.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.stopped = False
        self._matchers = [_Matcher(string) for string in strings]
        self._held = ""

    def add(self, text: str) -> str:
        """Take the next piece; returns the text that is certain with it."""
        if self.stopped:
            return ""
        if not self._matchers:
            return text
        start = len(self._held)
        self._held += text
        for offset, char in enumerate(text, start + 1):
            ended = [m.length for m in self._matchers if m.step(char)]
            if ended:
                self.stopped = True
                out, self._held = self._held[: offset - max(ended)], ""
                return out
        certain = len(self._held) - max(m.matched for m in self._matchers)
        out, self._held = self._held[:certain], self._held[certain:]
        return out

    def rest(self) -> str:
        """What was held back, once nothing follows."""
        out, self._held = self._held, ""
        return out


class _Matcher:
    """Finds one string.

    Attributes:
        length: Its characters.
        matched: How many of its first characters the text ends with.
    """

    def __init__(self, string: str) -> None:
        self.length = len(string)
        self.matched = 0
        self._string = string
        self._back = [0] * len(string)
        for index in range(1, len(string)):
            back = self._back[index - 1]
            while back and string[index] != string[back]:
                back = self._back[back - 1]
            self._back[index] = back + (string[index] == string[back])

    def step(self, char: str) -> bool:
        """Take the next character; True where the string ends with it."""
        while self.matched and char != self._string[self.matched]:
            self.matched = self._back[self.matched - 1]
        self.matched += char == self._string[self.matched]
        return self.matched == self.length
