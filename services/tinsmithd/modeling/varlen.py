"""Attention of many sequences of uneven length as one kernel, where the device has one.

Without it each length is an operation of its own (`packing`), forward and backward: hundreds of
small launches for each layer. Which kernel serves is found out at the start by trying: kernels
depend on the GPU, the dtype, the size of heads and on what is installed.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tinsmithd.modeling.device_copies import to_device

DTYPES = (torch.bfloat16, torch.float16)
"""Those that have such kernels."""

_TRIED_LENGTHS = (5, 1, 33, 33)
_TRIED_WINDOWS = (None, 4)
_NO_CONTEXTS = ((), (), (), ())
_TRIED_CONTEXTS = ((), (0,), (0, 1), (0, 1))
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
        key_starts: Tensor,
        longest: int,
        key_longest: int,
        *,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """Compute it, as part of a graph.

        Args:
            query: `(T, heads, D)`, one sequence after the other.
            key: `(S, kv_heads, D)`; a sequence may have more keys than queries, which are those of
                its last tokens.
            value: As `key`.
            starts: int32; where the queries of each sequence begin, and T.
            key_starts: Likewise its keys, and S.
            longest: Queries of the sequence that has most.
            key_longest: Likewise keys.
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
        in_contexts: Whether it knows sequences that have more keys than queries.
    """

    name: str
    compute: Compute
    in_contexts: bool = False


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

    def named(scale: float | None, _: bool) -> Mapping[str, Any]:
        # torch's own kernels know by themselves; this one has to be told.
        in_order = torch.are_deterministic_algorithms_enabled()
        return {"softmax_scale": scale, "causal": True, "deterministic": in_order}

    return _kernel("flash-attn", attend, named)


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
        key_starts: Tensor,
        longest: int,
        key_longest: int,
        *,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        before = -1 if window is None else window - 1
        return attend(
            *(query, key, value, starts, key_starts, longest, key_longest),
            window_size=(before, 0),
            **named(scale, query.shape[1] != key.shape[1]),
        )

    return Kernel(name, compute)


KERNELS = (torch_kernel, flash_kernel)
"""Makers, the one that is tried first in front."""

Contexts = Sequence[tuple[int, ...]]
"""For each sequence the numbers of those that stand before its tokens."""
Loop = Callable[[Tensor, Tensor, Tensor, Sequence[int], Contexts, int | None], Tensor]
"""What a kernel must give: of query, key, value `(T, heads, D)`, lengths, contexts and window."""


def attend(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    contexts: Contexts,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Attention of sequences in their contexts, by a kernel; `(T, heads, D)`.

    Args:
        kernel: Computes it.
        query: `(T, heads, D)`.
        key: `(T, kv_heads, D)`.
        value: As `key`.
        lengths: Tokens of each sequence, T in all.
        contexts: Their contexts.
        scale, window: See `Compute`.
    """
    starts, longest = sequence_starts(tuple(lengths), query.device), max(lengths)
    key_starts, key_longest = starts, longest
    if any(contexts):
        rows, key_starts, key_longest = _seen(tuple(lengths), tuple(contexts), query.device)
        key, value = key.index_select(0, rows), value.index_select(0, rows)
    return kernel.compute(
        *(query, key, value, starts, key_starts, longest, key_longest), scale=scale, window=window
    )


@functools.lru_cache(maxsize=4)
def _seen(
    lengths: tuple[int, ...], contexts: tuple[tuple[int, ...], ...], device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """The rows of the keys that each sequence sees, where they begin, and the most of one."""
    ends = np.cumsum([0, *lengths])
    rows = [
        np.concatenate([np.arange(ends[n], ends[n + 1]) for n in (*context, number)])
        for number, context in enumerate(contexts)
    ]
    counts = tuple(map(len, rows))
    index = to_device(torch.from_numpy(np.concatenate(rows)), device)
    return index, sequence_starts(counts, device), max(counts)


def choose(device: torch.device, dtype: torch.dtype, shape: Shape, loop: Loop) -> Kernel | None:
    """A kernel that computes what the loop does, forward and backward; None where there is none."""
    if device.type != "cuda" or dtype not in DTYPES:
        return None
    return first_that_works(KERNELS, functools.partial(difference, device, dtype, shape, loop))


def first_that_works(
    makers: Sequence[Callable[[], Kernel]], differs: Callable[[Compute, Contexts], float]
) -> Kernel | None:
    """The first kernel that there is and that is right; a log says why others were passed over.

    Args:
        makers: Make the kernels.
        differs: Tries a kernel on sequences in contexts; how far it is from what it should be, at
            most, of the largest.
    """
    for make in makers:
        try:
            kernel = make()
            found = differs(kernel.compute, _NO_CONTEXTS)
        except Exception as error:  # whatever a kernel does not like, another one may
            _log.info("no %s: %s", make.__name__, str(error).partition("\n")[0])
            continue
        if found > _NEAR:
            _log.warning("%s is off by %.2g and is not used", kernel.name, found)
            continue
        _log.info("packed attention is computed by %s", kernel.name)
        return replace(kernel, in_contexts=_knows_contexts(kernel, differs))
    return None


def _knows_contexts(kernel: Kernel, differs: Callable[[Compute, Contexts], float]) -> bool:
    try:
        found = differs(kernel.compute, _TRIED_CONTEXTS)
    except Exception as error:
        _log.info("%s, in contexts: %s", kernel.name, str(error).partition("\n")[0])
        return False
    if found > _NEAR:
        _log.info("%s is off by %.2g in contexts, which the loop computes", kernel.name, found)
    return found <= _NEAR


def difference(
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    loop: Loop,
    compute: Compute,
    contexts: Contexts,
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
    kernel = Kernel("tried", compute)
    for window in _TRIED_WINDOWS:
        outputs = (
            loop(*inputs, _TRIED_LENGTHS, contexts, window),
            attend(kernel, *inputs, _TRIED_LENGTHS, contexts, None, window),
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
    return to_device(ends, device)


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
