"""Text that somebody else wrote, made safe to repeat: escaped and cut."""

_CUT = "... [cut]"


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


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
