"""Lets arrays that are no numpy arrays be computed with as if they were."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinsmith.types._values import is_torch

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_COMPARISONS = ("lt", "le", "gt", "ge")


class Arithmetic:
    """Operators, numpy's functions and torch's of a TensorData.

    Beside a torch tensor, and as argument of torch's functions, it is a torch tensor; else it is a
    numpy array. The results are plain ones of either kind.
    """

    __slots__ = ()

    to_numpy: Callable[[], Any]
    to_torch: Callable[[], Any]

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return getattr(ufunc, method)(*_plain(inputs, "to_numpy"), **options)

    def __array_function__(self, func: Any, types: Any, args: Any, options: Any) -> Any:
        return func(*_plain(args, "to_numpy"), **_plain(options, "to_numpy"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        return func(*_plain(args, "to_torch"), **_plain(options or {}, "to_torch"))

    def __neg__(self) -> Any:
        return -self.to_numpy()

    def __abs__(self) -> Any:
        return np.abs(self.to_numpy())


def _plain(value: Any, method: str) -> Any:
    """A value with plain arrays or tensors instead of all TensorData in it."""
    if isinstance(value, Arithmetic):
        return getattr(value, method)()
    if type(value) in (tuple, list):
        return type(value)(_plain(entry, method) for entry in value)
    if isinstance(value, Mapping):
        return {key: _plain(entry, method) for key, entry in value.items()}
    return value


def _operator(function: Callable[[Any, Any], Any], *, reflected: bool) -> Callable[..., Any]:
    def compute(self: Arithmetic, other: Any) -> Any:
        mine: Any = self.to_torch() if is_torch(other) else self.to_numpy()
        theirs = _plain(other, "to_numpy")
        return function(theirs, mine) if reflected else function(mine, theirs)

    return compute


for _name in _OPERATORS + _COMPARISONS:
    _function = getattr(operator, _name)
    setattr(Arithmetic, f"__{_name}__", _operator(_function, reflected=False))
    if _name in _OPERATORS:
        setattr(Arithmetic, f"__r{_name}__", _operator(_function, reflected=True))
