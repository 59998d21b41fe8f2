"""Attention of one forward."""

from __future__ import annotations

from torch import Tensor

from tinsmithd.sampler.engines.transformers.kv.parts import Prompt, SequenceKv


class StepAttention:
    """Attention of one step's forward; an `Attend`. It writes K and V as it goes.

    Attributes:
        sequences: Whose next tokens are the forward's first rows, in this order.
        pieces: What its other rows are: (prompt, start, end), in this order.
        positions_T: Position of each row, int64 `(T,)`.
    """

    sequences: list[SequenceKv]
    pieces: list[tuple[Prompt, int, int]]
    positions_T: Tensor

    def __call__(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """Attention of one layer.

        Args:
            layer: Which.
            q_THD: Queries after rope, `(T, heads, head_dim)`.
            k_TGD: Keys after rope, `(T, kv_heads, head_dim)`.
            v_TGD: Values, likewise.

        Returns:
            `(T, heads * head_dim)`.
        """

    def commit(self) -> None:
        """Let lengths grow by what the forward wrote. Without it the step has not been."""
