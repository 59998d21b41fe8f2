"""The rooms of the house: how many there are, that none is reached into, and that the map is true.

`make map` draws the picture anew.
"""

import pytest

from tidy.map import DOCUMENT, arrows, drawn, floors, imports, picture

ROOMS_MAX, FLOORS_MAX = 10, 8


def test_no_rooms_import_each_other_in_a_circle() -> None:
    pairs = imports()
    packages = {module.rpartition(".")[0] for pair in pairs for module in pair}
    for place in sorted(packages - {""}):
        floors(arrows(place, pairs))


def test_the_training_server_is_a_small_house() -> None:
    of = arrows("tinsmithd.training", imports())
    assert len(of) <= ROOMS_MAX
    assert max(floors(of).values()) <= FLOORS_MAX


def _reached_into(pairs: list[tuple[str, str]]) -> list[str]:
    """Imports of a file that begins with an underscore from outside its folder."""
    found = []
    for importer, imported in pairs:
        room, _, name = imported.rpartition(".")
        private = name.startswith("_") and not name.startswith("__")
        if private and not (importer == room or importer.startswith(f"{room}.")):
            found.append(f"{importer} -> {imported}")
    return found


def test_no_private_file_is_imported_from_another_room() -> None:
    assert _reached_into(list(imports())) == []


def test_the_map_in_the_documents_is_true() -> None:
    assert DOCUMENT.read_text() == drawn(), "run `make map`"


def test_a_planted_circle_is_found() -> None:
    pairs = [("p.a.x", "p.b"), ("p.b", "p.c"), ("p.c.y", "p.a")]
    with pytest.raises(ValueError, match="a -> b -> c -> a"):
        floors(arrows("p", pairs))


def test_a_planted_reach_into_a_room_is_found() -> None:
    pairs = [("p.a", "p.b._x"), ("p.b", "p.b._x"), ("p.b.y", "p.b._x"), ("p.a", "p.b.__main__")]
    assert _reached_into(pairs) == ["p.a -> p.b._x"]


def test_a_picture_leaves_out_what_a_longer_way_goes_along() -> None:
    pairs = [("p.a", "p.b"), ("p.b", "p.c"), ("p.a", "p.c")]
    text = picture("p", pairs)
    assert "`p`: 3 rooms on 3 floors, 3 arrows" in text
    assert "a --> b" in text
    assert "b --> c" in text
    assert "a --> c" not in text
