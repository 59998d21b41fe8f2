"""What is wrong with settings, in one line that says which, what it must be, and who said so."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from tinsmithd.config.fields import bounds_of, is_secret, kind_of
from tinsmithd.text import bounded

VALUE_BYTES_MAX = 120
"""Bytes of a value that a message repeats."""
BROKEN_RULE = "broken_rule"
"""Type of an error about settings that do not fit together; its context has the `key`."""
NEAR = 0.8
"""Similarity of two names of which one is taken for a typo of the other."""
_OUT_OF_BOUNDS = {"greater_than", "greater_than_equal", "less_than_equal", "literal_error"}
_UNSET = {"missing", "string_too_short"}


class ConfigError(Exception):
    """A setting is unknown or impossible; the message names the key and what is allowed.

    Attributes:
        unset: Keys of the settings that must be set and are not, if nothing else is wrong.
    """

    def __init__(self, message: str, unset: Collection[str] = ()) -> None:
        super().__init__(message)
        self.unset = unset


def broken_rule(key: str, message: str) -> PydanticCustomError:
    """What a rule over several settings raises.

    Args:
        key: The setting that somebody should change.
        message: What it must be.
    """
    return PydanticCustomError(BROKEN_RULE, "{message}", {"key": key, "message": message})


def nearest(name: str, known: Collection[str], form: Callable[[str], str] = str) -> str:
    """Words that follow "unknown key": the name that was meant, or all that there are.

    Args:
        name: The name that nobody knows.
        known: Those that there are.
        form: Gives a known name as it is written where the unknown one stands.
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
    return (
        f"did you mean {form(close[0])}?" if close else f"known are {', '.join(map(form, known))}"
    )


def is_near(name: str, known: str) -> bool:
    """Whether a name looks like a known one with a typo."""
    return difflib.SequenceMatcher(None, name, known).ratio() >= NEAR


@dataclass(frozen=True)
class Report:
    """Says everything that is wrong with the settings of one process.

    Attributes:
        section: Its section.
        fields: The settings that it has.
        origins: Where settings come from that are no defaults.
    """

    section: str
    fields: Mapping[str, FieldInfo]
    origins: Mapping[str, str]

    def of(self, error: ValidationError) -> ConfigError:
        """What pydantic found, in one line."""
        details = error.errors(include_url=False)
        unset = [str(d["loc"][0]) for d in details if d["type"] in _UNSET]
        lines = "; ".join(map(self._line, details))
        return ConfigError(lines, unset if len(unset) == len(details) else ())

    def _line(self, detail: ErrorDetails) -> str:
        kind = detail["type"]
        key = str(detail["ctx"]["key"] if kind == BROKEN_RULE else detail["loc"][0])
        name = f"{self.section}.{key}"
        if key not in self.fields:
            return f"{name}: unknown key; {nearest(key, self.fields)}"
        origin = f" ({self.origins[key]})" if key in self.origins else ""
        if kind == BROKEN_RULE:
            return f"{name}: {detail['msg']}{origin}"
        if kind in _UNSET:
            flag, variable = f"--{key.replace('_', '-')}", f"TINSMITH_{self.section}_{key}".upper()
            return f"{name}: must be set, by {flag}, {variable} or in a file{origin}"
        field = self.fields[key]
        wanted = bounds_of(field)
        if kind not in _OUT_OF_BOUNDS and kind != "value_error":
            wanted = kind_of(field)
        value = bounded(repr(detail["input"]), VALUE_BYTES_MAX)
        is_now = "" if is_secret(field) else f", is {value}"
        return f"{name}: must be {wanted}{is_now}{origin}"
