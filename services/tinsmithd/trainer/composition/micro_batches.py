"""Cuts data into micro-batches of a token budget."""

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
