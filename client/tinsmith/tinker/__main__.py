"""python -m tinsmith.tinker [-m MODULE | SCRIPT] [ARGUMENTS...]: runs a program of Tinker's."""

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

from tinsmith.tinker import install

USAGE = "usage: python -m tinsmith.tinker (SCRIPT | -m MODULE) [ARGUMENTS...]"


def main(arguments: list[str]) -> None:
    """Run a program as its `__main__`, with the name `tinker` bound to this client."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__}", file=sys.stdout if arguments else sys.stderr)
        raise SystemExit(0 if arguments else 2)
    is_module = arguments[0] == "-m"
    if is_module and len(arguments) < 2:
        _refuse("-m needs the name of a module")
    if not is_module and not sys.flags.safe_path:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)  # as `python SCRIPT` has it
    install(environment=True)
    if is_module:
        code, spec = _module(arguments[1])
        sys.argv = [str(spec.origin), *arguments[2:]]
    else:
        code, spec = _script(Path(arguments[0])), None
        sys.argv = list(arguments)
    program: Any = types.ModuleType("__main__")
    program.__file__ = sys.argv[0]
    program.__spec__ = spec
    program.__loader__ = spec.loader if spec else None
    program.__package__ = spec.parent if spec else None
    program.__builtins__ = __builtins__
    sys.modules["__main__"] = program  # what it pickles, and what its workers import, is of this
    exec(code, vars(program))


def _script(path: Path) -> types.CodeType:
    try:
        source = path.read_bytes()
    except OSError as error:
        _refuse(f"cannot read {path}: {error.strerror}")
    return compile(source, str(path), "exec", dont_inherit=True)


def _module(name: str) -> tuple[types.CodeType, importlib.machinery.ModuleSpec]:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError) as error:
        _refuse(f"cannot find {name}: {error}")
    loader: Any = spec.loader if spec is not None else None
    code = loader.get_code(spec.name) if loader is not None and spec is not None else None
    if spec is None or code is None:
        _refuse(f"there is no module {name} that can be run")
    return code, spec


def _refuse(why: str) -> NoReturn:
    print(f"{why}\n{USAGE}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
