"""The hand-written files of the repository, read once."""

import ast
import functools
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


@dataclass(frozen=True)
class Source:
    """A Python file.

    Attributes:
        path: From the root of the repository.
        text: Its content.
        tree: Parsed.
    """

    path: Path
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """Its dotted name, from its source root on."""
        parts = self.path.with_suffix("").parts[1:]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @classmethod
    def of(cls, path: Path, text: str) -> "Source":
        """A file with this content."""
        return cls(path, text, ast.parse(text))


@functools.cache
def files(*endings: str) -> Sequence[Path]:
    """Files that git tracks or would, by ending; from the root of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    paths = [Path(name) for name in found.decode().split("\0") if name.endswith(endings)]
    return sorted({path for path in paths if (ROOT / path).exists()})


@functools.cache
def sources() -> Sequence[Source]:
    """All Python files that people wrote."""
    paths = [path for path in files(".py") if not path.name.endswith(GENERATED)]
    return [Source.of(path, (ROOT / path).read_text()) for path in paths]


def below(*folders: str) -> list[Source]:
    """The Python files below some top-level folders."""
    return [source for source in sources() if source.path.parts[0] in folders]


def functions(source: Source) -> Iterator[tuple[str, int, int]]:
    """Name, first line and number of lines of each function of a file."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1
