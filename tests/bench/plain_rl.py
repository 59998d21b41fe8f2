"""A loop of reinforcement learning in one process: `generate`, PEFT and torch. See `remote`."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import peft
import torch

from bench.plain_generate import plain_model, sampling
from bench.served import LEARNING_RATE, RANK

PADDING = 0
MICRO_BATCH_ROWS = 8


class PlainRl:
    """A base model with an adapter on all linear layers but the head, and its optimizer.

    Args:
        folder: The model.
        threads: Of torch.
        dtype: Of the base model; PEFT keeps the adapter in float32.
    """

    def __init__(self, folder: str, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        base = plain_model(folder, dtype)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model: Any = peft.get_peft_model(base, config).eval()
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    @torch.inference_mode()
    def rollouts(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, num_samples: int
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """Samples of some prompts in one static batch, padded on the left.

        Returns:
            New tokens of each sequence, and their logprobs, float32 `(new_tokens,)`.
        """
        width = max(map(len, prompts))
        tokens = torch.full((len(prompts), width), PADDING)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        made = self._model.generate(
            input_ids=tokens,
            attention_mask=mask,
            pad_token_id=PADDING,
            **sampling(new_tokens, num_samples),
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = made.sequences[:, width:]
        logprobs = [
            logits.float().log_softmax(-1).gather(1, new[:, index : index + 1])[:, 0]
            for index, logits in enumerate(made.logits)
        ]
        return new.tolist(), list(torch.stack(logprobs, 1).numpy())

    @torch.inference_mode()
    def score(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logprobs of rows of one length under the base model, float32 `(P - 1,)` each."""
        found: list[np.ndarray] = []
        with self._model.disable_adapter():
            for start in range(0, len(rows), MICRO_BATCH_ROWS):
                tokens = torch.tensor(rows[start : start + MICRO_BATCH_ROWS])
                found.extend(self._logprobs(tokens).numpy())
        return found

    def _logprobs(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of `(B, P)` tokens those after the first, `(B, P - 1)`."""
        logits = self._model(tokens[:, :-1], use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        return -losses.view(len(tokens), -1)

    def train(
        self,
        prompts: Sequence[Sequence[int]],
        made: Sequence[Sequence[int]],
        logprobs: Sequence[np.ndarray],
        advantages: Sequence[float],
    ) -> None:
        """One step of importance sampling over some rollouts.

        Args:
            prompts: Of each rollout.
            made: Its new tokens.
            logprobs: Those with which they were drawn.
            advantages: Of each rollout.
        """
        self._model.zero_grad(set_to_none=True)
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        for start in range(0, len(order), MICRO_BATCH_ROWS):
            rows = order[start : start + MICRO_BATCH_ROWS]
            width = max(len(prompts[row]) + len(made[row]) for row in rows)
            tokens = torch.full((len(rows), width), PADDING)
            old, weights = torch.zeros(len(rows), width - 1), torch.zeros(len(rows), width - 1)
            for place, row in enumerate(rows):
                whole = [*prompts[row], *made[row]]
                tokens[place, : len(whole)] = torch.tensor(whole)
                new = slice(len(prompts[row]) - 1, len(whole) - 1)
                old[place, new] = torch.tensor(logprobs[row])
                weights[place, new] = advantages[row]
            (-(self._logprobs(tokens) - old).exp() * weights).sum().backward()
        self._optimizer.step()
