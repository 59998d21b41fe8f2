"""Brings a model's state to host memory from ranks that hold a share each: only to the first rank.

Nobody asks the others for it. They send their shares, some megabytes at a time, and copy nothing to
host memory: the state of an adapter on many experts has as many bytes as a model.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from tinsmithd.modeling.device_copies import host_copy, host_memory

GATHERED_BYTES = 256 * 1024 * 1024
"""Maximum bytes that the first rank's device holds of all shares at once."""


def of_first(flat: Tensor) -> Tensor | None:
    """A copy in host memory of what every rank holds; None but on the first rank."""
    return host_copy(flat) if dist.get_rank() == 0 else None


def of_all(share: Tensor, device: torch.device) -> Tensor | None:
    """All ranks' shares, one after the other, in host memory; None but on the first rank.

    Args:
        share: float32 `(n,)`, of the same length on all ranks, wherever it is.
        device: Where the ranks can speak to each other.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks == 1:
        return host_copy(share)
    step = max(1, GATHERED_BYTES // (ranks * share.element_size()))
    whole = None
    if rank == 0:
        whole = host_memory((ranks, len(share)))
    for start in range(0, len(share), step):
        part = share.detach()[start : start + step].to(device).contiguous()
        if whole is None:
            dist.gather(part, dst=0)
            continue
        gathered = part.new_empty((ranks, len(part)))
        dist.gather(part, list(gathered), dst=0)
        for into, piece in zip(whole, gathered, strict=True):
            host_copy(piece, into[start : start + step])
    return None if whole is None else whole.view(-1)
