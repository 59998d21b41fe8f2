"""Checks data in the form in which clients send them, without making anything of them.

Nearly all data are one chunk of tokens and one array of as many numbers for each input of the loss,
as little-endian bytes. What is right in them can be seen from lengths and from all numbers at once,
at a tenth of what it costs to make arrays of each. Whoever finds anything else leaves it to the
checks that can say what is wrong; nothing is refused here.
"""

import sys
from collections.abc import Callable, Sequence

import numpy as np

from tinsmith.v1 import types_pb2 as pb
from tinsmithd.domain import BaseModelInfo, LossFn

JOINED_BYTES = 64 * 1024
"""Arrays are looked at together up to so many bytes, which are copied for it; a larger one is
looked at where it is."""

_INT_BYTES: dict[int, int] = {pb.DTYPE_INT64: 8, pb.DTYPE_INT32: 4}


class _NotPlain(Exception):
    """These data are to be looked at one by one."""


class _Joined:
    """Arrays of one type, which are all good or not.

    Args:
        dtype: Theirs.
        good: Whether all numbers of an array are.
    """

    def __init__(self, dtype: str, good: Callable[[np.ndarray], bool]) -> None:
        self._dtype = np.dtype(dtype)
        self._good = good
        self._parts: list[bytes] = []
        self._nbytes = 0

    def add(self, data: bytes) -> None:
        self._parts.append(data)
        self._nbytes += len(data)
        if self._nbytes >= JOINED_BYTES:
            self.look()

    def look(self) -> None:
        parts = self._parts
        if parts:
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            self._parts, self._nbytes = [], 0
            if not self._good(np.frombuffer(data, self._dtype)):
                raise _NotPlain


class PlainData:
    """What data of one call are checked against.

    Args:
        loss_fn: The loss.
        info: The base model.
        inputs_max: Maximum number of inputs of a datum.
    """

    def __init__(self, loss_fn: LossFn, info: BaseModelInfo, inputs_max: int) -> None:
        self._floats = loss_fn.inputs[1:]
        self._inputs_count = len(loss_fn.inputs)
        self._tokens_max = info.context_length
        self._vocab_size = info.vocab_size
        self._usable = sys.byteorder == "little" and self._inputs_count <= inputs_max

    def lengths(self, data: Sequence[pb.Datum]) -> list[int] | None:
        """Tokens of each datum; None where one is wrong, or in another form.

        Args:
            data: All of them are right, or the answer is None.
        """
        if not self._usable:
            return None
        tokens = {
            8: _Joined("<u8", self._are_tokens),  # a negative one is a large one
            4: _Joined("<u4", self._are_tokens),
        }
        numbers = _Joined("<f4", _are_finite)
        try:
            found = [self._look(datum, tokens, numbers) for datum in data]
            for joined in (*tokens.values(), numbers):
                joined.look()
        except _NotPlain:
            return None
        return found

    def _look(self, datum: pb.Datum, tokens: dict[int, _Joined], numbers: _Joined) -> int:
        chunks, inputs = datum.model_input.chunks, datum.loss_fn_inputs
        if len(chunks) != 1 or len(inputs) != self._inputs_count or "target_tokens" not in inputs:
            raise _NotPlain
        count = _look_at_tokens(chunks[0].tokens, 0, tokens)
        if count > self._tokens_max:
            raise _NotPlain
        _look_at_tokens(inputs["target_tokens"], count, tokens)
        for name in self._floats:
            if name not in inputs:  # to look it up would add it
                raise _NotPlain
            tensor = inputs[name]
            data = tensor.data
            if tensor.dtype != pb.DTYPE_FLOAT32 or len(data) != 4 * count:
                raise _NotPlain
            _check_shape(tensor, count)
            numbers.add(data)
        return count

    def _are_tokens(self, array: np.ndarray) -> bool:
        return bool(array.max() < self._vocab_size)


def _look_at_tokens(tensor: pb.Tensor, expected: int, tokens: dict[int, _Joined]) -> int:
    """Number of tokens, at least 1, which is the expected one where that is not 0."""
    data, each = tensor.data, _INT_BYTES.get(tensor.dtype)
    if not data or each is None:
        raise _NotPlain
    count, rest = divmod(len(data), each)
    if rest or (expected and count != expected):
        raise _NotPlain
    _check_shape(tensor, count)
    tokens[each].add(data)
    return count


def _check_shape(tensor: pb.Tensor, count: int) -> None:
    shape = tensor.shape
    flat = not shape or (len(shape) == 1 and shape[0] == count)
    if not flat or tensor.floats or tensor.ints:
        raise _NotPlain


def _are_finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())
