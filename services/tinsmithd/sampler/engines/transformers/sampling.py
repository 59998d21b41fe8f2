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

    def weigh(self, logits_NV: Tensor, inverse_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Unnormalised probabilities of rows.

        Args:
            logits_NV: float32.
            inverse_N: 1 / temperature, float32 on a CPU; None: all are 1.

        Returns:
            e^((logit - largest) / temperature), `(N, B, BLOCK_TOKENS)`, in memory that was taken,
            zeros behind the last token; the largest logits `(N,)`; the sums of blocks `(N, B)`.
        """
        count, vocab = logits_NV.shape
        blocks = -(-vocab // BLOCK_TOKENS)
        maxima_N1 = logits_NV.amax(1, keepdim=True)
        weights_NV = self.take(count, blocks * BLOCK_TOKENS, logits_NV.device)
        weights_NV[:, vocab:] = -torch.inf
        torch.sub(logits_NV, maxima_N1, out=weights_NV[:, :vocab])
        if inverse_N is not None:
            weights_NV *= inverse_N[:, None].to(logits_NV.device)
        weights_NBW = weights_NV.exp_().view(count, blocks, BLOCK_TOKENS)
        return weights_NBW, maxima_N1[:, 0], weights_NBW.sum(-1)


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
        self.temperatures_N = np.array([each or 1.0 for each in temperatures], np.float64)
        inverse_N: Tensor | None = None
        if (self.temperatures_N != 1).any():
            with np.errstate(over="ignore"):
                inverses = (1 / self.temperatures_N).clip(*INVERSE_TEMPERATURE_RANGE)
            inverse_N = torch.from_numpy(inverses.astype(np.float32))
        self._weights_NBW, maxima_N, sums_NB = workspace.weigh(logits_NV, inverse_N)
        self.maxima_N = _doubles(maxima_N)
        self._cumulative_NB = _doubles(sums_NB).cumsum(1)
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

    def weights(self, row: int) -> np.ndarray:
        """exp(scaled) of a row's tokens, float32 `(V,)`."""
        weights: np.ndarray = self._weights_NBW[row].view(-1).cpu().numpy()
        return weights[: self.logits_NV.shape[1]]

    def log_total(self, row: int) -> float:
        """The logarithm of the sum of a row's weights."""
        return float(np.log(self.totals_N[row]))

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
    """Draw where not all tokens are possible, or the likeliest are to be returned as well."""
    params, row = ask.params, ask.row
    logits_V = every.logits_NV[row]
    if not _cuts(params, len(logits_V)):
        rows_M = np.array([row])
        if params.temperature == 0:
            tokens_M = best(logits_V, 1)[0]
        else:
            tokens_M = every.draw(rows_M, np.array([ask.number]))
        ids_K, values_K = best(logits_V, ask.topk)
        scores_K = every.scaled(rows_M, values_K)
        token, logprob = int(tokens_M[0]), float(every.logprobs(rows_M, tokens_M)[0])
        return _with_topk(Drawn(token, logprob), ids_K, scores_K - every.log_total(row), ask.topk)
    if 0 < params.top_k < len(logits_V):
        ids_K, scores_K = _first_k(every, row, params.top_k, params.top_p)
    else:
        ids_K, scores_K = _nucleus(every, row, params.top_p)
    cumulative_K = np.exp(scores_K).cumsum()
    place = int(_place(cumulative_K[None], np.array([ask.number * cumulative_K[-1]]))[0])
    logprobs_K = scores_K - np.log(cumulative_K[-1])
    drawn = Drawn(int(ids_K[place]), float(logprobs_K[place]))
    if not ask.topk:
        return drawn
    order = np.lexsort((ids_K, -logprobs_K))[: ask.topk]
    return _with_topk(drawn, ids_K[order], logprobs_K[order], ask.topk)


def _first_k(
    every: Distributions, row: int, top_k: int, top_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and scores (`Distributions.scaled`) of what `top_k` and then `top_p` leave."""
    ids_K, values_K = best(every.logits_NV[row], top_k)
    scores_K = every.scaled(np.array([row]), values_K)
    cumulative_K = np.exp(scores_K).cumsum()
    count = _enough(cumulative_K, top_p * cumulative_K[-1]) if top_p < 1 else len(ids_K)
    return ids_K[:count], scores_K[:count]


def _nucleus(every: Distributions, row: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Ids in ascending order and scores of the fewest likeliest tokens that reach `top_p`.

    Nothing is sorted but the tokens about as likely as the last of them: the first 16 bits of a
    positive float32 order it among others to one part in 128, so the mass of all tokens is counted
    by those.
    """
    weights_V, logits_V = every.weights(row), every.logits_NV[row].cpu().numpy()
    keys_V = weights_V.view(np.int32) >> 16
    from_top = np.bincount(keys_V, weights_V)[::-1].cumsum()
    wanted = top_p * from_top[-1]
    place = min(int(np.searchsorted(from_top, wanted)), len(from_top) - 1)
    last = len(from_top) - 1 - place
    (among,) = np.nonzero(keys_V == last)
    order = among[np.lexsort((among, -logits_V[among]))]
    above = from_top[place - 1] if place else 0.0
    count = _enough(weights_V[order].astype(np.float64).cumsum(), wanted - above)
    ids_K = np.sort(np.concatenate([np.nonzero(keys_V > last)[0], order[:count]]))
    scores_K = every.scaled(np.full(1, row), logits_V[ids_K].astype(np.float64))
    return ids_K, scores_K


def _enough(cumulative: np.ndarray, wanted: float) -> int:
    """How many of the first it takes to reach what is wanted; all where rounding is in the way."""
    return min(int(np.searchsorted(cumulative, wanted)) + 1, len(cumulative))


def _with_topk(drawn: Drawn, ids_K: np.ndarray, logprobs_K: np.ndarray, topk: int) -> Drawn:
    """Add the likeliest tokens, best first; those that are impossible are left out."""
    ids = np.zeros(topk, np.int64)
    logprobs = np.full(topk, np.nan, np.float32)
    count = int((logprobs_K > -np.inf).sum())
    ids[:count] = ids_K[:count]
    logprobs[:count] = logprobs_K[:count]
    return Drawn(drawn.token, drawn.logprob, ids, logprobs)


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
