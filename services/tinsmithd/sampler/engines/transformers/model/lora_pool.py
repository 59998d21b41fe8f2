"""The adapters that a decoder can add, by key."""

import threading
from collections.abc import Sequence

import torch

from tinsmithd.domain import ModelState
from tinsmithd.sampler.engines.transformers.model.linear import RowRule
from tinsmithd.sampler.engines.transformers.model.lora_layout import LoraLayout
from tinsmithd.sampler.engines.transformers.model.lora_rows import LoraRows
from tinsmithd.sampler.engines.transformers.model.lora_stack import LoraStacks
from tinsmithd.sampler.engines.transformers.model.lora_weights import (
    LoraWeights,
    Turn,
    lora_weights,
    turned,
)
from tinsmithd.sampler.engines.transformers.model.shape import ModelShape
from tinsmithd.sampler.engines.transformers.model.spare_memory import SpareMemory


class LoraPool:
    """Adapters by key.

    Any thread may load and unload. One thread computes: it alone calls `rows`, and is done with
    what that gave when it calls it again.

    Args:
        layout: Where adapters can stand.
        shape: Of the decoder.
        rule: How many rows its products have.
        turn: Turns their matrices round.
        as_floats: Keep them in float32, rounded to the shape's dtype.
    """

    def __init__(
        self,
        layout: LoraLayout,
        shape: ModelShape,
        rule: RowRule,
        turn: Turn = turned,
        *,
        as_floats: bool = False,
    ) -> None:
        self._layout, self._shape, self._rule = layout, shape, rule
        self._dtype = torch.float32 if as_floats else shape.dtype
        self._rounded = as_floats and shape.dtype == torch.bfloat16
        self._turn, self._spare = turn, SpareMemory()
        self._lock = threading.Lock()
        self._adapters: dict[str, LoraWeights] = {}
        self._stacks = LoraStacks()

    def load(self, key: str, state: ModelState) -> int:
        """Add an adapter under an immutable key.

        Returns:
            The bytes that it takes.

        Raises:
            FailedPrecondition: It does not fit the base model (INCOMPATIBLE_CHECKPOINT).
        """
        adapter = lora_weights(
            *(self._layout, state),
            dtype=self._dtype,
            device=self._shape.device,
            memory=self._spare.take,
            turn=self._turn,
            rounded=self._rounded,
        )
        with self._lock:
            self._adapters[key] = adapter
        return adapter.bytes

    def speed_up(self, key: str) -> bool:
        """Let a part of an adapter be computed faster from now on, with the same bits; or else have
        some of the memory ready that the next one needs.

        An unknown key is no error.

        Returns:
            Whether there may be more of it to do.
        """
        with self._lock:
            adapter = self._adapters.get(key)
        if adapter is not None and adapter.reorder_some():
            return True
        return self._spare.touch_some()

    def unload(self, key: str) -> None:
        """Drop an adapter; an unknown key is no error. `LoraRows` that have it keep it."""
        with self._lock:
            self._adapters.pop(key, None)

    def rows(self, keys: Sequence[str | None], sequences: int) -> LoraRows | None:
        """The adapters of the rows of a forward; None where no row has any.

        Args:
            keys: One per row.
            sequences: How many rows, the first, are next tokens of sequences, not of prompts.

        Raises:
            KeyError: There is no such adapter.
        """
        if not any(keys):
            return None
        with self._lock:
            adapters = [None if key is None else self._adapters[key] for key in keys]
        return LoraRows(adapters, sequences, self._stacks, self._rule, self._shape.device)
