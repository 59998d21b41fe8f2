"""Cuts data into micro-batches of a token budget."""

import heapq
from collections.abc import Sequence


def cut(lengths: Sequence[int], *, tokens_max: int, world_size: int) -> list[list[int]]:
    """Cut some data into micro-batches.

    The longest data come first, each goes into the first micro-batch that has room for it
    (first-fit decreasing, at most 11/9 of the fewest possible). The budget shrinks where it would
    leave ranks without work. The result depends on the arguments only.

    Args:
        lengths: Number of tokens of each datum.
        tokens_max: Maximum tokens of a micro-batch; a longer datum is one by itself.
        world_size: Number of ranks.

    Returns:
        Indices of the data of each micro-batch, ordered so that neighbours have about the same
        size: the ranks take `world_size` of them at a time.
    """
    share = -(-sum(lengths) // world_size)
    budget = min(tokens_max, max(share, 1))
    micro_batches: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        for place, room in enumerate(rooms):
            if length <= room:
                micro_batches[place].append(index)
                rooms[place] -= length
                break
        else:
            micro_batches.append([index])
            rooms.append(budget - length)
    order = sorted(range(len(rooms)), key=lambda place: (rooms[place], place))
    return [micro_batches[place] for place in order]


def cut_in_step(
    lengths: Sequence[int], *, tokens_max: int, world_size: int
) -> list[list[list[int]]]:
    """Cut some data into rounds in which each rank has one micro-batch, of like size in a round.

    In each round the longest datum that is left says how many tokens a micro-batch may have: the
    ranks wait for it anyway, and each must have the memory for it. The others go, the longest
    first, where there is most room. The result depends on the arguments only.

    Args:
        lengths: Number of tokens of each datum.
        tokens_max: Maximum tokens of a micro-batch, unless a datum of its round is longer.
        world_size: Number of ranks.

    Returns:
        For each round and rank, the indices of the data of its micro-batch, of which there may be
        none.
    """
    rest = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rounds: list[list[list[int]]] = []
    while rest:
        share = -(-sum(lengths[i] for i in rest) // world_size)
        budget = max(lengths[rest[0]], min(tokens_max, share))
        of_ranks: list[list[int]] = [[] for _ in range(world_size)]
        rooms = [(-budget, rank) for rank in range(world_size)]  # the largest first
        later: list[int] = []
        for index in rest:
            room, rank = -rooms[0][0], rooms[0][1]
            if lengths[index] <= room:
                of_ranks[rank].append(index)
                heapq.heapreplace(rooms, (lengths[index] - room, rank))
            else:
                later.append(index)
        rounds.append(of_ranks)
        rest = later
    return rounds
