"""What vLLM gives, in our words.

It gives logprobs as flat lists with a range for each position: first the token that is there, then
the most likely ones. Where it put several outputs together a token stands there only once.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tinsmithd.domain import PromptScores, SampleRequest, TopKLogprobs


def prompt_scores(flat: Any, request: SampleRequest) -> PromptScores:
    """The scores of a prompt of P tokens.

    Args:
        flat: vLLM's logprobs of all P positions, of which the first is empty; None where P is 1.
        request: The request; its `prompt_logprobs_last_n` leaves positions empty.
    """
    count, k = len(request.prompt), request.topk_prompt_logprobs
    logprobs = np.full(count, np.nan, np.float32)
    topk = _empty(count, k)
    asked = request.prompt_logprobs_last_n or count - 1
    for position in range(max(1, count - asked), count):
        tokens, values = _position(flat, position)
        logprobs[position] = values[0]
        _fill(topk, position, tokens, values)
    return PromptScores(logprobs=logprobs, topk=topk if k else None)


def sampled_logprobs(flat: Any, count: int, k: int) -> tuple[list[float], TopKLogprobs | None]:
    """Logprobs of some sampled tokens, and the most likely ones beside each.

    Args:
        flat: vLLM's logprobs of at least `count` positions.
        count: How many tokens.
        k: How many most likely ones; 0 for none.
    """
    logprobs = []
    topk = _empty(count, k)
    for position in range(count):
        tokens, values = _position(flat, position)
        logprobs.append(values[0])
        _fill(topk, position, tokens, values)
    return logprobs, topk if k else None


def _empty(count: int, k: int) -> TopKLogprobs:
    return TopKLogprobs(np.zeros((count, k), np.int64), np.full((count, k), np.nan, np.float32))


def _position(flat: Any, position: int) -> tuple[list[int], list[float]]:
    here = slice(flat.start_indices[position], flat.end_indices[position])
    return flat.token_ids[here], flat.logprobs[here]


def _fill(topk: TopKLogprobs, row: int, tokens: list[int], values: list[float]) -> None:
    for column, (token, value) in enumerate(_best(tokens, values, topk.token_ids.shape[1])):
        topk.token_ids[row, column] = token
        topk.logprobs[row, column] = value


def _best(tokens: list[int], values: list[float], k: int) -> Iterator[tuple[int, float]]:
    """The k most likely of some tokens, the smaller id of equals; none of no probability."""
    if k:
        found = dict(zip(tokens, values, strict=True))
        ordered = sorted(found.items(), key=lambda each: (-each[1], each[0]))
        yield from ((token, value) for token, value in ordered[:k] if value > -np.inf)
