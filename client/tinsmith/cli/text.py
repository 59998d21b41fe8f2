"""Texts that others wrote, made safe to show; times and sizes as people read and type them."""

import re
from datetime import UTC, datetime

CHARACTERS_MAX = 300
"""Longest text of somebody else's in a line or a cell."""
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""What makes a terminal show a text in another order than it has."""


def plain(text: object, characters_max: int = CHARACTERS_MAX) -> str:
    """One line: what is not printable is escaped, what is too long is cut."""
    kept = str(text)
    cut = len(kept) > characters_max
    kept = kept[:characters_max]
    if not kept.isprintable():
        kept = "".join(c if c.isprintable() else _escaped(c) for c in kept)
    return f"{kept}..." if cut else kept


def prose(text: str) -> str:
    """Text of any length with its lines and tabs; what could move a terminal is escaped."""
    return "".join(_escaped(c) if _moves(c) else c for c in text)


def _moves(character: str) -> bool:
    number = ord(character)
    if number < 0x20 or 0x7F <= number < 0xA0:
        return character not in "\n\t"
    return character in _TURNS or 0xD800 <= number < 0xE000


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def size(nbytes: int) -> str:
    """Bytes as people read them, in powers of 1,000."""
    amount = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(amount) < 1000:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:,.1f} TB"


def counted(number: int, noun: str) -> str:
    """`1 model`, `2 models`, `no models`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s") if number else f"no {noun}s"


def span(seconds: float) -> str:
    """A time span in one unit: `12 s`, `3 min`, `5 h`, `2 d`."""
    for most, per, unit in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < most:
            return f"{seconds / per:.0f} {unit}"
    return f"{seconds / 86_400:,.0f} d"


def since(moment: str | None, now: datetime) -> str:
    """How long ago an ISO 8601 time was, or how far ahead it is; empty for None."""
    if moment is None:
        return ""
    seconds = (now - datetime.fromisoformat(moment)).total_seconds()
    return f"{span(seconds)} ago" if seconds >= 0 else f"in {span(-seconds)}"


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


def seconds_of(text: str) -> int:
    """Seconds of `90`, `90s`, `30m`, `12h`, `7d` or `2w`.

    Raises:
        ValueError: It is none of these.
    """
    found = re.fullmatch(r"([0-9]{1,12})([smhdw]?)", text.strip())
    if found is None:
        raise ValueError(f"{plain(text, 40)} is no time span, such as 90s, 30m, 12h or 7d")
    return int(found[1]) * _UNITS_S[found[2] or "s"]
