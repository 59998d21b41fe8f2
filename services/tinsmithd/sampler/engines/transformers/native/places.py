"""Where the keys and values of a step's rows are, as the compiled part is told."""

import ctypes
from collections.abc import Sequence

import numpy as np

from tinsmithd.sampler.engines.transformers.kv import Arena, Prompt, StepAttention
from tinsmithd.sampler.engines.transformers.native.abi import StoreOf
from tinsmithd.sampler.engines.transformers.native.model import pointer_array

NO_STORE = -1


class Places:
    """The rows of a step, and the stores that they read and write.

    Args:
        step: Its sequences' rows come first, then those of its pieces.

    Attributes:
        rows: int64 `(T, 5)`, as `RowOf` has them.
        stores: All that they name.
    """

    def __init__(self, step: StepAttention) -> None:
        self._numbers: dict[Arena | Prompt, int] = {}
        self._kept: list[ctypes.Array[ctypes.c_void_p]] = []
        self._stores: list[StoreOf] = []
        found: list[tuple[int, int, int, int, int]] = []
        for sequence in step.sequences:
            split, shared = sequence.length - sequence.own, NO_STORE
            if split:
                shared = self._prompt(sequence.prompt)
            place = self._arena(sequence.arena), sequence.slot
            found.append((*place, sequence.length, shared, split))
        for prompt, start, end in step.pieces:
            store = self._prompt(prompt)
            found += [(store, 0, position, NO_STORE, 0) for position in range(start, end)]
        self.rows = np.array(found, np.int64)
        self.stores = (StoreOf * len(self._stores))(*self._stores)

    def _arena(self, arena: Arena) -> int:
        if arena not in self._numbers:
            self._add(arena, [kv.data_ptr() for kv in arena.kv_SHCD], arena.capacity)
        return self._numbers[arena]

    def _prompt(self, prompt: Prompt) -> int:
        if prompt not in self._numbers:
            kv = prompt.kv_LHCD
            assert kv is not None
            first, step = kv.data_ptr(), kv.stride(0) * kv.element_size()
            self._add(prompt, [first + layer * step for layer in range(len(kv))], kv.shape[2])
        return self._numbers[prompt]

    def _add(self, owner: Arena | Prompt, layers: Sequence[int], capacity: int) -> None:
        self._numbers[owner] = len(self._stores)
        pointers = pointer_array(layers)
        self._kept.append(pointers)
        self._stores.append(StoreOf(pointers, capacity))
