"""Scores prompts: the rows of many of them at once, never all logits of any.

Shapes: `P` tokens of a prompt, `V` token ids, `K` asked for at each position, `N` rows, `C` rows of
one chunk.
"""

from collections.abc import Sequence
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

CHUNK_ROWS = 128
"""Maximum rows whose logits are there at once."""
CACHED_ROWS = 16
"""Maximum rows that are worked on at once: those whose probabilities a CPU's cache holds."""


class PromptScorer:
    """Gathers what a request asks about its prompt.

    Args:
        request: It asks for something.
    """

    def __init__(self, request: SampleRequest) -> None:
        self._request = request
        count = len(request.prompt)
        self.asks_logprobs = bool(request.include_prompt_logprobs or request.topk_prompt_logprobs)
        last_n = request.prompt_logprobs_last_n or count
        self._logprobs_from = max(1, count - last_n)
        topk = request.topk_prompt_logprobs
        self._logprobs = np.full(count, np.nan, np.float32)
        self._topk = TopKLogprobs(
            np.zeros((count, topk), np.int64), np.full((count, topk), np.nan, np.float32)
        )
        targets = request.target_prompt_logprobs
        self._targets = None if targets is None else np.zeros(targets.shape, np.float32)
        alt_k = request.prompt_alt_tokens_k
        self._alt = AltTokens(
            np.zeros((count - 1, alt_k), np.int64), np.zeros((count - 1, alt_k), np.float32)
        )
        if alt_k:
            assert request.params.seed is not None
            self._numbers = Draws(request.params.seed, ALT_TOKENS_INDEX).table(count - 1, alt_k)

    @staticmethod
    def wanted(request: SampleRequest) -> bool:
        """Whether a request asks about its prompt."""
        return bool(
            request.include_prompt_logprobs
            or request.topk_prompt_logprobs
            or request.target_prompt_logprobs is not None
            or request.prompt_alt_tokens_k
        )

    @property
    def asks_alt_tokens(self) -> bool:
        """Whether tokens are drawn at its positions."""
        return self._request.prompt_alt_tokens_k > 0

    @property
    def own_temperature(self) -> float:
        """That of alternative tokens where it is not 1, which all else is scored at; else 1."""
        request = self._request
        return request.params.temperature or 1.0 if request.prompt_alt_tokens_k else 1.0

    def take(self, every: Distributions, start_row: int, rows: np.ndarray) -> None:
        """Score positions at temperature 1.

        Args:
            every: Distributions at temperature 1.
            start_row: The first of them that counts.
            rows: int64 `(N,)`: the prompt's positions after which they are, one after the other.
        """
        rows_N = np.arange(start_row, start_row + len(rows))
        positions_N = rows + 1
        if self.asks_logprobs:
            self._take_logprobs(every, rows_N, positions_N)
        if self._targets is not None:
            self._take_targets(every, rows_N, positions_N)

    def take_alt_tokens(self, every: Distributions, start_row: int, rows: np.ndarray) -> None:
        """Draw alternatives; `every` is at the request's temperature, see `take`."""
        alt_k = self._request.prompt_alt_tokens_k
        rows_N = np.arange(start_row, start_row + len(rows))
        rows_M = np.repeat(rows_N, alt_k)
        tokens_M = every.draw(rows_M, self._numbers[rows].reshape(-1))
        if self._request.params.temperature == 0:
            first_N = every.logits_NV[rows_N[0] : rows_N[-1] + 1].argmax(1).cpu().numpy()
            tokens_M = np.repeat(first_N, alt_k)
        logprobs_M = every.logprobs(rows_M, tokens_M)
        self._alt.token_ids[rows] = tokens_M.reshape(-1, alt_k)
        self._alt.logprobs[rows] = logprobs_M.reshape(-1, alt_k)

    def _take_logprobs(
        self, every: Distributions, rows_N: np.ndarray, positions_N: np.ndarray
    ) -> None:
        wanted = positions_N >= self._logprobs_from
        rows_N, positions_N = rows_N[wanted], positions_N[wanted]
        if not len(rows_N):
            return
        self._logprobs[positions_N] = every.logprobs(rows_N, self._request.prompt[positions_N])
        topk = self._request.topk_prompt_logprobs
        if topk:
            ids_NK, logits_NK = best_of_rows(every.logits_NV[rows_N[0] : rows_N[-1] + 1], topk)
            norms_N = np.log(every.totals_N[rows_N])
            self._topk.token_ids[positions_N] = ids_NK
            self._topk.logprobs[positions_N] = (
                logits_NK - every.maxima_N[rows_N, None] - norms_N[:, None]
            )

    def _take_targets(
        self, every: Distributions, rows_N: np.ndarray, positions_N: np.ndarray
    ) -> None:
        assert self._targets is not None
        assert self._request.target_prompt_logprobs is not None
        ids_NK = self._request.target_prompt_logprobs[positions_N - 1]
        rows_M = np.repeat(rows_N, ids_NK.shape[1])
        logprobs_M = every.logprobs(rows_M, ids_NK.clip(min=0).reshape(-1))
        self._targets[positions_N - 1] = np.where(
            ids_NK >= 0, logprobs_M.reshape(ids_NK.shape), 0.0
        )

    def scores(self) -> PromptScores:
        """All that is asked for, once every row was taken."""
        request = self._request
        return PromptScores(
            logprobs=self._logprobs if self.asks_logprobs else None,
            topk=self._topk if request.topk_prompt_logprobs else None,
            targets=self._targets,
            alt_tokens=self._alt if request.prompt_alt_tokens_k else None,
        )


@dataclass(frozen=True)
class ScoredRows:
    """Rows of one forward that a prompt is scored with.

    Attributes:
        scorer: Of which request.
        first: The first row in the forward.
        positions: The prompt's positions of the rows, int64 `(N,)`, one after the other.
    """

    scorer: PromptScorer
    first: int
    positions: np.ndarray


def chunks_of(rows: Sequence[ScoredRows], rows_max: int = CHUNK_ROWS) -> list[list[ScoredRows]]:
    """Cut rows into chunks of at most so many, so that small prompts share one."""
    chunks: list[list[ScoredRows]] = []
    room = 0
    for some in rows:
        done = 0
        while done < len(some.positions):
            if not room:
                chunks.append([])
                room = rows_max
            count = min(room, len(some.positions) - done)
            chunks[-1].append(
                ScoredRows(some.scorer, some.first + done, some.positions[done : done + count])
            )
            done += count
            room -= count
    return chunks


def score(logits_CV: Tensor, chunk: Sequence[ScoredRows], workspace: Workspace) -> None:
    """Give the logits of a chunk's rows to those that asked for them."""
    start = 0
    for few in chunks_of(chunk, CACHED_ROWS):
        count = sum(len(some.positions) for some in few)
        _score(logits_CV[start : start + count], few, workspace)
        start += count


def _score(logits_CV: Tensor, chunk: Sequence[ScoredRows], workspace: Workspace) -> None:
    every = Distributions(logits_CV, [1.0] * len(logits_CV), workspace)
    temperatures: list[float] = []
    for start, some in _starts(chunk):
        some.scorer.take(every, start, some.positions)
        temperatures += [some.scorer.own_temperature] * len(some.positions)
    if any(temperature != 1 for temperature in temperatures):
        every = Distributions(logits_CV, temperatures, workspace)
    for start, some in _starts(chunk):
        if some.scorer.asks_alt_tokens:
            some.scorer.take_alt_tokens(every, start, some.positions)


def _starts(chunk: Sequence[ScoredRows]) -> list[tuple[int, ScoredRows]]:
    """The rows of a chunk, each with the place of its first."""
    found, start = [], 0
    for some in chunk:
        found.append((start, some))
        start += len(some.positions)
    return found


def best_of_rows(logits_NV: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`sampling.best` of each row: ids int64 and values float64, both `(N, count)`."""
    vocab = logits_NV.shape[1]
    values, ids = logits_NV.topk(min(count + 1, vocab), dim=1)
    values_NK, ids_NK = values.cpu().double().numpy(), ids.cpu().numpy()
    order = np.lexsort((ids_NK, -values_NK), axis=-1)[:, :count]
    found_ids, found = (np.take_along_axis(array, order, 1) for array in (ids_NK, values_NK))
    if count < vocab:
        # Where the first that is left out equals the last that is not, `topk` chose any of them.
        for row in np.flatnonzero(values_NK[:, count] == values_NK[:, count - 1]):
            found_ids[row], found[row] = best(logits_NV[int(row)], count)
    return found_ids, found


def rows_index(chunk: Sequence[ScoredRows]) -> list[int]:
    """Rows of the forward that a chunk is made of, in its order."""
    return [row for some in chunk for row in range(some.first, some.first + len(some.positions))]


def gather(hidden_TD: Tensor, index: Sequence[int]) -> Tensor:
    """Rows of hidden states; a view where they stand one after the other."""
    if index[-1] - index[0] + 1 == len(index) and list(index) == list(
        range(index[0], index[-1] + 1)
    ):
        return hidden_TD[index[0] : index[-1] + 1]
    return hidden_TD.index_select(0, torch.tensor(index, device=hidden_TD.device))
