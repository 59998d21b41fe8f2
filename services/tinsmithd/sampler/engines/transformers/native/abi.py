"""The interface of the compiled part, as `source/step.h` has it: structures and functions."""

import ctypes
from collections.abc import Sequence
from ctypes import CDLL, POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.lora_weights import Turning

SITES = 4
"""Sites of adapters in a layer, in the order of `Site`."""
PARTS_MAX = 3
"""Linear layers that one product holds at most."""


class Matrix(Structure):
    """A weight in panels, and its bias."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("n", c_int32),
        ("k", c_int32),
        ("narrow", c_int32),
        ("unused", c_int32),
    )


class LayerOf(Structure):
    """The weights of a layer; a window of 0 is none."""

    _fields_ = (
        ("qkv", Matrix),
        ("o", Matrix),
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("norm_1", c_void_p),
        ("norm_2", c_void_p),
        ("norm_q", c_void_p),
        ("norm_k", c_void_p),
        ("window", c_int64),
    )


class ModelOf(Structure):
    """Sizes, and the layers."""

    _fields_ = (
        ("layers", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("hidden", c_int32),
        ("ffn", c_int32),
        ("narrow", c_int32),
        ("eps", c_float),
        ("qk_eps", c_float),
        ("scaling", c_float),
        ("each", POINTER(LayerOf)),
        ("norm", c_void_p),
    )


class SiteOf(Structure):
    """What an adapter adds to a product."""

    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("parts", c_int32),
        ("rank", c_int32),
        ("widths", c_int32 * PARTS_MAX),
        ("unused", c_int32),
    )


class GroupOf(Structure):
    """Rows that have one adapter."""

    _fields_ = (("sites", POINTER(SiteOf)), ("rows", c_void_p), ("count", c_int64))


class TurnOf(Structure):
    """A matrix that is to be turned round."""

    _fields_ = (
        ("given", c_void_p),
        ("to", c_void_p),
        ("rows", c_int32),
        ("columns", c_int32),
        ("ld", c_int64),
        ("scale", c_float),
        ("unused", c_int32),
    )


class StoreOf(Structure):
    """Keys and values of slots, a pointer per layer."""

    _fields_ = (("layers", POINTER(c_void_p)), ("capacity", c_int64))


class RowOf(Structure):
    """A token, and where the keys before it are."""

    _fields_ = (
        ("store", c_int64),
        ("slot", c_int64),
        ("position", c_int64),
        ("shared", c_int64),
        ("split", c_int64),
    )


class StepOf(Structure):
    """What one forward is made of."""

    _fields_ = (
        ("rows", c_void_p),
        ("stores", POINTER(StoreOf)),
        ("groups", POINTER(GroupOf)),
        ("angles", c_void_p),
        ("h", c_void_p),
        ("out", c_void_p),
        ("count", c_int32),
        ("groups_count", c_int32),
        ("sequences", c_int32),
        ("unused", c_int32),
    )


def _layout() -> int:
    """As `tin_layout` computes it."""
    few = sum(map(ctypes.sizeof, (GroupOf, StoreOf, RowOf, TurnOf)))
    sizes = (ModelOf, LayerOf, StepOf, SiteOf)
    return reduce(lambda rest, each: ctypes.sizeof(each) + 1000 * rest, reversed(sizes), few)


class NotUsableError(OSError):
    """The system does not allow the instructions that a library was compiled for."""


class Library:
    """The compiled functions. They hold no lock of Python's while they compute.

    Args:
        path: A shared library that was made of `source/`.
        threads: That compute together, this one included.

    Raises:
        OSError: It cannot be loaded.
        NotUsableError: This process may not use its instructions.
        ValueError: It was made for another interface.
        MemoryError: There is none for its threads.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._c = c = CDLL(str(path))
        c.tin_layout.restype = c.tin_packed_bytes.restype = c_int64
        c.tin_packed_bytes.argtypes = (c_int, c_int, c_int)
        c.tin_pack.argtypes = (c_void_p, c_void_p, c_int, c_int, c_int, c_void_p)
        c.tin_open.argtypes, c.tin_open.restype = (c_int,), c_void_p
        c.tin_close.argtypes, c.tin_close.restype = (c_void_p,), None
        c.tin_forward.argtypes = (c_void_p, POINTER(ModelOf), POINTER(StepOf))
        c.tin_product.argtypes = (
            *(c_void_p, POINTER(Matrix), c_void_p, c_int, c_int, c_void_p),
            *(POINTER(GroupOf), c_int),
        )
        c.tin_turn.argtypes, c.tin_turn.restype = (POINTER(TurnOf), c_int), None
        c.tin_weigh.argtypes = (c_void_p, c_void_p, c_int, c_int, *(c_void_p,) * 4)
        if c.tin_layout() != _layout():
            raise ValueError(f"{path} was made for another interface")
        if not c.tin_usable():
            raise NotUsableError(f"{path} needs instructions that the system does not allow")
        self._context: int | None = c.tin_open(threads)
        if self._context is None:
            raise MemoryError("no memory for the threads of a compiled library")

    def close(self) -> None:
        """End its threads. Nothing is called afterwards; twice is no error."""
        if self._context is not None:
            self._c.tin_close(self._context)
            self._context = None

    def packed(self, weight: Tensor, *, narrow: bool) -> Tensor:
        """A float32 weight `(n, k)` in panels, as bytes; its values are bfloat16's if narrow.

        Raises:
            MemoryError: There is none for it.
        """
        n, k = weight.shape
        assert weight.dtype == torch.float32
        weight = weight.contiguous()
        made = torch.empty(self._c.tin_packed_bytes(n, k, narrow), dtype=torch.uint8)
        if self._c.tin_pack(self._context, weight.data_ptr(), n, k, narrow, made.data_ptr()):
            raise MemoryError("no memory for the panels of a weight")
        return made

    def forward(self, model: ModelOf, step: StepOf) -> None:
        """Compute a forward; see `source/step.h`.

        Raises:
            MemoryError: There is none, and nothing was done.
        """
        if self._c.tin_forward(self._context, byref(model), byref(step)):
            raise MemoryError("no memory for the rows of a forward")

    def product(
        self,
        matrix: Matrix,
        x: Tensor,
        groups: "ctypes.Array[GroupOf] | None" = None,
        *,
        narrow: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """`x W^T + b` and what adapters add, float32 `(rows, n)`, of float32 `(rows, k)`.

        Args:
            matrix: W and b.
            x: Rows; their values are bfloat16's if narrow, and nothing is rounded all the same.
            groups: The adapters.
            narrow: See x.
            out: To write to; None: new memory.

        Raises:
            MemoryError: There is none, and nothing was done.
        """
        assert x.dtype == torch.float32
        x = x.contiguous()
        made = torch.empty((len(x), matrix.n)) if out is None else out
        count = 0 if groups is None else len(groups)
        inputs = (byref(matrix), x.data_ptr(), len(x), narrow, made.data_ptr(), groups, count)
        if self._c.tin_product(self._context, *inputs):
            raise MemoryError("no memory for the rows of a product")
        return made

    def turn(self, matrices: Sequence[Turning]) -> None:
        """Turn matrices round, on this thread alone; another one may compute meanwhile."""
        each = (TurnOf * len(matrices))()
        for at, (given, to, scale) in zip(each, matrices, strict=True):
            at.given, at.to = given.ctypes.data, to.ctypes.data
            at.rows, at.columns = given.shape
            at.ld, at.scale = to.strides[0] // to.itemsize, scale
        self._c.tin_turn(each, len(each))

    def weigh(self, logits: Tensor, inverse_N: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of draws; see `Workspace.weigh`, which says the shapes.

        Raises:
            MemoryError: There is none, and nothing was done.
        """
        logits = logits.contiguous()
        rows, vocab = logits.shape
        maxima, sums = torch.empty(rows), torch.empty(weights.shape[:2], dtype=torch.float64)
        made = (weights.data_ptr(), maxima.data_ptr(), sums.data_ptr())
        inputs = (logits.data_ptr(), rows, vocab, inverse_N.data_ptr())
        if self._c.tin_weigh(self._context, *inputs, *made):
            raise MemoryError("no memory for the rows of a draw")
        return maxima, sums
