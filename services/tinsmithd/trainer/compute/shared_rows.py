"""Which positions of some data are computed in which row of a micro-batch that shares tokens.

The head makes logits row by row. A row that several data begin with has a target, a logprob and a
gradient for each of them; its probabilities are made once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmithd.modeling.device_copies import to_device


@dataclass(frozen=True)
class Members:
    """Positions whose rows are in one chunk, `m` of them.

    Attributes:
        positions: int64 `(m,)`; their numbers among all positions.
        rows: int64 `(m,)`; the row of each, from the chunk's first.
    """

    positions: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Parts:
    """What of the members of a chunk may have a gradient: `k` members in `c` rows.

    Attributes:
        members: int64 `(k,)`; numbers among the members.
        rows: int64 `(c,)`; rows of the chunk, ascending.
        places: int64 `(k,)`; for each member the number of its row among `rows`.
    """

    members: Tensor
    rows: Tensor
    places: Tensor

    def summed(self, g: Tensor) -> Tensor:
        """Sums over the members of each row: `(k,)` to `(c,)`."""
        return g.new_zeros(len(self.rows)).index_add_(0, self.places, g)


class SharedRows:
    """The rows of all positions; both are known on the host, so nothing waits for a device.

    Args:
        rows: int64 `(T,)`; for each position, of one datum after the other, its row.
        positions: Those that may have a gradient, ascending.
        device: Where the head computes.
    """

    def __init__(self, rows: np.ndarray, positions: np.ndarray, device: torch.device) -> None:
        self._device = device
        self._order = np.argsort(rows, kind="stable")
        self._rows = rows[self._order]
        self._may = np.zeros(len(rows), bool)
        self._may[positions] = True

    def _bounds(self, chunk: slice) -> slice:
        first, end = np.searchsorted(self._rows, (chunk.start, chunk.stop))
        return slice(int(first), int(end))

    def members(self, chunk: slice) -> Members:
        """Those of the rows of a chunk; every row has one at least."""
        some = self._bounds(chunk)
        return Members(self._there(self._order[some]), self._there(self._rows[some] - chunk.start))

    def parts(self, chunk: slice) -> Parts:
        """Those of its members that may have a gradient."""
        some = self._bounds(chunk)
        members = np.flatnonzero(self._may[self._order[some]])
        rows, places = np.unique(self._rows[some][members] - chunk.start, return_inverse=True)
        return Parts(*map(self._there, (members, rows, places)))

    def _there(self, index: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(index)), self._device)
