"""Losses that `ServiceClient.create_custom_loss` makes: of one datum, summed over all of them."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinsmith._check import refuse, shown, text
from tinsmith.types._values import Value
from tinsmith.types.tensor import from_any

PARAMETERS_MAX = 16
RANKS = (0, 1, 2)
_PARAMETER = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_LOGPROBS = "logprobs"


@dataclass(frozen=True, eq=False)
class CustomLossInput(Value):
    """A parameter of such a loss: `rank` 0 is a number, 1 is `[T]`, 2 is `[T, K]`."""

    name: str
    rank: int


@dataclass(frozen=True)
class LossHandle:
    """A loss of one datum. `TrainingClient.forward_backward_custom` takes it, and computes it here.

    Attributes:
        name: Name of the function.
        inputs: `logprobs`, then the `loss_fn_inputs` that it reads, in the order it takes them.
        session_id: Empty: any client of this process may use it.
        graph: The function.
        loss_id: None: it runs in this process.
    """

    name: str
    inputs: tuple[CustomLossInput, ...]
    session_id: str
    graph: Callable[..., Any] = field(repr=False, compare=False)
    loss_id: str | None = None

    @property
    def key(self) -> str:
        """Tells losses of this process apart."""
        said = f"{self.name} {self.inputs} {id(self.graph)}"
        return hashlib.sha256(said.encode()).hexdigest()

    @property
    def input_names(self) -> tuple[str, ...]:
        """The `loss_fn_inputs` that it reads, in the order it takes them."""
        return tuple(each.name for each in self.inputs[1:])

    def __call__(self, data: Sequence[Any], logprobs: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """The sum over all data, and the metrics.

        Args:
            data: N of them.
            logprobs: N tensors of torch, each shaped like its datum's `target_tokens`.

        Raises:
            InvalidArgumentError: A datum lacks an input or has one of another rank, or what the
                function returned is no scalar with metrics.
        """
        total: Any = None
        sums: dict[str, Any] = {}
        for index, (datum, of_datum) in enumerate(zip(data, logprobs, strict=True)):
            _check_rank(self.inputs[0], f"data[{index}]: logprobs", of_datum.dim())
            given = [_input(datum, index, each) for each in self.inputs[1:]]
            returned = self.graph(of_datum, *given)
            try:
                loss, metrics = returned
            except (TypeError, ValueError):
                raise refuse("loss_fn", f"{self.name} must return (loss, metrics)") from None
            total = loss if total is None else total + loss
            for name, value in metrics.items():
                if not isinstance(name, str) or not _METRIC.fullmatch(name):
                    why = f"a metric is custom/<name>:sum or :mean, got {shown(name)}"
                    raise refuse("loss_fn", why)
                sums[name] = sums.get(name, 0.0) + float(value)
        counts = {name: len(data) if name.endswith(":mean") else 1 for name in sums}
        return total, {name: value / counts[name] for name, value in sums.items()}


def loss_of(fn: object, input_ranks: object) -> LossHandle:
    """A loss of a function of one datum.

    Raises:
        InvalidArgumentError: It takes something else than logprobs and named inputs, or the ranks
            are of other parameters.
    """
    if not callable(fn):
        raise refuse("fn", f"expected a function, got {type(fn).__name__}")
    found = inspect.signature(fn).parameters
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    whole = all(p.kind in places and p.default is p.empty for p in found.values())
    names = list(found)
    if not whole or names[:1] != [_LOGPROBS] or len(names) > PARAMETERS_MAX:
        why = f"must take {_LOGPROBS!r} first, then names of loss_fn_inputs, all by their place"
        raise refuse("fn", f"{why}, at most {PARAMETERS_MAX} in all")
    if not isinstance(input_ranks, Mapping) or set(input_ranks) != set(names):
        raise refuse("input_ranks", f"must give the rank of each of {', '.join(names)}")
    for name in names:
        if not _PARAMETER.fullmatch(name):
            raise refuse("fn", f"{shown(name)} is no name of an input")
        if input_ranks[name] not in RANKS or isinstance(input_ranks[name], bool):
            why = f"{shown(input_ranks[name])} is none of 0, 1 and 2"
            raise refuse(f"input_ranks[{name!r}]", why)
    inputs = tuple(CustomLossInput(name, input_ranks[name]) for name in names)
    return LossHandle(text(getattr(fn, "__name__", "loss"), "fn"), inputs, "", fn)


def _input(datum: Any, index: int, wanted: CustomLossInput) -> Any:
    where = f'data[{index}].loss_fn_inputs["{wanted.name}"]'
    value = datum.loss_fn_inputs.get(wanted.name)
    if value is None:
        raise refuse(where, "is missing", "MISSING_FIELD")
    tensor = from_any(wanted.name, value).to_torch()
    _check_rank(wanted, where, tensor.dim())
    return tensor


def _check_rank(wanted: CustomLossInput, where: str, rank: int) -> None:
    if rank != wanted.rank:
        raise refuse(where, f"has rank {rank}, the loss takes rank {wanted.rank}")
