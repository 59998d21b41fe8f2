"""Whether a GPU gives the same bits each time, and what that costs.

Some kernels on GPUs add up in whatever order their threads come by. For most there are others that
keep one order, which torch takes where it is told to; what has none fails then. How much slower
those are depends on the GPU, the kernel of attention and the model, so it is measured at the start.
What several ranks add up has an order of its own (`engines.deepspeed.sums`).
"""

import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from transformers import AttentionInterface

from tinsmithd.config import ConfigError
from tinsmithd.modeling.device_errors import is_sticky
from tinsmithd.modeling.packing import ATTENTION
from tinsmithd.modeling.supported import has_windows
from tinsmithd.modeling.varlen import shape_of

Wanted = Literal["auto", "always", "never"]

COST_MAX = 1.05
"""With `auto`, the most that it may cost: its time over the time without it."""
RUNS = 5
TRIED_LENGTHS = (1536, 512)
"""Tokens of the data that are tried; a context may be shorter."""
TRIED_LOGITS = 128
"""Rows of logits that are tried."""
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""With this cuBLAS keeps one order. It reads the variable with its first product."""

_log = logging.getLogger(__name__)

Trial = Callable[[], object]


def prepare() -> None:
    """Set what libraries read at their start; a CPU has nothing of it."""
    if torch.cuda.is_available():
        os.environ.setdefault(*CUBLAS_WORKSPACE)


def switch(on: bool) -> None:
    """Let torch take kernels that keep one order, or whichever is fastest."""
    torch.use_deterministic_algorithms(on)
    # Else torch would fill each new tensor, so that whoever reads too early is found out.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Determinism:
    """Decides once for a process: all its engines must do as the first said.

    Args:
        wanted: The setting.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._decided: bool | None = None

    def decide(self, device: torch.device, make_trial: Callable[[], Trial]) -> bool:
        """Whether a GPU gives the same bits each time from now on; False on a CPU, which does.

        Args:
            device: What computes.
            make_trial: Makes what is computed with and without it.

        Raises:
            ConfigError: It must, and cannot.
        """
        if device.type != "cuda":
            return False
        if self._decided is None:
            self._decided = self._wanted != "never" and self._is_cheap(make_trial)
            switch(self._decided)
        return self._decided

    def _is_cheap(self, make_trial: Callable[[], Trial]) -> bool:
        try:
            factor = cost(make_trial())
        except RuntimeError as error:
            if is_sticky(error):
                raise
            why = str(error).partition("\n")[0]
            if self._wanted == "always":
                raise ConfigError(f"trainer.deterministic: it cannot be had here: {why}") from error
            _log.warning("GPUs give other bits each time, since what keeps them fails: %s", why)
            return False
        taken = self._wanted == "always" or factor <= COST_MAX
        text = "equal bits each time cost %+.1f %% of a layer: %s"
        _log.info(text, 100 * (factor - 1), "taken" if taken else "not taken")
        return taken


def cost(trial: Trial, clock: Callable[[], float] | None = None) -> float:
    """Time of a trial when it gives the same bits each time, over its time when it need not.

    Args:
        trial: Runs to its end what is timed.
        clock: Tells seconds.
    """
    now = clock or time.perf_counter
    least: dict[bool, float] = {}
    for run in range(RUNS + 1):
        for on in (False, True):
            switch(on)
            started = now()
            trial()
            took = now() - started
            if run:  # the first loads kernels
                least[on] = min(took, least.get(on, took))
    return least[True] / least[False]


def layer_trial(config: Any, device: torch.device, dtype: torch.dtype) -> Trial:
    """One layer there and back, and what a head does besides products, in a model's own sizes.

    Weights are random: a partitioned model would have to gather its own.

    Args:
        config: The model's, as transformers has it; its packed attention is registered.
        device: What computes.
        dtype: Of its weights.
    """
    shape, width = shape_of(config), config.hidden_size
    lengths = [min(length, config.max_position_embeddings) for length in TRIED_LENGTHS]
    count, experts = sum(lengths), getattr(config, "num_experts_per_tok", None) or 1
    inner = experts * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    attention = AttentionInterface()[ATTENTION]
    windows = [None, config.sliding_window] if has_windows(config) else [None]

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device, dtype=dtype) / math.sqrt(rows)

    sizes = [heads * shape.head_size for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    to_heads = [drawn(width, size) for size in sizes]
    from_heads, up, gate = drawn(sizes[0], width), drawn(width, inner), drawn(width, inner)
    down, hidden, seed = drawn(inner, width), drawn(count, width), drawn(count, width)
    order = torch.randperm(count, device=device)
    wanted = torch.randint(config.vocab_size, (TRIED_LOGITS, 1), device=device)
    part = torch.ones(TRIED_LOGITS, 1, device=device)

    def run() -> None:
        x = hidden.detach().requires_grad_()
        q, k, v = ((x @ w).view(1, count, -1, shape.head_size).transpose(1, 2) for w in to_heads)
        y = x
        for window in windows:
            seen, _ = attention(
                torch.nn.Module(), q, k, v, None, sliding_window=window, segment_lengths=lengths
            )
            y = y + seen.reshape(count, -1) @ from_heads
        y = (torch.nn.functional.silu(y @ gate) * (y @ up)) @ down
        torch.autograd.backward(y, seed)
        with torch.no_grad():
            torch.empty_like(y)[order] = y.detach()
            logits = torch.zeros(TRIED_LOGITS, config.vocab_size, device=device)
            logits.scatter_add_(1, wanted, part)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
