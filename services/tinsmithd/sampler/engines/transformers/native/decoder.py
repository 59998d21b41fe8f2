"""A decoder whose forward is one call of the compiled part."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmithd.sampler.engines.transformers.kv import StepAttention
from tinsmithd.sampler.engines.transformers.model.decoder import Decoder
from tinsmithd.sampler.engines.transformers.model.lora_rows import LoraRows
from tinsmithd.sampler.engines.transformers.native.abi import StepOf
from tinsmithd.sampler.engines.transformers.native.loras import NativeLoras
from tinsmithd.sampler.engines.transformers.native.model import NativeModel
from tinsmithd.sampler.engines.transformers.native.places import Places


class NativeDecoder:
    """Computes as `Decoder` does, faster at few rows, each row by itself.

    Hidden states and sums are float32, also where weights, keys and values are bfloat16.

    Args:
        model: The weights.
        of_prompts: What computes rows of prompts, and logits for scores; None: this does too.

    Attributes:
        shape: Of the model.
    """

    def __init__(self, model: NativeModel, of_prompts: Decoder | None) -> None:
        self.shape = model.shape
        self._model, self._of_prompts = model, of_prompts
        self._loras = NativeLoras()
        self._cut: tuple[LoraRows | None, int, tuple[LoraRows | None, LoraRows | None]]
        self._cut = None, 0, (None, None)

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
            float32 `(T, hidden)`.

        Raises:
            MemoryError: There is none for so many rows, and nothing was done.
        """
        plain = self._of_prompts
        if plain is None or sequences == len(tokens_T):
            return self._all(tokens_T, positions_T, attend, loras)
        few, many = self._cut_loras(loras, sequences, len(tokens_T))
        own, prompts = attend.apart()
        rows = slice(sequences, None)
        found = [plain.forward(tokens_T[rows], positions_T[rows], prompts, many).float()]
        if sequences:
            rows = slice(sequences)
            found.insert(0, self._all(tokens_T[rows], positions_T[rows], own, few))
        return torch.cat(found)

    @torch.inference_mode()
    def logits(self, hidden_N: Tensor, loras: LoraRows | None) -> Tensor:
        """Compute logits for scores, float32 `(N, vocab)`; see `Decoder.logits`."""
        if self._of_prompts is not None:
            return self._of_prompts.logits(hidden_N, loras)
        return self.draw_logits(hidden_N, loras)

    @torch.inference_mode()
    def draw_logits(self, hidden_N: Tensor, loras: LoraRows | None) -> Tensor:
        """As `logits`, for draws; the last bits may be others."""
        groups = None if loras is None else self._loras.head_groups(loras).array
        return self._model.kernels.product(self._model.head, hidden_N.float(), groups)

    def _all(
        self, tokens_T: Tensor, positions_T: Tensor, attend: StepAttention, loras: LoraRows | None
    ) -> Tensor:
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
        )
        model.kernels.forward(model.each, step)
        return out

    def _cut_loras(
        self, loras: LoraRows | None, sequences: int, count: int
    ) -> tuple[LoraRows | None, LoraRows | None]:
        """The adapters of rows of sequences, and of prompts; mostly they are those of before."""
        if loras is None:
            return None, None
        if self._cut[0] is not loras or self._cut[1] != sequences:
            few = loras.select(range(sequences)) if sequences else None
            self._cut = loras, sequences, (few, loras.select(range(sequences, count)))
        return self._cut[2]
