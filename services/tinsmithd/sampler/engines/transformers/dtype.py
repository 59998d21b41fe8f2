"""Chooses the element type of a base model's weights by what the machine is quick at."""

import math
import time
from collections.abc import Callable, Sequence

import torch

ROWS, SIZE = 8, 2048
"""A product like those of decoding: few rows, and weights too large for the caches."""
ROUNDS = 7


def resolved_dtype(
    dtype: str, *, compiled: Callable[[], bool], on_progress: Callable[[str], None]
) -> str:
    """ "float32" or "bfloat16" of a setting that may be "auto".

    Args:
        dtype: The setting.
        compiled: Whether compiled kernels would compute in float32: they read no more bytes than
            bfloat16 has where the weights are bfloat16's, and give what a trainer in float32 does.
        on_progress: Takes a line for a person.
    """
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        chosen = "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
        on_progress(f"dtype auto: {chosen}")
        return chosen
    if compiled():
        on_progress("dtype auto: float32, with compiled kernels")
        return "float32"
    if not _is_native():
        on_progress("dtype auto: float32, since this CPU has no bfloat16 of its own")
        return "float32"
    narrow_s, wide_s = _measured_s((torch.bfloat16, torch.float32))
    chosen = "bfloat16" if narrow_s < wide_s else "float32"
    on_progress(
        f"dtype auto: {chosen}; a product takes {narrow_s * 1e3:.2f} ms in bfloat16 and "
        f"{wide_s * 1e3:.2f} in float32"
    )
    return chosen


def _is_native() -> bool:
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.inference_mode()
def _measured_s(dtypes: Sequence[torch.dtype]) -> list[float]:
    """The least time of a product in each dtype, in seconds, in turns: other work only adds."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, SIZE, generator=generator)
    # Several weights, so that none is still in the caches from the round before.
    weights = torch.randn(4, SIZE, SIZE, generator=generator)
    sides = [(rows.to(dtype), list(weights.to(dtype))) for dtype in dtypes]
    least_s = [math.inf] * len(sides)
    for _ in range(ROUNDS):
        for index, (own_rows, own_weights) in enumerate(sides):
            start_s = time.perf_counter()
            for weight in own_weights:
                torch.nn.functional.linear(own_rows, weight)
            took_s = (time.perf_counter() - start_s) / len(own_weights)
            least_s[index] = min(least_s[index], took_s)
    return least_s
