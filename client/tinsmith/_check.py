"""Arguments of public methods, checked in the caller's thread.

What is wrong is said at once and with its field: before a call has a number, before it is sent.
"""

import operator
import reprlib
from collections.abc import Mapping

import numpy as np
from google.protobuf.duration_pb2 import Duration

from tinsmith.errors import InvalidArgumentError

INT64_MAX = 2**63 - 1
UINT64_MAX = 2**64 - 1
SHOWN_CHARACTERS_MAX = 100


def refuse(field: str, why: str, reason: str = "INVALID_FIELD") -> InvalidArgumentError:
    """The error for an argument; `field` is its name, with the place inside it."""
    return InvalidArgumentError(f"{field}: {why}", field=field, reason=reason)


def shown(value: object) -> str:
    """A value as an error shows it: bounded, whatever it is."""
    try:
        text = reprlib.repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= SHOWN_CHARACTERS_MAX else f"{text[:SHOWN_CHARACTERS_MAX]}..."


def text(value: object, field: str) -> str:
    """A string that UTF-8 can carry.

    Raises:
        InvalidArgumentError: It is none, or has a lone surrogate.
    """
    if not isinstance(value, str):
        hint = "; pass its .path" if isinstance(getattr(value, "path", None), str) else ""
        raise refuse(field, f"expected a string, got {type(value).__name__}{hint}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise refuse(field, f"character {error.start} cannot be sent as UTF-8") from None
    return str(value)  # also of a subclass


def optional_text(value: object, field: str) -> str:
    """As `text`; None is the empty string."""
    return "" if value is None else text(value, field)


def metadata(value: object, field: str = "user_metadata") -> dict[str, str]:
    """A copy of a mapping of strings to strings; None is an empty one.

    Raises:
        InvalidArgumentError: It is none; the field names the entry.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise refuse(field, f"expected a mapping, got {type(value).__name__}")
    return {
        text(key, f"{field}[{shown(key)}]"): text(entry, f"{field}[{shown(key)}]")
        for key, entry in value.items()
    }


def whole(value: object, field: str, least: int = -(2**63), most: int = INT64_MAX) -> int:
    """An integer in a range: of Python, or a scalar of numpy or torch.

    Raises:
        InvalidArgumentError: It is none (a boolean is none, nor is 3.0), or is out of range.
    """
    try:
        if isinstance(value, bool | np.bool_) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise refuse(field, f"expected an integer, got {shown(value)}") from None
    if not least <= number <= most:
        raise refuse(field, f"{shown(number)} is not in {least}..{most}")
    return number


def optional_whole(
    value: object, field: str, least: int = -(2**63), most: int = INT64_MAX
) -> int | None:
    """As `whole`; None stays None."""
    return None if value is None else whole(value, field, least, most)


def optional_ttl(ttl_seconds: object) -> Duration | None:
    """A time to live in whole seconds, as messages have it; None stays None."""
    seconds = optional_whole(ttl_seconds, "ttl_seconds")
    return None if seconds is None else Duration(seconds=seconds)


def seed(value: object, field: str) -> int | None:
    """A seed from -2^63 to 2^64 - 1, as 64 bits without a sign; None stays None."""
    number = optional_whole(value, field, most=UINT64_MAX)
    return None if number is None else number % 2**64


def real(value: object, field: str) -> float:
    """A finite number: of Python, or a scalar of numpy or torch.

    Raises:
        InvalidArgumentError: It is none; a boolean, a string and an array are none.
    """
    dtype = str(getattr(value, "dtype", ""))
    try:
        if isinstance(value, bool | str | bytes | bytearray) or "bool" in dtype:
            raise TypeError
        if getattr(value, "ndim", 0):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise refuse(field, f"expected a number, got {shown(value)}") from None
    if not np.isfinite(number):
        raise refuse(field, f"{number} is not finite", "NON_FINITE")
    return number


def flag(value: object, field: str) -> bool:
    """A boolean of Python or numpy, or 0 or 1.

    Raises:
        InvalidArgumentError: It is none.
    """
    if isinstance(value, bool | np.bool_ | int) and value in (0, 1):
        return bool(value)
    raise refuse(field, f"expected a boolean, got {shown(value)}")
