"""Lists what a package shaped like Tinker's offers: names and signatures, nothing else.

Runs where that package is installed, and needs only the standard library:

    python tests/surface/listing.py tinker > tests/recorded/tinker-0.38.0.json
"""

import enum
import importlib
import inspect
import json
import sys
import types
import typing
from typing import Any

# Below these a class stands on another library, whose methods are not this package's.
_FOREIGN = ("pydantic", "abc", "typing", "builtins", "concurrent", "enum", "warnings", "json")


def listed(package: str) -> dict[str, Any]:
    """The public surface of a package and of its module `types`.

    Returns:
        `exports`: public names of the package. `types`: those of its module `types`. `classes`: for
        each class among them its members: the parameters of a method, or "property" or "value".
    """
    root, kinds = importlib.import_module(package), importlib.import_module(f"{package}.types")
    exports = sorted(name for name in root.__all__ if not name.startswith("__"))
    names = sorted(name for name in dir(kinds) if _is_type(kinds, name))
    classes = {
        name: members(found)
        for owner, several in ((kinds, names), (root, exports))
        for name in several
        if inspect.isclass(found := getattr(owner, name))
    }
    return {"exports": exports, "types": names, "classes": dict(sorted(classes.items()))}


def _is_type(module: types.ModuleType, name: str) -> bool:
    found = getattr(module, name)
    return name[0].isupper() and not isinstance(found, types.ModuleType | typing.TypeVar)


def members(cls: type) -> dict[str, Any]:
    """Public members of a class, those that it inherits from another library left out."""
    found: dict[str, Any] = {}
    for fields in ("__dataclass_fields__", "model_fields"):
        names = [name for name in getattr(cls, fields, {}) if not name.startswith("_")]
        found |= dict.fromkeys(names, "value")
    if not issubclass(cls, BaseException | enum.Enum) and (made := parameters(cls)) is not None:
        found["__init__"] = made
    for base in reversed(cls.__mro__):
        if base is object or base.__module__.partition(".")[0] in _FOREIGN:
            continue
        for name, value in vars(base).items():
            if not name.startswith("_") and name not in ("model_config",):
                found[name] = _member(cls, name, value)
    return found


def _member(cls: type, name: str, value: Any) -> Any:
    if isinstance(value, property) or type(value).__name__ == "cached_property":
        return "property"
    if isinstance(value, staticmethod | classmethod) or inspect.isfunction(value):
        return parameters(getattr(cls, name), bound=not inspect.isfunction(value))
    return "value"


def parameters(function: Any, *, bound: bool = True) -> list[str] | None:
    """`name`, `name=` with a default, after a `*` where only keywords are taken."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    written, star = [], False
    for parameter in found if bound else found[1:]:
        if parameter.name.startswith("_"):
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            star = star or parameter.kind is parameter.VAR_POSITIONAL
            written.append(str(parameter).partition(":")[0])
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            written.append("*")
            star = True
        default = "" if parameter.default is parameter.empty else "="
        written.append(parameter.name + default)
    return written


def written(found: dict[str, Any]) -> str:
    """As JSON, with a line for each class."""
    lines = [f'"{key}": {json.dumps(found[key])}' for key in ("exports", "types")]
    classes = [f"{json.dumps(name)}: {json.dumps(each)}" for name, each in found["classes"].items()]
    lines.append('"classes": {\n' + ",\n".join(classes) + "\n}")
    return "{" + ",\n".join(lines) + "}"


if __name__ == "__main__":
    print(written(listed(sys.argv[1])))
