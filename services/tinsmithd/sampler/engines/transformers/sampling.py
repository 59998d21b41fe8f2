"""Draws tokens from logits, a batch at once: exact to 1e-6, repeatable, and each row for itself.

Probabilities are made in float32 relative to the row's largest logit, summed in blocks, and added
up in float64; a draw looks its number up among the blocks and then within one. What a row gives
depends on its logits and its random number alone, not on the rows beside it.

Shapes: `N` rows of logits, `V` token ids, `M` draws, `B` blocks of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmithd.domain import SamplingParams

BLOCK_TOKENS = 128
"""Tokens of one block: 151,936 and 49,152 ids are whole numbers of them."""
CANDIDATES = 1024
"""Likeliest tokens that are tried first where only `top_p` cuts: sorting all takes far longer."""
INVERSE_TEMPERATURE_RANGE = (1e-30, 1e38)
"""What float32 can multiply with: beyond it draws are uniform, or take the most likely."""
ALT_TOKENS_INDEX = (1 << 64) - 1
"""Takes the place of a sequence's index where tokens are drawn at positions of a prompt."""


class Draws:
    """The random numbers of one sequence: counter-based, keyed by seed and sequence index."""

    def __init__(self, seed: int, sequence_index: int) -> None:
        key = [seed % (1 << 64), sequence_index]
        self._generator = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))

    def next(self) -> float:
        """The next number, uniform in [0, 1)."""
        return float(self._generator.random())

    def table(self, rows: int, columns: int) -> np.ndarray:
        """The next numbers, float64 `(rows, columns)`."""
        return self._generator.random((rows, columns))


class Workspace:
    """Memory for `Distributions`, used again and again: new memory costs more than the numbers."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """float32 `(rows, columns)` of any content; what was taken before is not valid any more."""
        if self._memory.numel() < rows * columns or self._memory.device != device:
            self._memory = torch.empty(rows * columns, device=device)
        return self._memory[: rows * columns].view(rows, columns)


class Distributions:
    """softmax(logits / temperature) of each row.

    Args:
        logits_NV: float32.
        temperatures: N of them; 0 stands for 1.
        workspace: Its memory is in use as long as this is.

    Attributes:
        finite_N: False for rows that are no distribution: a logit is NaN or +inf, or all are -inf.
    """

    def __init__(
        self, logits_NV: Tensor, temperatures: Sequence[float], workspace: Workspace
    ) -> None:
        self.logits_NV = logits_NV
        count, vocab = logits_NV.shape
        blocks = -(-vocab // BLOCK_TOKENS)
        maxima_N1 = logits_NV.amax(1, keepdim=True)
        weights_NV = workspace.take(count, blocks * BLOCK_TOKENS, logits_NV.device)
        weights_NV[:, vocab:] = -torch.inf
        torch.sub(logits_NV, maxima_N1, out=weights_NV[:, :vocab])
        self.temperatures_N = np.array([each or 1.0 for each in temperatures], np.float64)
        if (self.temperatures_N != 1).any():
            with np.errstate(over="ignore"):
                inverse_N = (1 / self.temperatures_N).clip(*INVERSE_TEMPERATURE_RANGE)
            weights_NV *= torch.from_numpy(inverse_N.astype(np.float32)[:, None]).to(
                logits_NV.device
            )
        weights_NV.exp_()
        self._weights_NBW = weights_NV.view(count, blocks, BLOCK_TOKENS)
        self.maxima_N = _doubles(maxima_N1[:, 0])
        self._cumulative_NB = _doubles(self._weights_NBW.sum(-1)).cumsum(1)
        self.totals_N = self._cumulative_NB[:, -1]
        self.finite_N = np.isfinite(self.totals_N) & (self.totals_N > 0)

    def draw(self, rows_M: np.ndarray, numbers_M: np.ndarray) -> np.ndarray:
        """Tokens int64 `(M,)` of rows that are finite, by numbers in [0, 1)."""
        cumulative_MB = self._cumulative_NB[rows_M]
        wanted_M = numbers_M * cumulative_MB[:, -1]
        blocks_M = _place(cumulative_MB, wanted_M)
        index = torch.from_numpy(rows_M), torch.from_numpy(blocks_M)
        within_MW = _doubles(self._weights_NBW[index]).cumsum(1)
        every = np.arange(len(rows_M))
        end_M = cumulative_MB[every, blocks_M]
        start_M = np.where(blocks_M > 0, cumulative_MB[every, blocks_M - 1], 0.0)
        # The block's sum was rounded to float32: its tokens share it in proportion.
        share_M = ((wanted_M - start_M) / (end_M - start_M)).clip(0, 1)
        places_M = _place(within_MW, share_M * within_MW[:, -1])
        tokens_M: np.ndarray = blocks_M * BLOCK_TOKENS + places_M
        return tokens_M

    def logprobs(self, rows_M: np.ndarray, tokens_M: np.ndarray) -> np.ndarray:
        """Logprobs float64 `(M,)` of tokens."""
        index = torch.from_numpy(rows_M), torch.from_numpy(tokens_M)
        scaled_M = self.scaled(rows_M, _doubles(self.logits_NV[index]))
        logprobs_M: np.ndarray = scaled_M - np.log(self.totals_N[rows_M])
        return logprobs_M

    def scaled(self, rows_M: np.ndarray, logits_M: np.ndarray) -> np.ndarray:
        """Logarithms of unnormalised probabilities, as `totals_N` are, of logits."""
        with np.errstate(over="ignore"):
            scaled: np.ndarray = (logits_M - self.maxima_N[rows_M]) / self.temperatures_N[rows_M]
        return scaled


@dataclass(frozen=True)
class Ask:
    """One draw that somebody wants.

    Attributes:
        row: Which logits.
        params: Temperature, top_k and top_p take effect in this order; temperature 0 takes the most
            likely token, the first of equals.
        number: Uniform in [0, 1); not used at temperature 0.
        topk: How many of the likeliest tokens to return with it.
    """

    row: int
    params: SamplingParams
    number: float
    topk: int = 0


@dataclass(frozen=True)
class Drawn:
    """A token.

    Attributes:
        token: Its id.
        logprob: In the distribution drawn from; at temperature 0 that at temperature 1.
        topk_ids, topk_logprobs: `(topk,)` of the same distribution, int64 and float32, best first,
            the smaller id of equals. Where fewer can be drawn the rest is 0 and NaN.
    """

    token: int
    logprob: float
    topk_ids: np.ndarray | None = None
    topk_logprobs: np.ndarray | None = None


def draw(logits_NV: Tensor, asks: Sequence[Ask], workspace: Workspace) -> list[Drawn | None]:
    """Draw a token for each ask; None where the logits are no distribution.

    Args:
        logits_NV: float32; the asks of one row have one temperature.
        asks: What to draw.
        workspace: Memory to work in.
    """
    temperatures = [1.0] * len(logits_NV)
    for ask in asks:
        temperatures[ask.row] = ask.params.temperature
    every = Distributions(logits_NV, temperatures, workspace)
    found: list[Drawn | None] = [None] * len(asks)
    plain: list[int] = []
    for index, ask in enumerate(asks):
        if not every.finite_N[ask.row]:
            continue
        if _cuts(ask.params, logits_NV.shape[1]) or ask.topk:
            found[index] = _draw_cut(every, ask)
        else:
            plain.append(index)
    if plain:
        rows_M = np.array([asks[i].row for i in plain])
        tokens_M = every.draw(rows_M, np.array([asks[i].number for i in plain]))
        for place, index in enumerate(plain):
            if asks[index].params.temperature == 0:
                tokens_M[place] = int(logits_NV[asks[index].row].argmax())  # the first of equals
        logprobs_M = every.logprobs(rows_M, tokens_M)
        for index, token, logprob in zip(
            plain, tokens_M.tolist(), logprobs_M.tolist(), strict=True
        ):
            found[index] = Drawn(token, logprob)
    return found


def best(logits_V: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest logits: ids int64 and values float64, best first, then by id."""
    count = min(count, len(logits_V))
    values, ids = logits_V.topk(count)
    least = values[-1]
    above = values > least
    # Of those that equal the least, `topk` gives any.
    missing = count - int(above.sum())
    equal = (logits_V == least).nonzero()[:missing, 0]
    ids_K = torch.cat([ids[above], equal]).cpu().numpy()
    values_K = _doubles(torch.cat([values[above], least.expand(missing)]))
    order = np.lexsort((ids_K, -values_K))
    return ids_K[order], values_K[order]


def _cuts(params: SamplingParams, vocab: int) -> bool:
    """Whether some tokens cannot be drawn."""
    return params.temperature > 0 and (0 < params.top_k < vocab or params.top_p < 1)


def _draw_cut(every: Distributions, ask: Ask) -> Drawn:
    """Draw where the likeliest tokens have to be in order."""
    params, row = ask.params, ask.row
    logits_V = every.logits_NV[row]
    vocab = len(logits_V)
    cut = _cuts(params, vocab)
    top_k = params.top_k if cut and 0 < params.top_k < vocab else vocab
    ids_K, scores_K, total = _kept(every, row, top_k, params.top_p if cut else 1.0, ask.topk)
    if params.temperature == 0:
        place = 0
        token, score = int(ids_K[0]), float(scores_K[0])
    elif cut:
        cumulative_K = np.exp(scores_K).cumsum()
        place = int(_place(cumulative_K[None], np.array([ask.number * cumulative_K[-1]]))[0])
        token, score = int(ids_K[place]), float(scores_K[place])
    else:
        rows_M = np.array([row])
        tokens_M = every.draw(rows_M, np.array([ask.number]))
        return _with_topk(
            int(tokens_M[0]),
            float(every.logprobs(rows_M, tokens_M)[0]),
            ids_K,
            scores_K,
            total,
            ask,
        )
    return _with_topk(token, score - float(np.log(total)), ids_K, scores_K, total, ask)


def _kept(
    every: Distributions, row: int, top_k: int, top_p: float, topk: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """The tokens that can be drawn, best first, or at least the first `topk` of them.

    Returns:
        Ids, scores (`Distributions.scaled`), and the sum of exp(score) of all that can be drawn.
    """
    logits_V = every.logits_NV[row]
    vocab = len(logits_V)
    count = top_k if top_k < vocab else max(topk, CANDIDATES if top_p < 1 else 1)
    while True:
        ids_K, values_K = best(logits_V, count)
        scores_K = every.scaled(np.array([row]), values_K)
        cumulative_K = np.exp(scores_K).cumsum()
        total = float(cumulative_K[-1]) if top_k < vocab else float(every.totals_N[row])
        if top_p >= 1:
            return ids_K, scores_K, total
        reached_K = cumulative_K >= top_p * total
        if reached_K.any():
            enough = int(reached_K.argmax()) + 1
            return ids_K[:enough], scores_K[:enough], float(cumulative_K[enough - 1])
        if len(ids_K) == min(top_k, vocab):  # rounding kept the sum just below
            return ids_K, scores_K, float(cumulative_K[-1])
        count = vocab


def _with_topk(
    token: int, logprob: float, ids_K: np.ndarray, scores_K: np.ndarray, total: float, ask: Ask
) -> Drawn:
    if not ask.topk:
        return Drawn(token, logprob)
    ids = np.zeros(ask.topk, np.int64)
    logprobs = np.full(ask.topk, np.nan, np.float32)
    possible = scores_K[: ask.topk] > -np.inf
    count = int(possible.sum())
    ids[:count] = ids_K[:count]
    logprobs[:count] = scores_K[:count] - np.log(total)
    return Drawn(token, logprob, ids, logprobs)


def _place(cumulative_MC: np.ndarray, wanted_M: np.ndarray) -> np.ndarray:
    """The first place of each row whose cumulative sum is above what is wanted.

    Rounding must not choose what has no probability: where none is above, it is the first place
    with which the sum is whole.
    """
    below_MC = cumulative_MC <= wanted_M[:, None]
    whole_MC = cumulative_MC >= cumulative_MC[:, -1:]
    places_M: np.ndarray = np.minimum(below_MC.sum(1), whole_MC.argmax(1))
    return places_M


def _doubles(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().double().numpy()
    return array
