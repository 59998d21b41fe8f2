"""Files and functions stay small enough to be read at once, and lines of prose too."""

import re
from collections.abc import Iterator
from pathlib import Path

from tidy.house import ROOT, Source, files, functions, sources

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
MARKDOWN_COLUMNS_MAX = 100


def too_long(source: Source) -> Iterator[str]:
    """What of a file is longer than it may be."""
    count = source.text.count("\n")
    if count > FILE_LINES_MAX:
        yield f"{source.path}: {count} lines, at most {FILE_LINES_MAX}"
    for name, line, length in functions(source):
        if length > FUNCTION_LINES_MAX:
            yield f"{source.path}:{line}: {name} has {length} lines, at most {FUNCTION_LINES_MAX}"


def too_wide(path: Path, text: str) -> Iterator[str]:
    """Lines of prose that are too wide; tables, code and links cannot be wrapped."""
    in_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        wrappable = not in_code and not line.lstrip().startswith("|")
        if wrappable and len(re.sub(r"\]\([^)]*\)", "]()", line)) > MARKDOWN_COLUMNS_MAX:
            yield f"{path}:{number}: {len(line)} columns, at most {MARKDOWN_COLUMNS_MAX}"


def test_files_and_functions_are_small() -> None:
    found = [text for source in sources() for text in too_long(source)]
    assert not found, "\n".join(found)


def test_prose_is_wrapped() -> None:
    found = [text for path in files(".md") for text in too_wide(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


def test_a_planted_long_file_is_found() -> None:
    source = Source.of(Path("services/x.py"), "x = 1\n" * 401)
    assert list(too_long(source)) == ["services/x.py: 401 lines, at most 400"]


def test_a_planted_long_function_is_found() -> None:
    source = Source.of(Path("services/x.py"), "def f():\n" + "    x = 1\n" * 70)
    assert list(too_long(source)) == ["services/x.py:1: f has 71 lines, at most 70"]


def test_planted_wide_prose_is_found() -> None:
    text = "x" * 101 + "\n| " + "x" * 101 + " |\n```\n" + "x" * 101 + "\n```\n"
    assert list(too_wide(Path("a.md"), text)) == ["a.md:1: 101 columns, at most 100"]
