"""The other side of the sampling rows: transformers alone, as its manual says. See `remote`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from tinsmithd.modeling.base import DTYPES

NO_PADDING = 0
"""Given so that nothing is said of it: prompts of one call have one length."""


def plain_model(folder: str, dtype: str) -> Any:
    """A model whose sequences end by nothing but their length."""
    transformers_logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    model.generation_config.eos_token_id = None
    return model


def sampling(new_tokens: int, num_samples: int) -> Mapping[str, Any]:
    """Arguments of `generate` that draw from the whole distribution, at temperature 1."""
    return {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": new_tokens,
        "num_return_sequences": num_samples,
    }


class Plain:
    """One base model in each element type that is asked for.

    Args:
        folder: The model.
        threads: Of torch.
    """

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._folder = folder
        self._models: dict[str, Any] = {}

    def load(self, dtype: str) -> None:
        """Have a model; the other methods do it by themselves."""
        self._model(dtype)

    def _model(self, dtype: str) -> Any:
        if dtype not in self._models:
            self._models[dtype] = plain_model(self._folder, dtype).eval()
        return self._models[dtype]

    @torch.inference_mode()
    def generate(
        self, dtype: str, prompts: Sequence[Sequence[int]], new_tokens: int, num_samples: int = 1
    ) -> list[list[int]]:
        """Sample continuations of prompts of one length, in one static batch; returns them."""
        tokens = torch.tensor(prompts)
        made = self._model(dtype).generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            pad_token_id=NO_PADDING,
            **sampling(new_tokens, num_samples),
        )[:, tokens.shape[1] :]
        assert made.shape == (len(prompts) * num_samples, new_tokens)
        found: list[list[int]] = made.tolist()
        return found

    @torch.inference_mode()
    def forward(self, dtype: str, rows: Sequence[Sequence[int]]) -> None:
        """One bare forward over rows of one length; the logits are made and dropped."""
        self._model(dtype)(torch.tensor(rows), use_cache=False)

    @torch.inference_mode()
    def logprobs(self, dtype: str, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Of each row the logprobs of its tokens but the first, float32 `(P - 1,)`."""
        found = []
        for row in rows:
            tokens = torch.tensor(row)
            logits = self._model(dtype)(tokens[None], use_cache=False).logits[0, :-1].float()
            found.append(logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0].numpy())
        return found
