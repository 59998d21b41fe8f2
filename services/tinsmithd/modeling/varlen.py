"""Attention of many sequences of uneven length as one kernel, where the device has one.

Without it each length is an operation of its own (`packing`), forward and backward: hundreds of
small launches for each layer. Which kernel serves is found out at the start by trying: kernels
depend on the GPU, the dtype, the size of heads and on what is installed.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
"""Those that have such kernels."""

_TRIED_LENGTHS = (5, 1, 33, 33)
_TRIED_WINDOWS = (None, 4)
_NEAR = 0.05
"""How far a kernel may be from the loop, of the largest number: products are of 8 or 11 bits."""

_log = logging.getLogger(__name__)


class Compute(Protocol):
    """Causal attention within each sequence."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        longest: int,
        *,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """Compute it, as part of a graph.

        Args:
            query: `(T, heads, D)`, one sequence after the other.
            key: `(T, kv_heads, D)`.
            value: As `key`.
            starts: int32; where each sequence begins, and T.
            longest: Tokens of the longest sequence.
            scale: Factor on the scores; None is `D ** -0.5`.
            window: Tokens that a token sees, itself included; None lets it see all before.

        Returns:
            `(T, heads, D)`.
        """


@dataclass(frozen=True)
class Kernel:
    """One that serves here.

    Attributes:
        name: What it is, for the log and the identity of ranks.
        compute: Calls it.
    """

    name: str
    compute: Compute


@dataclass(frozen=True)
class Shape:
    """What a model's attention looks like."""

    heads: int
    kv_heads: int
    head_size: int


def torch_kernel() -> Kernel:
    """`torch.nn.attention.varlen`, which torch brings along.

    Raises:
        ImportError: This torch has none.
    """
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return _kernel(
        "torch varlen", attend, lambda scale, grouped: {"scale": scale, "enable_gqa": grouped}
    )


def flash_kernel() -> Kernel:
    """The package flash-attn, where somebody installed it.

    Raises:
        ImportError: It is not there.
    """
    attend = importlib.import_module("flash_attn").flash_attn_varlen_func
    return _kernel("flash-attn", attend, lambda scale, _: {"softmax_scale": scale, "causal": True})


def _kernel(
    name: str,
    attend: Callable[..., Tensor],
    named: Callable[[float | None, bool], Mapping[str, Any]],
) -> Kernel:
    """A kernel of a function that takes what both take in the same places.

    Args:
        name: See `Kernel`.
        attend: The function.
        named: Its other arguments, of the scale and whether heads share keys.
    """

    def compute(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        longest: int,
        *,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        before = -1 if window is None else window - 1
        return attend(
            *(query, key, value, starts, starts, longest, longest),
            window_size=(before, 0),
            **named(scale, query.shape[1] != key.shape[1]),
        )

    return Kernel(name, compute)


KERNELS = (torch_kernel, flash_kernel)
"""Makers, the one that is tried first in front."""

Loop = Callable[[Tensor, Tensor, Tensor, Sequence[int], int | None], Tensor]
"""What a kernel must give: of query, key, value `(T, heads, D)`, lengths and window."""


def choose(device: torch.device, dtype: torch.dtype, shape: Shape, loop: Loop) -> Kernel | None:
    """A kernel that computes what the loop does, forward and backward; None where there is none."""
    if device.type != "cuda" or dtype not in DTYPES:
        return None
    return first_that_works(KERNELS, functools.partial(difference, device, dtype, shape, loop))


def first_that_works(
    makers: Sequence[Callable[[], Kernel]], differs: Callable[[Compute], float]
) -> Kernel | None:
    """The first kernel that there is and that is right; a log says why others were passed over.

    Args:
        makers: Make the kernels.
        differs: Tries a kernel; how far it is from what it should be, at most, of the largest.
    """
    for make in makers:
        try:
            kernel = make()
            found = differs(kernel.compute)
        except Exception as error:  # whatever a kernel does not like, another one may
            _log.info("no %s: %s", make.__name__, str(error).partition("\n")[0])
            continue
        if found <= _NEAR:
            _log.info("packed attention is computed by %s", kernel.name)
            return kernel
        _log.warning("%s is off by %.2g and is not used", kernel.name, found)
    return None


def difference(
    device: torch.device, dtype: torch.dtype, shape: Shape, loop: Loop, compute: Compute
) -> float:
    """How far a kernel is from the loop, of the largest number: output and gradients."""
    total = sum(_TRIED_LENGTHS)
    draw = torch.Generator().manual_seed(0)

    def drawn(heads: int) -> Tensor:
        numbers = torch.randn(total, heads, shape.head_size, generator=draw)
        return numbers.to(device, dtype).requires_grad_()

    inputs = drawn(shape.heads), drawn(shape.kv_heads), drawn(shape.kv_heads)
    seed = drawn(shape.heads).detach()
    worst = 0.0
    for window in _TRIED_WINDOWS:
        starts = sequence_starts(_TRIED_LENGTHS, device)
        outputs = (
            loop(*inputs, _TRIED_LENGTHS, window),
            compute(*inputs, starts, max(_TRIED_LENGTHS), scale=None, window=window),
        )
        right, ours = ((o.detach(), *torch.autograd.grad(o, inputs, seed)) for o in outputs)
        for a, b in zip(right, ours, strict=True):
            apart = (a.float() - b.float()).abs().amax() / a.float().abs().amax()
            worst = max(worst, float(apart.nan_to_num(nan=torch.inf)))
    return worst


@functools.lru_cache(maxsize=4)
def sequence_starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32; where each sequence begins, and their sum. All layers of a forward share it."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device)


def slow_dtype(device: torch.device, dtype: str) -> str:
    """Why a dtype is a bad choice for a device, for a person; empty where it is not."""
    if device.type != "cuda" or dtype != "float32":
        return ""
    return (
        "dtype float32 on a GPU: attention has no flash kernel there, and products use no TF32. "
        "bfloat16 is several times faster; set trainer.dtype unless float32 is what you want"
    )


def shape_of(config: Any) -> Shape:
    """What a configuration of transformers says of attention."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(heads, config.num_key_value_heads, size)
