"""Memory for activations: how much a token needs, how much there is, what to do without enough."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.modeling.device_errors import is_out_of_memory
from tinsmithd.trainer.compute.container import free_bytes

_log = logging.getLogger(__name__)

SHARE_OF_FREE = 0.5
"""Share of the memory that is free when the engine starts, for activations."""

_PROBE_TOKENS = (16, 48)

Compute = Callable[[Sequence[int], bool], None]
"""Computes the data of some indices of a batch, with recomputation or not."""


def activation_bytes_max(configured: int, device: torch.device, ranks_here: int) -> int:
    """Maximum bytes that a rank keeps for the backward pass.

    Args:
        configured: The setting; 0 takes a share of what is free now.
        device: Device of the model.
        ranks_here: Number of ranks that share this machine's memory.
    """
    if configured:
        return configured
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = _available_bytes() // ranks_here
    return int(free * SHARE_OF_FREE)


def _available_bytes() -> int:
    """Bytes that this process may still take of the machine, or of its container."""
    free: int = psutil.virtual_memory().available
    ours = free_bytes()
    return free if ours is None else min(free, ours)


def activation_bytes_per_token(run: Callable[[int], Any]) -> int:
    """Bytes that a token keeps for the backward pass, measured by two small forwards.

    Args:
        run: Builds the graph of a number of tokens and returns something that holds it.
    """
    kept = [_kept_bytes(run, count) for count in _PROBE_TOKENS]
    return max(1, (kept[1] - kept[0]) // (_PROBE_TOKENS[1] - _PROBE_TOKENS[0]))


def _kept_bytes(run: Callable[[int], Any], count: int) -> int:
    # They are held until all are counted: an address that is given out again would count once.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> None:
        # Nobody goes back through this graph. A node that got its own output back would hold
        # itself, and with it all that is below, for ever: no collector sees that circle.
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage

    def unpack(_: object) -> Tensor:
        raise AssertionError("a graph that measures has no way back")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        graph = run(count)
    del graph
    return sum(storage.nbytes() for storage in storages.values())


def compute_within_memory(
    compute: Compute,
    indices: Sequence[int],
    recompute: bool,
    lengths: Sequence[int],
    *,
    together: bool,
) -> None:
    """Compute some data; where memory does not suffice, in halves, at last with recomputation.

    Args:
        compute: Computes data. It keeps results only when it has all of them, so that it can be
            called again after a failure, unless they are computed together.
        indices: The data.
        recompute: Whether to recompute from the start.
        lengths: Number of tokens of each datum of the batch, for the error.
        together: Whether they are computed together, with or without recomputation as it is said,
            and in no other way.

    Raises:
        ResourceExhausted: They do not fit, or one datum alone, with recomputation (OUT_OF_MEMORY).
    """
    reason = shortage(partial(compute, indices, recompute))
    if reason is None:
        return
    if together:
        tokens = sum(lengths[index] for index in indices)
        raise ResourceExhausted(
            f"{len(indices)} data of {tokens} tokens, which must be computed together, do not fit "
            f"into the trainer's memory: {reason}",
            Reason.OUT_OF_MEMORY,
        )
    if len(indices) > 1:
        _log.warning("out of memory with %d data: computing them in halves", len(indices))
        half = len(indices) // 2
        for some in (indices[:half], indices[half:]):
            compute_within_memory(compute, some, recompute, lengths, together=False)
    elif not recompute:
        _log.warning("out of memory with one datum: computing it with recomputation")
        compute_within_memory(compute, indices, True, lengths, together=False)
    else:
        raise ResourceExhausted(
            f"a datum of {lengths[indices[0]]} tokens does not fit into the trainer's memory: "
            f"{reason}",
            Reason.OUT_OF_MEMORY,
        )


def shortage(compute: Callable[[], Any]) -> str | None:
    """Compute; returns why memory does not suffice, or None where it does."""
    try:
        compute()
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    # Inside the handler this would free little: the error holds frames, which hold tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return reason
