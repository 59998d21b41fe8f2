"""Memory that is made ready for the next adapter is as good as new."""

import numpy as np

from tinsmithd.sampler.engines.transformers.model import spare_memory
from tinsmithd.sampler.engines.transformers.model.spare_memory import SpareMemory

COUNT = 3 * spare_memory.TOUCHED_FLOATS // 2


def faults() -> int:
    """Page faults of this thread so far."""
    with open("/proc/thread-self/stat") as file:
        return int(file.read().rpartition(")")[2].split()[7])


def test_it_is_zero_and_nobody_elses_and_begins_with_a_cache_line() -> None:
    """Whether none, some or all of it was made ready, and of another size."""
    spare, taken = SpareMemory(), []
    for touches, count in ((0, COUNT), (0, COUNT), (1, COUNT), (9, COUNT), (9, COUNT // 2)):
        for _ in range(touches):
            spare.touch_some()
        made = spare.take(count)
        assert made.shape == (count,)
        assert made.ctypes.data % 64 == 0
        assert not made.any()
        made[:] = 1
        taken.append(made)
    assert all(made.all() for made in taken)
    assert not any(np.shares_memory(a, b) for i, a in enumerate(taken) for b in taken[:i])


def test_what_is_ready_costs_no_faults() -> None:
    spare = SpareMemory()
    spare.take(COUNT)[:] = 1
    steps = 1
    while spare.touch_some():
        steps += 1
    assert steps == 3, "some at a time, and then no more"
    before = faults()
    spare.take(COUNT)[:] = 1
    assert faults() - before < COUNT * 4 // 4096 // 10


def test_large_memory_is_not_kept_ready() -> None:
    spare = SpareMemory()
    spare.take(spare_memory.SPARE_BYTES_MAX // 4)
    assert not spare.touch_some()
