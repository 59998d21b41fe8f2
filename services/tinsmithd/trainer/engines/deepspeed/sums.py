"""Sums over ranks; where it is asked for, to the same bits on whatever machines the ranks are.

A collective library adds up in an order of its own: NCCL chooses rings and trees by the wiring of
the machines and the size of a message. In the order of the ranks, each rank is sent what the others
have of its slice and adds it up itself. That is as many bytes on the wire as a reduce-scatter has.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def reduce_scatter(values: Tensor, *, in_order: bool) -> Tensor:
    """This rank's slice of a sum over the ranks.

    Args:
        values: `(n,)` on each rank, n a multiple of the number of ranks.
        in_order: Add up in the order of the ranks.
    """
    ranks = dist.get_world_size()
    own = values.new_empty(len(values) // ranks)
    if not in_order:
        dist.reduce_scatter_tensor(own, values)
        return own
    slices = torch.empty_like(values)
    dist.all_to_all_single(slices, values)
    first, *others = slices.chunk(ranks)
    own.copy_(first)
    for other in others:
        own.add_(other)
    return own


def all_reduce(values: Tensor, *, in_order: bool) -> None:
    """Replace values by their sum over the ranks.

    Args:
        values: Contiguous, of the same shape on each rank.
        in_order: Add up in the order of the ranks.
    """
    if not in_order:
        dist.all_reduce(values)
        return
    ranks, flat = dist.get_world_size(), values.view(-1)
    padded = flat.new_zeros(-(-len(flat) // ranks) * ranks)
    padded[: len(flat)] = flat
    dist.all_gather_into_tensor(padded, reduce_scatter(padded, in_order=True))
    flat.copy_(padded[: len(flat)])
