"""Attention of one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.kv.parts import Prompt, SequenceKv
from tinsmithd.sampler.engines.transformers.kv.rows import Kernel, PieceRows, SequenceRows, join


class StepAttention:
    """Attention of one step's forward; an `Attend`. It writes K and V as it goes.

    Args:
        kernel: How to attend.
        sequences: Rows of one token each; those of one arena together, ascending by slot.
        pieces: Rows of prompts, behind them.
        committed: Called by `commit`, once.

    Attributes:
        sequences: Whose next tokens are the forward's first rows, in this order.
        pieces: What its other rows are: (prompt, start, end), in this order.
        positions_T: Position of each row, int64 `(T,)`.
    """

    def __init__(
        self,
        kernel: Kernel,
        sequences: Sequence[SequenceKv],
        pieces: Sequence[tuple[Prompt, int, int]],
        committed: Callable[[StepAttention], None],
    ) -> None:
        self.sequences = list(sequences)
        self.pieces = list(pieces)
        self._committed = committed
        positions = [np.array([sequence.length for sequence in sequences], np.int64)]
        positions += [np.arange(start, end) for _prompt, start, end in pieces]
        self.positions_T = torch.from_numpy(np.concatenate(positions)).to(kernel.shape.device)
        self._kernel = kernel
        self._parts: list[SequenceRows | PieceRows] | None = None

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
        qkv_THD = join(q_THD, k_TGD, v_TGD)
        if self._parts is None:
            self._parts = self._made_parts()
        found = [part(layer, qkv_THD) for part in self._parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _made_parts(self) -> list[SequenceRows | PieceRows]:
        parts: list[SequenceRows | PieceRows] = []
        row = 0
        for run in _runs(self.sequences):
            parts.append(SequenceRows(self._kernel, run, row))
            row += len(run)
        for prompt, start, end in self.pieces:
            parts.append(PieceRows(self._kernel, prompt, start, end, row))
            row += end - start
        return parts

    def commit(self) -> None:
        """Let lengths grow by what the forward wrote. Without it the step has not been."""
        for sequence in self.sequences:
            sequence.own += 1
        for prompt, _start, end in self.pieces:
            prompt.read = end
        self._committed(self)


def _runs(sequences: Sequence[SequenceKv]) -> list[list[SequenceKv]]:
    """Sequences in consecutive slots of one arena, together."""
    runs: list[list[SequenceKv]] = []
    for sequence in sequences:
        last = runs[-1][-1] if runs else None
        if last is not None and last.arena is sequence.arena and last.slot + 1 == sequence.slot:
            runs[-1].append(sequence)
        else:
            runs.append([sequence])
    return runs
