"""A decoder whose forward is one call of the compiled part."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmithd.sampler.engines.transformers.kv import StepAttention
from tinsmithd.sampler.engines.transformers.model.lora_rows import LoraRows
from tinsmithd.sampler.engines.transformers.native.abi import StepOf
from tinsmithd.sampler.engines.transformers.native.loras import NativeLoras
from tinsmithd.sampler.engines.transformers.native.model import NativeModel
from tinsmithd.sampler.engines.transformers.native.places import Places


class NativeDecoder:
    """Computes as `Decoder` does, faster at few rows, each row by itself.

    Args:
        model: The weights.

    Attributes:
        shape: Of the model.
    """

    def __init__(self, model: NativeModel) -> None:
        self.shape, self._model = model.shape, model
        self._narrow = model.shape.dtype == torch.bfloat16
        self._loras = NativeLoras()
        self._scores = torch.empty(0)

    @torch.inference_mode()
    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: StepAttention,
        loras: LoraRows | None,
        *,
        sequences: int = 0,
    ) -> Tensor:
        """Compute the hidden states of rows; see `Decoder.forward`.

        Args:
            tokens_T: int64 `(T,)`, T at least 1.
            positions_T: int64 `(T,)`, those of `attend`.
            attend: Which rows there are, and where their keys and values are.
            loras: The adapters of the T rows; None: no row has any.
            sequences: How many rows, the first, are next tokens of sequences.

        Returns:
            float32 `(T, hidden)`, rounded to the shape's dtype.

        Raises:
            MemoryError: There is none for so many rows, and nothing was done.
        """
        model, places = self._model, Places(attend)
        assert len(places.rows) == len(tokens_T)
        h = F.embedding(tokens_T, model.embedding).float()
        angles, out = model.angles(positions_T), torch.empty_like(h)
        groups = None if loras is None else self._loras.groups(loras).array
        step = StepOf(
            rows=places.rows.ctypes.data,
            stores=places.stores,
            groups=groups,
            angles=angles.data_ptr(),
            h=h.data_ptr(),
            out=out.data_ptr(),
            count=len(h),
            groups_count=0 if groups is None else len(groups),
            sequences=len(attend.sequences),
        )
        model.kernels.forward(model.each, step)
        return out

    @torch.inference_mode()
    def logits(self, hidden_N: Tensor, loras: LoraRows | None) -> Tensor:
        """Compute logits for scores, float32 `(N, vocab)`; see `Decoder.logits`.

        The next call writes to the same memory: the pages of new memory cost as well.
        """
        count, vocab = len(hidden_N), self._model.head.n
        if self._scores.numel() < count * vocab:
            self._scores = torch.empty(count * vocab)
        out = self._scores[: count * vocab].view(count, vocab)
        return self._logits(hidden_N, loras, out)

    @torch.inference_mode()
    def draw_logits(self, hidden_N: Tensor, loras: LoraRows | None) -> Tensor:
        """As `logits`, with the same bits."""
        return self._logits(hidden_N, loras, None)

    def _logits(self, hidden_N: Tensor, loras: LoraRows | None, out: Tensor | None) -> Tensor:
        groups = None if loras is None else self._loras.head_groups(loras).array
        return self._model.kernels.product(
            *(self._model.head, hidden_N, groups), narrow=self._narrow, out=out
        )
