"""Memory that is given again."""

import gc
import threading

import numpy as np
import torch

from tinsmithd.reused_memory import ReusedMemory

SIZE = 64


def test_it_is_given_again_once_nobody_has_any_of_it() -> None:
    """Whoever has a view of it, or of a part, or a tensor of it, has it."""
    memory = ReusedMemory(4 * SIZE)
    first = memory.take(SIZE)
    place = first.ctypes.data
    views = [
        first[3:5].reshape(2, 1),
        torch.from_numpy(first.view(np.float32))[1:].view(3, 5),
        np.frombuffer(memoryview(first), np.float32, 2, 8),
        torch.from_numpy(first).view(torch.float32).numpy()[2:],
    ]
    del first
    while views:
        assert memory.take(SIZE).ctypes.data != place
        views.pop()
        gc.collect()
    assert place in [taken.ctypes.data for taken in [memory.take(SIZE) for _ in range(2)]]


def test_no_two_have_the_same() -> None:
    """However many threads take and let go."""
    memory = ReusedMemory(8 * SIZE)
    wrong: list[int] = []

    def use(number: int) -> None:
        for turn in range(300):
            own = memory.take(SIZE)
            own[:] = number
            other = memory.take(SIZE)
            other[:] = 100 + number
            if turn % 50 == 0:
                gc.collect()
            if not (own == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert memory.kept_bytes <= 8 * SIZE


def test_no_more_is_kept_than_allowed() -> None:
    """What was of use longest ago leaves; what is too large is never kept."""
    memory = ReusedMemory(2 * SIZE)
    three = [memory.take(SIZE) for _ in range(3)]
    places = [each.ctypes.data for each in three]
    three.clear()
    assert memory.kept_bytes == 2 * SIZE
    del places[0]
    assert {memory.take(SIZE).ctypes.data} < set(places)
    memory.take(2 * SIZE + 1)
    assert memory.kept_bytes == 0
    memory.take(SIZE)
    assert memory.kept_bytes == SIZE


def test_it_can_be_there_before_anybody_asks() -> None:
    """As far as it may be kept, and no more than is missing."""
    memory = ReusedMemory(3 * SIZE)
    assert memory.prepare(SIZE, 4) is None
    for count, kept in ((1, SIZE), (3, 3 * SIZE)):
        making = memory.prepare(SIZE, count)
        assert making is not None
        making.join()
        assert memory.kept_bytes == kept
        assert memory.prepare(SIZE, count) is None
    taken = memory.take(SIZE)
    assert len(taken) == SIZE
    assert memory.kept_bytes == 2 * SIZE
