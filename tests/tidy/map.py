"""Draws who imports whom, room by room, into docs/architecture.md.

A room is a folder, or a file that stands beside folders. Its floor is the length of the longest
way down from it: rooms on floor 1 import no other room.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set

import grimp

from tidy.house import ROOT

DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- map: begin; `make map` writes it -->", "<!-- map: end -->"
PLACES = ("tinsmithd", "tinsmithd.training", "tinsmithd.trainer")
IGNORED = ("__main__", "__init__")

Arrows = Mapping[str, Set[str]]
"""By room, the rooms that it imports."""


def imports() -> Sequence[tuple[str, str]]:
    """All pairs of modules of ours, importer first."""
    graph = grimp.build_graph("tinsmith", "tinsmithd", cache_dir=None)
    return [
        (module, imported)
        for module in sorted(graph.modules)
        for imported in sorted(graph.find_modules_directly_imported_by(module))
    ]


def room_of(module: str, place: str) -> str | None:
    """The room of a place that a module is in; None where it is in none."""
    if not module.startswith(f"{place}."):
        return None
    room = module[len(place) + 1 :].split(".")[0]
    return None if room in IGNORED else room


def arrows(place: str, pairs: Sequence[tuple[str, str]]) -> Arrows:
    """Between the rooms of a place."""
    found: dict[str, set[str]] = defaultdict(set)
    for importer, imported in pairs:
        upper, lower = room_of(importer, place), room_of(imported, place)
        for room in (upper, lower):
            if room is not None:
                found[room] |= set()
        if upper is not None and lower is not None and upper != lower:
            found[upper].add(lower)
    return found


def floors(of: Arrows) -> Mapping[str, int]:
    """The floor of each room.

    Raises:
        ValueError: Some import each other in a circle.
    """
    found: dict[str, int] = {}

    def floor(room: str, above: tuple[str, ...]) -> int:
        if room in above:
            raise ValueError(" -> ".join([*above[above.index(room) :], room]))
        if room not in found:
            below = [floor(other, (*above, room)) for other in sorted(of[room])]
            found[room] = 1 + max(below, default=0)
        return found[room]

    for room in sorted(of):
        floor(room, ())
    return found


def _without_shortcuts(of: Arrows) -> Arrows:
    """Without the arrows that a longer way goes along, too: a picture without them is clearer."""

    def reach(room: str) -> Set[str]:
        return of[room] | {far for other in of[room] for far in reach(other)}

    return {
        room: {low for low in below if not any(low in reach(other) for other in below - {low})}
        for room, below in of.items()
    }


def picture(place: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A place as Markdown: a sentence, then the rooms by floor."""
    of = arrows(place, pairs)
    found = floors(of)
    count = sum(map(len, of.values()))
    lines = [
        f"`{place}`: {len(of)} rooms on {max(found.values())} floors, {count} arrows.",
        "An arrow is left out where a longer way goes along it.",
        "",
        "```mermaid",
        "flowchart TD",
    ]
    for number in sorted(set(found.values()), reverse=True):
        rooms = sorted(room for room in found if found[room] == number)
        lines += [
            f"  subgraph floor{number}[floor {number}]",
            *(f"    {r}" for r in rooms),
            "  end",
        ]
    drawn = _without_shortcuts(of)
    lines += [f"  {room} --> {low}" for room in sorted(drawn) for low in sorted(drawn[room])]
    return "\n".join([*lines, "```", ""])


def drawn() -> str:
    """The document as it should be."""
    pairs = imports()
    head, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    pictures = "\n".join(picture(place, pairs) for place in PLACES)
    return f"{head}{BEGIN}\n\n{pictures}\n{END}{tail}"


def main() -> None:
    """Write it."""
    for place in sys.argv[1:]:
        sys.stdout.write(picture(place, imports()))
    if not sys.argv[1:]:
        DOCUMENT.write_text(drawn())


if __name__ == "__main__":
    main()
