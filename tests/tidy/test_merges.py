"""Nothing is left of a merge that had conflicts, as it was or as a formatter of prose left it."""

import re
from collections.abc import Iterator
from pathlib import Path

from tidy.house import ROOT, files

MARKS = ("<" * 7, ">" * 7)


def residue(path: Path, text: str) -> Iterator[str]:
    """Lines with a conflict's mark; prose may have it escaped, or as a quotation in a quotation."""
    for number, line in enumerate(text.splitlines(), 1):
        bare = re.sub(r"[\\ ]", "", line)
        if any(mark in bare for mark in MARKS):
            yield f"{path}:{number}: {line[:40]}"


def test_no_conflict_is_left() -> None:
    texts = {path: (ROOT / path).read_text() for path in files(".md", ".py", ".proto", ".toml")}
    found = [line for path, text in texts.items() for line in residue(path, text)]
    assert not found, "\n".join(found)


def test_a_planted_residue_is_found() -> None:
    marks = ["# **Decision.** \\" + "<<\\<<\\" + "<<< HEAD", "> " * 7 + "22be286 (wip)"]
    assert len(list(residue(Path("a.md"), "\n".join(["fine", *marks])))) == 2
