"""Tinker's `x_async` names for every method `x` that returns a future."""

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def async_twins(*names: str, final: bool) -> Callable[[type[T]], type[T]]:
    """Give a class a coroutine method `<name>_async` for each of its methods `<name>`.

    Args:
        names: The methods.
        final: True: awaiting the twin gives the method's result. False: it gives the future, to
            be awaited once more, so that calls can be sent in order before any is answered.
    """

    def decorate(cls: type[T]) -> type[T]:
        for name in names:
            twin = _final_twin(name) if final else _future_twin(name)
            functools.update_wrapper(twin, vars(cls)[name])  # its signature, above all
            del twin.__annotations__
            twin.__name__ = f"{name}_async"
            twin.__qualname__ = f"{cls.__qualname__}.{name}_async"
            gives = "the result" if final else "the future"
            twin.__doc__ = f"`{name}` for coroutines: awaiting it gives {gives}."
            setattr(cls, f"{name}_async", twin)
        return cls

    return decorate


def _final_twin(name: str) -> Callable[..., Any]:
    def twin(self: Any, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        return _awaited(getattr(self, name)(*args, **kwargs))

    return twin


def _future_twin(name: str) -> Callable[..., Any]:
    def twin(self: Any, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        return _given(getattr(self, name)(*args, **kwargs))

    return twin


# The call is made when the twin is called, not when it is awaited: calls keep the order of the
# program, and nobody can change an argument in between.


async def _awaited(future: Awaitable[T]) -> T:
    return await future


async def _given(value: T) -> T:
    return value
