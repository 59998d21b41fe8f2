"""The table of SDK methods in `docs/tinker.md`: all methods that were recorded of the newest."""

import json
import re
from pathlib import Path

from sdk.methods import BEGIN, DOCUMENT, END, section, written

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests" / "recorded" / "tinker-0.38.0.json"
CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")


def in_table(text: str) -> set[str]:
    """Methods that have a row, and neither a hole nor a failure in it."""
    found, owner = set(), ""
    for line in text.splitlines():
        if heading := re.match(r"\| \*\*(\w+)\*\*", line):
            owner = heading[1]
        elif row := re.match(r"\| `(\w+)` +\|(.*)\|", line):
            cells = [cell.strip() for cell in row[2].split("|")]
            assert set(cells) <= {"works", "refused", "-"}, line
            found.add(f"{owner}.{row[1]}")
    return found


def test_every_method_of_the_newest_sdk_is_in_the_table() -> None:
    """The program that writes it finds them by itself; what was recorded of the SDK agrees."""
    classes = json.loads(RECORDED.read_text())["classes"]
    wanted = {
        f"{name}.{member.removesuffix('_async')}"
        for name in CLIENTS
        for member, what in classes[name].items()
        if isinstance(what, list) and not member.startswith("_")
    }
    text = DOCUMENT.read_text()
    assert wanted <= in_table(text[text.index(BEGIN) : text.index(END)])


def test_the_table_says_what_came_of_each_method() -> None:
    """And of its twin where that is something else; each refusal once."""
    works = {"outcome": "works", "said": "", "s": 0.1}
    refused = {"outcome": "refused", "said": "404 - there is none here", "s": 0.1}
    found = {
        "1.2.3": {
            "A.one": works,
            "A.one_async": works,
            "A.two": works,
            "A.two_async": refused,
            "B.three": refused,
        },
        "1.0.0": {"A.one": works},
    }
    text = section(found)
    assert "| `one`   | works           | works |" in text
    assert "| `two`   | works / refused | -     |" in text
    assert "- 1.2.3: 2 of 3 methods work, 1 refused; 1 of 2 `_async` twins work, 1 refused." in text
    assert text.count("404 - there is none here") == 1
    document = written(f"before\n{BEGIN}\nold\n{END}\nafter\n", found)
    assert document == f"before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n"
