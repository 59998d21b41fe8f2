"""What the sampling rows ask for, whoever answers: the Sampler, `generate` or vLLM.

It needs numpy alone, so that programs with an environment of their own can import it. Tokens are
random and never stop a sequence (no stop condition is given), at temperature 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOKENS = range(100, 49_000)
"""Ids of SmolLM2's vocabulary that are words, not commands."""
PROMPT_TOKENS = 64
LONG_PROMPT_TOKENS = 1024
NEW_TOKENS = 64
GROUP = 16
MIXED_CALLS = 32
MIXED_NEW_TOKENS = (8, 256)
CHAT_SYSTEM_TOKENS, CHAT_USER_TOKENS, CHAT_ANSWER_TOKENS, CHAT_TURNS = 260, 70, 60, 8
RL_GROUPS, RL_GROUP_SIZE, RL_PROMPT_TOKENS = 16, 8, 96


@dataclass(frozen=True)
class Call:
    """One call of `sample`.

    Attributes:
        prompt: Token ids.
        new_tokens: Of each sequence, exactly.
        num_samples: Sequences.
        seed: Of the draws, where the engine takes one.
    """

    prompt: Sequence[int]
    new_tokens: int = NEW_TOKENS
    num_samples: int = 1
    seed: int = 0


def random_tokens(count: int, seed: int) -> list[int]:
    """So many ids of `TOKENS`."""
    return np.random.default_rng(seed).integers(TOKENS.start, TOKENS.stop, count).tolist()


def made_tokens(calls: Sequence[Call]) -> int:
    """Tokens that some calls make."""
    return sum(call.num_samples * call.new_tokens for call in calls)


def equal(count: int, *, new_tokens: int = NEW_TOKENS, seed: int = 0) -> list[Call]:
    """Row 17: prompts of 64 tokens, all different, as many new tokens each.

    Args:
        count: How many calls.
        new_tokens: Of each.
        seed: Two seeds share no prompt, so that no cache of prompts helps from one to the other.
    """
    return [
        Call(random_tokens(PROMPT_TOKENS, seed * 10_000 + index), new_tokens, seed=index)
        for index in range(count)
    ]


def mixed(seed: int = 0) -> list[Call]:
    """Row 18: 32 prompts of 64 tokens, 8 to 256 new ones in steps of 8, in no order."""
    lengths = np.linspace(*MIXED_NEW_TOKENS, MIXED_CALLS).round().astype(int)
    np.random.default_rng(1).shuffle(lengths)
    calls = equal(MIXED_CALLS, seed=seed)
    return [
        Call(call.prompt, int(length), seed=call.seed)
        for call, length in zip(calls, lengths, strict=True)
    ]


def group(seed: int = 0) -> list[Call]:
    """Row 19: one call, 16 samples of a prompt of 1,024 tokens."""
    return [Call(random_tokens(LONG_PROMPT_TOKENS, 77_000 + seed), NEW_TOKENS, GROUP)]


def chat(seed: int = 0) -> list[Call]:
    """Row 22: the turns of one chat, each prompt the last one, an answer and what a user says.

    The answers are given, since what is made differs from engine to engine.
    """
    history = random_tokens(CHAT_SYSTEM_TOKENS, 88_000 + 100 * seed)
    calls = []
    for turn in range(CHAT_TURNS):
        history = history + random_tokens(CHAT_USER_TOKENS, 88_001 + 100 * seed + 2 * turn)
        calls.append(Call(history, CHAT_ANSWER_TOKENS, seed=turn))
        history = history + random_tokens(CHAT_ANSWER_TOKENS, 88_002 + 100 * seed + 2 * turn)
    return calls


def rollouts(seed: int = 0) -> list[Call]:
    """Row 30: a step of RL as recipes make it, one call per rollout; those of a group together."""
    return [
        Call(random_tokens(RL_PROMPT_TOKENS, 99_000 + 100 * seed + group), seed=index)
        for group in range(RL_GROUPS)
        for index in range(RL_GROUP_SIZE)
    ]
