"""How much of a recorded surface this client has. `python -m surface.comparing` prints it."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tinsmith.tinker
from surface.listing import listed
from tinsmith.types.unsupported import Unsupported

RECORDED = Path(__file__).parents[1] / "recorded" / "tinker-0.38.0.json"
"""Written by `python tests/surface/listing.py tinker` where that release is installed."""

CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")
INTERNAL = {
    (name, "__init__")
    for name in (
        *("TrainingClient", "SamplingClient", "APIFuture"),
        *("BackcompatTrainingClientFuture", "BackcompatSamplingClientFuture"),
    )
}
"""Nobody makes these but the SDK itself."""


@dataclass(frozen=True)
class Comparison:
    """What was found, as `Class.member` names.

    Attributes:
        total: Members of the SDK's classes.
        missing: Those that are not here; also `module.name` of a name that is not.
        different: Those that a call written for the SDK cannot be made of.
        refused: Those that say at once that they are not supported.
    """

    total: int
    missing: list[str]
    different: list[str]
    refused: list[str]


def compare(recorded: Mapping[str, Any], only: tuple[str, ...] = ()) -> Comparison:
    """Compare a recorded surface with this client's.

    Args:
        recorded: As `listing.listed` has it.
        only: Names of classes; empty: all.
    """
    tinsmith.tinker.install()
    ours = listed("tinker")
    missing = [f"tinker.{name}" for name in recorded["exports"] if name not in ours["exports"]]
    missing += [f"tinker.types.{name}" for name in recorded["types"] if name not in ours["types"]]
    different: list[str] = []
    refused: list[str] = []
    total = 0
    for name, members in recorded["classes"].items():
        if only and name not in only:
            continue
        for member, theirs in members.items():
            if (name, member) in INTERNAL:
                continue
            total += 1
            mine = ours["classes"].get(name, {})
            if _is_refused(name, member):
                refused.append(f"{name}.{member}")
            if theirs == ["*args", "**kwargs"] or _is_refused(name):
                continue  # passes on what it is given; is refused whatever it is given
            if member not in mine:
                missing.append(f"{name}.{member}")
            elif not taken(mine[member], theirs):
                different.append(f"{name}.{member}: {theirs} here {mine[member]}")
    return Comparison(total, missing, different, refused)


def _is_refused(name: str, member: str = "__init__") -> bool:
    """Whether using it raises UnimplementedError; its first words say so, and a test tries them."""
    import tinker

    cls = getattr(tinker, name, None) or getattr(tinker.types, name, None)
    if cls is None or issubclass(cls, Unsupported):
        return cls is not None
    words = (getattr(getattr(cls, member, None), "__doc__", "") or "").split(".")[0]
    return words.startswith(("Not supported", "Refused"))


def taken(ours: Any, theirs: Any) -> bool:
    """Whether a use of `theirs` is one of `ours`: a call by position and by name, or a read."""
    if not isinstance(theirs, list) or not isinstance(ours, list):
        return isinstance(theirs, list) == isinstance(ours, list)
    wanted, mine = _read(theirs), _read(ours)
    any_place, any_name = "*args" in ours, any(name.startswith("**") for name in ours)
    by_place = [name for name, (keyword, _) in wanted.items() if not keyword]
    places = [name for name, (keyword, _) in mine.items() if not keyword]
    return (
        (any_place or places[: len(by_place)] == by_place)
        and all(any_name or name in mine for name in wanted)
        and all(optional or name in wanted for name, (_, optional) in mine.items())
    )


def _read(written: list[str]) -> Mapping[str, tuple[bool, bool]]:
    """Of each parameter: whether only a keyword sets it, and whether it may be left out."""
    read, keyword = {}, False
    for each in written:
        keyword = keyword or each.startswith("*")
        if not each.startswith("*"):
            read[each.rstrip("=")] = (keyword, each.endswith("="))
    return read


def main() -> None:
    """Print the counts and what is missing."""
    recorded = json.loads(RECORDED.read_text())
    for only in (CLIENTS, ()):
        found = compare(recorded, only)
        present = found.total - sum(not name.startswith("tinker.") for name in found.missing)
        same = present - len(found.different)
        which = "the clients" if only else "all classes"
        print(
            f"{which}: {present} of {found.total} present, {same} with the same signature, "
            f"{len(found.refused)} of them refused by name"
        )
    print(*found.missing, *found.different, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
