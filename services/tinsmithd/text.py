"""Text that somebody else wrote, made safe to repeat: escaped and cut, or left out."""

import hashlib
import re

_CUT = "... [cut]"
_TAG_BYTES = 4
_QUOTED = re.compile(r"""(["'`]).*["'`]""", re.DOTALL)


def bounded(text: str, bytes_max: int) -> str:
    """Escape what is not printable, such as a line's end, and cut what is too long.

    A backslash stays one, so that text which was bounded once is not changed by it again.

    Args:
        text: Anything, lone surrogates included.
        bytes_max: Most bytes of the result in UTF-8, at least 16.
    """
    kept = text[: bytes_max + 1]  # a character has at least one byte
    if not kept.isprintable():
        kept = "".join(c if c.isprintable() else _escaped(c) for c in kept)
    data = kept.encode()
    if len(data) <= bytes_max:
        return kept
    return data[: bytes_max - len(_CUT)].decode(errors="ignore") + _CUT


def tag(name: str) -> str:
    """What stands for a name that a caller chose, where the name itself must not stand.

    It is the same for the same name: `~` and what `printf %s NAME | b2sum -l 32` prints.
    """
    data = name.encode(errors="replace")
    return "~" + hashlib.blake2b(data, digest_size=_TAG_BYTES).hexdigest()


def without_quoted(text: str) -> str:
    """A text without what stands in quotes, from the first of them to the last.

    Messages quote what they speak of: values, names, keys of a mapping.
    """
    return _QUOTED.sub(r"\1...\1", text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
