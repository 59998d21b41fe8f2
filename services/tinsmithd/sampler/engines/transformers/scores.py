"""What a prompt is scored with, from the logits after its tokens, a piece at a time.

Each number depends on the logits of its row and on the request alone. Shapes: P tokens of the
prompt, N rows of logits, V token ids, K targets and k alternatives of a position.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmithd.domain import AltTokens, PromptScores, SampleRequest, TopKLogprobs
from tinsmithd.sampler.engines.transformers.sampling import (
    ALT_TOKENS_INDEX,
    Distributions,
    Draws,
    Workspace,
    best,
)

DRAWN_AT_ONCE = 2048
"""Drawing takes the memory of a row of blocks and of a block's tokens for each of them."""


class PromptScorer:
    """Collects the scores of one prompt; its rows come once each and in order.

    Args:
        request: Checked, with its seed.
        workspace: Memory to work in, which is free between two calls of `add`.
    """

    def __init__(self, request: SampleRequest, workspace: Workspace) -> None:
        count = len(request.prompt)
        self._request = request
        self._workspace = workspace
        self._next = request.logits_from
        self._listed_from = count - min(count - 1, request.prompt_logprobs_last_n or count)
        """The first position that has a logprob and likeliest tokens."""
        self._logprobs: np.ndarray | None = None
        self._topk: TopKLogprobs | None = None
        self._targets: np.ndarray | None = None
        self._alternatives: _Alternatives | None = None
        if request.include_prompt_logprobs or request.topk_prompt_logprobs:
            self._logprobs = np.full(count, np.nan, np.float32)
        if topk := request.topk_prompt_logprobs:
            self._topk = TopKLogprobs(
                np.zeros((count, topk), np.int64), np.full((count, topk), np.nan, np.float32)
            )
        if request.target_prompt_logprobs is not None:
            self._targets = np.zeros(request.target_prompt_logprobs.shape, np.float32)
        if request.prompt_alt_tokens_k:
            self._alternatives = _Alternatives.of(request)

    @property
    def next_row(self) -> int:
        """The token whose logits are wanted next; at P - 1 there is nothing more to score."""
        return self._next

    def add(self, logits_NV: Tensor) -> None:
        """Take the logits after the next N of the prompt's tokens, at most up to token P - 2.

        Args:
            logits_NV: float32.
        """
        start = self._next
        self._next += len(logits_NV)
        positions_N = np.arange(start, self._next) + 1
        listed = positions_N >= self._listed_from if self._logprobs is not None else None
        if self._targets is not None or listed is not None:
            every = Distributions(logits_NV, [1.0] * len(logits_NV), self._workspace)
            if listed is not None and listed.any():
                self._add_listed(every, positions_N, np.flatnonzero(listed))
            if self._targets is not None:
                self._add_targets(every, start)
        if self._alternatives is not None:
            self._alternatives.add(logits_NV, start, self._workspace)

    def _add_listed(self, every: Distributions, positions_N: np.ndarray, rows: np.ndarray) -> None:
        """The logprobs of the prompt's tokens, and the likeliest ones."""
        assert self._logprobs is not None
        positions = positions_N[rows]
        self._logprobs[positions] = every.logprobs(rows, self._request.prompt[positions])
        if self._topk is None:
            return
        for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
            ids, values = best(every.logits_NV[row], self._topk.token_ids.shape[1])
            scores = every.scaled(np.full(len(ids), row), values)
            self._topk.token_ids[position] = ids
            self._topk.logprobs[position] = scores - np.log(every.totals_N[row])

    def _add_targets(self, every: Distributions, start: int) -> None:
        asked, targets = self._request.target_prompt_logprobs, self._targets
        assert asked is not None
        assert targets is not None
        here = slice(start, start + len(every.logits_NV))
        rows, columns = np.nonzero(asked[here] >= 0)
        targets[here][rows, columns] = every.logprobs(rows, asked[here][rows, columns])

    def result(self) -> PromptScores:
        """All of it, once every row was added."""
        assert self._next >= len(self._request.prompt) - 1
        drawn = self._alternatives
        return PromptScores(
            self._logprobs, self._topk, self._targets, None if drawn is None else drawn.tokens
        )


@dataclass
class _Alternatives:
    """Tokens drawn at positions of a prompt, at the request's temperature from all tokens.

    Attributes:
        temperature: 0 takes the most likely token, the first of equals.
        draws: Random numbers, k for each position in order.
        tokens: What was drawn.
    """

    temperature: float
    draws: Draws
    tokens: AltTokens

    @classmethod
    def of(cls, request: SampleRequest) -> "_Alternatives":
        assert request.params.seed is not None  # the servicer draws one
        shape = len(request.prompt) - 1, request.prompt_alt_tokens_k
        return cls(
            request.params.temperature,
            Draws(request.params.seed, ALT_TOKENS_INDEX),
            AltTokens(np.zeros(shape, np.int64), np.zeros(shape, np.float32)),
        )

    def add(self, logits_NV: Tensor, start: int, workspace: Workspace) -> None:
        """Draw at the next N positions; row `start` of `tokens` is for the first of them."""
        count, k = len(logits_NV), self.tokens.token_ids.shape[1]
        every = Distributions(logits_NV, [self.temperature] * count, workspace)
        rows_M = np.repeat(np.arange(count), k)
        if self.temperature == 0:
            likeliest_N: np.ndarray = torch.argmax(logits_NV, 1).cpu().numpy()
            tokens_M = np.repeat(likeliest_N, k)
        else:
            numbers_M = self.draws.table(count, k).ravel()
            parts = range(0, len(rows_M), DRAWN_AT_ONCE)
            tokens_M = np.concatenate(
                [
                    every.draw(rows_M[i : i + DRAWN_AT_ONCE], numbers_M[i : i + DRAWN_AT_ONCE])
                    for i in parts
                ]
            )
        here = slice(start, start + count)
        self.tokens.token_ids[here] = tokens_M.reshape(count, k)
        self.tokens.logprobs[here] = every.logprobs(rows_M, tokens_M).reshape(count, k)
