"""What comments, docstrings and documents refer to is there.

A reference is a dotted name in backticks (`lane.Lane`, `tinsmithd.rpc.server`) or a path of a file
(`trainer/compute/head.py`).
"""

import ast
import importlib.util
import io
import itertools
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tidy.house import ROOT, Source, below, files, sources

DOTTED = re.compile(r"`((?:[a-z_][a-z0-9_]*\.)+[A-Za-z_][A-Za-z0-9_]*)(?:\(\))?`")
FILE = re.compile(
    r"`((?:[a-z0-9_]+/)*[a-z0-9_]+\.(?:py|proto|md|toml|yaml))`|\b((?:[a-z0-9_]+/)+[a-z0-9_]+\.py)\b"
)
OWN = re.compile(r"\btinsmithd(?:\.[a-z_][a-z0-9_]*)+(?:\.[A-Z][A-Za-z0-9]*)?")


DECISION = re.compile(r"\[ADR ([0-9]+)\]\((?:[a-z./]*/)?([0-9]{4}-[a-z0-9-]+\.md)\)")


NOT_OURS = {"queue.py", "rl/train.py"}
"""Files that are spoken of and are not in this repository: a user's, the Tinker Cookbook's."""


def names_of(source: Source) -> set[str]:
    """What can follow the dot behind a module: what it defines or imports, members of classes."""
    found: set[str] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[-1])
    return found


def modules() -> Mapping[str, set[str]]:
    """By the last part of its name, what a module of ours has; also the parts of its packages."""
    found: dict[str, set[str]] = {}
    for source in sources():
        parts = source.module.split(".")
        found.setdefault(parts[-1], set()).update(names_of(source))
        for package, name in itertools.pairwise(parts):
            found.setdefault(package, set()).add(name)
    return found


def texts(source: Source) -> Iterator[tuple[int, str]]:
    """The comments and docstrings of a file, with the line that each begins on."""
    for node in ast.walk(source.tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _is_elsewhere(name: str) -> bool:
    """Whether a module that is not ours has this name."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def stale_names(text: str, known: Mapping[str, set[str]]) -> Iterator[str]:
    """References to classes in modules that have none of this name."""
    for match in DOTTED.finditer(text):
        *_, module, name = match.group(1).split(".")
        first = match.group(1).split(".")[0]
        if not name[0].isupper() or name.isupper():
            continue  # an attribute of a value, such as `call.work`
        if name not in known.get(module, set()) and not _is_elsewhere(first):
            yield match.group(1)


def stale_paths(text: str, paths: set[str]) -> Iterator[str]:
    """Paths of files that are not there; a path may leave out the folders that it begins with."""
    for match in FILE.finditer(text):
        path = match.group(1) or match.group(2)
        if path in NOT_OURS:
            continue
        if not any(there == path or there.endswith(f"/{path}") for there in paths):
            yield path


def stale_modules(text: str, there: set[str]) -> Iterator[str]:
    """Dotted names below `tinsmithd` that lead nowhere."""
    for match in OWN.finditer(text):
        name = match.group(0)
        parts = name.split(".")
        if not any(".".join(parts[:end]) in there for end in (len(parts), len(parts) - 1)):
            yield name


def test_references_are_not_stale() -> None:
    known = modules()
    ours = {source.module for source in sources()}
    paths = {str(path) for path in files("")}
    found = []
    for source in below("client", "services", "tests"):
        if source.path.parts[:2] == ("tests", "tidy"):
            continue  # which has stale ones on purpose
        for line, text in texts(source):
            stale = [*stale_names(text, known), *stale_paths(text, paths)]
            found += [f"{source.path}:{line}: {name}" for name in stale]
    documents = list(files(".md", ".toml", ".yaml", ".proto", "Makefile", "Dockerfile"))
    for path in documents:
        if path.name == "CHANGELOG.md":
            continue  # tells of what was
        text = (ROOT / path).read_text()
        stale = [*stale_names(text, known), *stale_modules(text, ours)]
        stale += stale_paths(text, paths) if path.suffix == ".md" else []
        found += [f"{path}: {name}" for name in stale]
    assert not found, "\n".join(found)


def wrong_decisions(pages: Mapping[str, str], texts: Iterable[str]) -> Iterator[str]:
    """Pages of decisions whose number another one or the title has otherwise; links that do.

    Args:
        pages: Name of a page, its text.
        texts: What refers to pages.
    """
    numbers = [name[:4] for name in pages]
    for name, text in pages.items():
        if numbers.count(name[:4]) > 1 or not text.startswith(f"# {int(name[:4])}. "):
            yield name
    for number, name in (match.groups() for text in texts for match in DECISION.finditer(text)):
        if int(name[:4]) != int(number):
            yield f"ADR {number}: {name}"


def test_a_decision_has_a_number_of_its_own() -> None:
    pages = {path.name: (ROOT / path).read_text() for path in files(".md") if "adr" in path.parts}
    assert not list(wrong_decisions(pages, ((ROOT / path).read_text() for path in files(".md"))))


def test_planted_decisions_of_one_number_are_found() -> None:
    pages = {"0001-a.md": "# 1. A", "0002-b.md": "# 2. B", "0002-c.md": "# 3. C"}
    texts = ["[ADR 1](docs/adr/0001-a.md) and [ADR 2](0001-a.md)"]
    assert list(wrong_decisions(pages, texts)) == ["0002-b.md", "0002-c.md", "ADR 2: 0001-a.md"]


def test_planted_stale_references_are_found() -> None:
    known = {"lane": {"Lane"}}
    text = "see `lane.Lane`, `lane.Gone`, `gone.Lane`, `torch.Tensor`, `call.work` and `A.B`"
    assert list(stale_names(text, known)) == ["lane.Gone", "gone.Lane"]
    text = "a/b.py, `x/gone.py`, `gone.py`, `c.py` and b/c.py"
    assert list(stale_paths(text, {"r/a/b.py", "b/c.py"})) == ["x/gone.py", "gone.py"]
    text = "python -m tinsmithd.training; tinsmithd.gone.x, tinsmithd.training.Server"
    assert list(stale_modules(text, {"tinsmithd.training"})) == ["tinsmithd.gone.x"]


def test_planted_files_are_read(tmp_path: Path) -> None:
    source = Source.of(Path("services/x.py"), '"""Doc."""\nx = 1  # why\n')
    assert list(texts(source)) == [(1, "Doc."), (2, "# why")]
