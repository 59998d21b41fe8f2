"""Finds `tinker`, its modules and its distribution in this client."""

import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinsmith import __version__
from tinsmith.tinker._modules import MODULES, SDK_VERSION

NAME = "tinker"
CHILDREN_PATH = Path(__file__).with_name("path")
"""A folder in which `tinker` is a module that calls `install`, for processes that are started."""


class _Distribution(importlib.metadata.Distribution):
    """What `importlib.metadata.version("tinker")` reads."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        summary = f"the surface of tinker {SDK_VERSION}, by tinsmith {__version__}"
        return f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {SDK_VERSION}\nSummary: {summary}\n"

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands before all other finders, so that an installed SDK is not found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            return None
        packages = {name.rpartition(".")[0] for name in MODULES}
        is_package = fullname in packages
        return importlib.machinery.ModuleSpec(fullname, self, is_package=is_package)

    def exec_module(self, module: types.ModuleType) -> None:
        names = MODULES[module.__name__]
        module.__doc__ = f"{module.__name__} of Tinker's SDK, by tinsmith."
        vars(module).update(names)
        public = {name for name in names if not name.startswith("_")}
        for child in MODULES:
            if child.rpartition(".")[0] == module.__name__:
                importlib.import_module(child)  # which makes it an attribute here
        if module.__name__ == NAME:
            public |= {"types", "auth"}
        module.__all__ = sorted(public)  # type: ignore[attr-defined]

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        """That of `tinker`; others are left to other finders."""
        return [_Distribution()] if context is not None and context.name == NAME else []


def install(*, environment: bool = False) -> None:
    """Bind the name `tinker` to this client, for this process and workers that it forks or spawns.

    Doing it again does nothing.

    Args:
        environment: Also for Python programs that it starts in any other way, by `PYTHONPATH`.

    Raises:
        ImportError: Another `tinker` is imported already.
    """
    if environment:
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        rest = [each for each in given if each and each != str(CHILDREN_PATH)]
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CHILDREN_PATH), *rest])
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    found = sys.modules.get(NAME)
    where = getattr(found, "__file__", None)
    if found is not None and (where is None or Path(where).parent != CHILDREN_PATH):
        raise ImportError(
            f"tinker is imported already, from {where}: call tinsmith.tinker.install() before "
            "anything imports it, or run the program with python -m tinsmith.tinker",
            name=NAME,
        )
    sys.modules.pop(NAME, None)  # the module that called this, in a process that was started
    sys.meta_path.insert(0, _Finder())
    sys.path.insert(0, str(CHILDREN_PATH))  # spawned workers take sys.path over
