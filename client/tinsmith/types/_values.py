"""What all types of this package share: they own what they hold, and compare by it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

import numpy as np

from tinsmith.types._models import Model, readers


class Value(Model):
    """Base of the frozen dataclasses.

    Lists, mappings and arrays that one is made of are copied, so that its maker may go on using
    them. Two are equal when their fields are, with arrays compared as a whole (NaN equals NaN).
    """

    def __post_init__(self) -> None:
        reads = readers(type(self))  # type: ignore[arg-type]  # a class can be hashed
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if field.name in reads:
                object.__setattr__(self, field.name, owned(reads[field.name](value)))
            elif not isinstance(value, str | int | float | None):
                object.__setattr__(self, field.name, owned(value))

    def copied(self) -> Self:
        """One with the same fields that shares no list, mapping or array with it."""
        made = object.__new__(type(self))
        for name, value in vars(self).items():
            object.__setattr__(made, name, owned(value))
        return made

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(equal(value, vars(other)[name]) for name, value in vars(self).items())

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))


class Response(Value):
    """Base of what servers give: a field that this client does not know is left out."""

    _from_server = True


def owned(value: Any) -> Any:
    """A copy of lists, mappings, arrays and values, all the way down; anything else as it is."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {key: owned(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [owned(entry) for entry in value]
    if isinstance(value, Value):
        return value.copied()
    if isinstance(value, tuple):
        return tuple(map(owned, value)) if type(value) is tuple else value
    return value.clone().as_subclass(type(value)) if is_torch(value) else value


def is_torch(value: Any) -> bool:
    """True for a torch tensor; does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def equal(one: Any, other: Any) -> bool:
    """Whether two values are the same: arrays by shape and content, NaN equal to NaN."""
    if is_torch(one) and is_torch(other):
        return equal(one.detach().cpu().numpy(), other.detach().cpu().numpy())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        nan = one.dtype.kind == other.dtype.kind == "f"
        return np.array_equal(one, other, equal_nan=nan)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return False
    return bool(one == other or (one != one and other != other))
