"""Memory for draws, whose weights the compiled part makes."""

import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.native.abi import Library
from tinsmithd.sampler.engines.transformers.sampling import BLOCK_TOKENS, Workspace


class NativeWorkspace(Workspace):
    """See `Workspace`.

    Args:
        library: What computes.
    """

    def __init__(self, library: Library) -> None:
        super().__init__()
        self._library = library

    def weigh(self, logits_NV: Tensor, inverse_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Workspace.weigh`: in one pass over the logits, after that for the largest."""
        count, vocab = logits_NV.shape
        blocks = -(-vocab // BLOCK_TOKENS)
        weights = self.take(count, blocks * BLOCK_TOKENS, logits_NV.device)
        weights_NBW = weights.view(count, blocks, BLOCK_TOKENS)
        ones_N = torch.ones(count) if inverse_N is None else inverse_N
        maxima_N, sums_NB = self._library.weigh(logits_NV, ones_N, weights_NBW)
        return weights_NBW, maxima_N, sums_NB
