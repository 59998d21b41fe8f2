"""Reads PromQL as far as our expressions go: which series and labels they name, and their parts."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<range>\[[^\]]*\])
    |(?P<number>[0-9][0-9.eE]*(?:ms|[smhdwy])?)
    |(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
    |(?P<mark>=~|!~|==|!=|>=|<=|[-+*/%^(){},=<>])""",
    re.VERBOSE,
)
_GROUPING = ("by", "without", "on", "ignoring", "group_left", "group_right")
_WORDS = ("and", "or", "unless", "bool", "offset")
_CALLS = ("(", *_GROUPING)
"""What follows the name of a function or of an aggregation."""
_COMPARISONS = ("==", "!=", ">", "<", ">=", "<=")


@dataclass
class Named:
    """What an expression names.

    Attributes:
        series: Names of series, each with the labels that its selector names.
        grouping: Labels of groupings and matchings.
    """

    series: list[tuple[str, set[str]]] = field(default_factory=list)
    grouping: set[str] = field(default_factory=set)


def tokens(expression: str) -> list[str]:
    """The tokens of an expression, without space.

    Raises:
        ValueError: There is something that is none.
    """
    found, at = [], 0
    while at < len(expression):
        match = _TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"{expression!r}: what is {expression[at : at + 10]!r}?")
        at = match.end()
        if match.lastgroup != "space":
            found.append(match.group())
    return found


def named(expression: str) -> Named:
    """What an expression names."""
    found, rest = Named(), iter([*tokens(expression), "", ""])
    token = next(rest)
    while token:
        following = next(rest)
        if token in _GROUPING and following == "(":
            found.grouping |= {each for each in _until(rest, ")") if each != ","}
            following = next(rest)
        elif re.match(r"[a-zA-Z_:]", token) and token not in _WORDS and following not in _CALLS:
            labels: set[str] = set()
            if following == "{":
                inner = _until(rest, "}")
                marks = itertools.pairwise(inner)
                labels = {label for label, mark in marks if mark in ("=", "=~", "!=", "!~")}
                following = next(rest)
            found.series.append((token, labels))
        token = following
    return found


def _until(rest: Iterator[str], end: str) -> list[str]:
    found = []
    for token in rest:
        if token == end:
            return found
        found.append(token)
    raise ValueError(f"no {end}")


def operands(expression: str) -> list[str]:
    """What an expression compares, and joins with `and`, `or`, `unless`: those of these parts that
    are no plain numbers. They have values also where the expression is quiet."""
    parts, depth = [[]], 0  # type: ignore[var-annotated]
    for token in tokens(expression):
        depth += (token in "({") - (token in ")}") if len(token) == 1 else 0
        if not depth and (token in _COMPARISONS or token in ("and", "or", "unless")):
            parts.append([])
        else:
            parts[-1].append(token)
    return [_joined(part) for part in parts if any(re.match(r"[a-zA-Z_:]", t) for t in part)]


def _joined(part: list[str]) -> str:
    """Tokens as text, without an `absent` around them."""
    if part[:2] == ["absent", "("]:
        part = part[2:-1]
    return " ".join(part)
