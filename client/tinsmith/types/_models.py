"""What programs expect of a type that is a pydantic model in Tinker, for frozen dataclasses."""

from __future__ import annotations

import base64
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, fields, replace
from datetime import datetime
from typing import Any, ClassVar, Literal, Self

import numpy as np

from tinsmith._check import refuse, shown

Mode = Literal["python", "json"]
Names = Collection[str] | None


class _ModelFields:
    """`cls.model_fields`: the dataclass fields by name."""

    def __get__(self, owner: object, cls: type) -> dict[str, Field[Any]]:
        return {field.name: field for field in fields(cls)}


class Model:
    """`model_dump` and its like.

    A mapping is taken wherever one of these types is expected, as in `ModelInput(chunks=[{...}])`.
    """

    model_fields: ClassVar[Any] = _ModelFields()
    _from_server: ClassVar[bool] = False

    @classmethod
    def model_validate(cls, obj: object) -> Self:
        """Make one of a mapping of its fields, all the way down; one of this type stays as it is.

        What a type that comes from a server has besides is left out, elsewhere it is refused.

        Raises:
            InvalidArgumentError: It is neither, or a value is wrong (also a ValueError).
        """
        if isinstance(obj, cls):
            return obj
        if not isinstance(obj, Mapping):
            raise refuse(cls.__name__, f"expected a mapping, got {shown(obj)}")
        known = cls.model_fields
        unknown = [name for name in obj if name not in known]
        if unknown and not cls._from_server:
            name = unknown[0]
            plain = isinstance(name, str) and name.isidentifier()
            where = f"{cls.__name__}.{name if plain else shown(name)}"
            raise refuse(where, "there is no such field")
        missing = [
            name
            for name, each in known.items()
            if each.default is MISSING and each.default_factory is MISSING and name not in obj
        ]
        if missing:
            raise refuse(f"{cls.__name__}.{missing[0]}", "is missing", "MISSING_FIELD")
        return cls(**{name: value for name, value in obj.items() if name in known})

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray) -> Self:
        """`model_validate` of JSON text."""
        try:
            read = json.loads(json_data)
        except ValueError as error:
            raise refuse(cls.__name__, f"is no JSON: {error}") from None
        return cls.model_validate(read)

    def model_dump(
        self,
        *,
        mode: Mode = "python",
        include: Names = None,
        exclude: Names = None,
        exclude_none: bool = False,
        exclude_defaults: bool = False,
        by_alias: bool | None = None,
    ) -> dict[str, Any]:
        """Its fields, and theirs, as plain dictionaries and lists.

        Args:
            mode: "json" leaves only what JSON has: arrays become lists, times text.
            include: Names of the fields to take; None: all.
            exclude: Names of the fields to leave out.
            exclude_none: Leave out what is None, all the way down.
            exclude_defaults: Leave out what has its default.
            by_alias: Ignored; no field has another name.
        """
        left = {
            name: getattr(self, name)
            for name, each in self.model_fields.items()
            if (include is None or name in include) and name not in (exclude or ())
            if not (exclude_defaults and _is_default(each, getattr(self, name)))
        }
        return _dumped_items(left, mode, exclude_none)

    def model_dump_json(self, *, indent: int | None = None, **options: Any) -> str:
        """`model_dump` as JSON text; options as there. NaN and infinities become null."""
        separators = (",", ":") if indent is None else None
        plain = self.model_dump(mode="json", **options)
        return json.dumps(plain, indent=indent, separators=separators, ensure_ascii=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed; it shares nothing with this one.

        Raises:
            TypeError: There is no such field.
            InvalidArgumentError: A value is wrong.
        """
        changed: Self = replace(self, **(update or {}))  # type: ignore[type-var]
        return changed


def _is_default(field: Field[Any], value: Any) -> bool:
    if field.default_factory is not MISSING:
        return bool(value == field.default_factory())
    return field.default is not MISSING and bool(value == field.default)


def dumped(value: Any, mode: Mode, exclude_none: bool = False) -> Any:
    """A value as `model_dump` has it."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode=mode, exclude_none=exclude_none)
    if isinstance(value, Mapping):
        return _dumped_items(value, mode, exclude_none)
    if isinstance(value, list | tuple):
        return [dumped(entry, mode, exclude_none) for entry in value]
    if mode == "python":
        return value.copy() if isinstance(value, np.ndarray) else value
    if isinstance(value, np.ndarray | np.generic):
        return dumped(value.tolist(), mode, exclude_none)
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _dumped_items(values: Mapping[str, Any], mode: Mode, exclude_none: bool) -> dict[str, Any]:
    return {
        name: dumped(value, mode, exclude_none)
        for name, value in values.items()
        if not (exclude_none and value is None)
    }


# --- mappings where values are expected -----------------------------------------------------------

Read = Callable[[Any], Any]


@functools.cache
def readers(cls: Any) -> Mapping[str, Read]:
    """What reads the fields of a class that can be given as mappings or text, by name."""
    hints = typing.get_type_hints(cls)
    found = {field.name: _reader(hints[field.name]) for field in fields(cls)}
    return {name: read for name, read in found.items() if read is not None}


def _reader(hint: Any) -> Read | None:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _first_that_reads([read for arg in args if (read := _reader(arg)) is not None])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        entry = _reader(args[1])
        return None if entry is None else functools.partial(_read_values, entry)
    if isinstance(origin, type) and issubclass(origin, Iterable):
        entry = _reader(args[0])
        return None if entry is None else functools.partial(_read_entries, entry)
    if hint is datetime:
        return _read_time
    if isinstance(hint, type) and issubclass(hint, Model):
        return functools.partial(_read_model, hint)
    return None


def _first_that_reads(several: list[Read]) -> Read | None:
    if len(several) < 2:
        return several[0] if several else None

    def read(value: Any) -> Any:
        for each in several[:-1]:
            try:
                return each(value)
            except (TypeError, ValueError):
                continue
        return several[-1](value)

    return read


def _read_values(entry: Read, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: entry(each) for key, each in value.items()}


def _read_entries(entry: Read, value: Any) -> Any:
    return list(map(entry, value)) if isinstance(value, list | tuple) else value


def _read_model(cls: type[Model], value: Any) -> Any:
    return cls.model_validate(value) if isinstance(value, Mapping) else value


def _read_time(value: Any) -> Any:
    return datetime.fromisoformat(value) if isinstance(value, str) else value
