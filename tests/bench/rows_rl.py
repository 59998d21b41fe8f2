"""Row 30: whole steps of reinforcement learning, beside one process with `generate` and PEFT."""

import importlib.util
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import sampling_workloads as workloads
from bench.harness import Result, Side, measure, middle, ratio
from bench.remote import Remote
from bench.rows_sampling import DTYPES, cut
from bench.sampling_workloads import Call
from bench.served import LEARNING_RATE, WAIT_S_MAX, Served, sample
from bench.sides import Settings
from tinsmith import types

TARGET = 0.5
EXAMPLE = Path(__file__).parents[2] / "client" / "examples" / "rl_loop.py"
EXAMPLE_GROUP_SIZE, EXAMPLE_NEW_TOKENS = 8, 12
"""The defaults of its flags."""
PROBE_GROUPS = 2
OUR_DTYPE = "float32"
"""What `tinsmith up` takes by itself."""


@dataclass(frozen=True)
class Work:
    """One step.

    Attributes:
        calls: Rollouts as our side asks for them; those of a group follow each other.
        group_size: Rollouts of each prompt.
        reward: Of a rollout's new tokens.
        scored: The base model scores the rollouts, too, as for a penalty on their divergence.
    """

    calls: Sequence[Call]
    group_size: int
    reward: Callable[[Sequence[int]], float]
    scored: bool

    @property
    def prompts(self) -> list[Sequence[int]]:
        """One of each group."""
        return [prompt for prompt, _ in itertools.groupby(call.prompt for call in self.calls)]

    def advantages(self, made: Sequence[Sequence[int]]) -> list[float]:
        """Of each rollout its reward less the mean of its group."""
        rewards = np.array([self.reward(tokens) for tokens in made]).reshape(-1, self.group_size)
        found: list[float] = (rewards - rewards.mean(1, keepdims=True)).flatten().tolist()
        return found


class Parts:
    """Seconds of the parts of a side, over all its steps."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def timed(self, name: str, do: Callable[[], Any]) -> Any:
        """Do something and count its time to a part."""
        start_s = time.perf_counter()
        done = do()
        self._seconds[name].append(time.perf_counter() - start_s)
        return done

    def __str__(self) -> str:
        """Medians, and shares of their sum."""
        medians = {name: float(np.median(found)) for name, found in self._seconds.items()}
        whole = sum(medians.values())
        return ", ".join(f"{n} {s:.2f} s ({s / whole:.0%})" for n, s in medians.items())


class Ours:
    """The loop as a user writes it.

    Args:
        served: The cluster.
        make_datum: Of the example: prompt, sequence and advantage into a datum.
    """

    def __init__(self, served: Served, make_datum: Callable[..., types.Datum]) -> None:
        self._trainer = served.trainer(1)
        self._base = served.base()
        self._make_datum = make_datum
        self.cpu_clock = served.cpu_clock

    def step(self, work: Work, parts: Parts) -> None:
        """Save, sample, score and train."""
        save = self._trainer.save_weights_and_get_sampling_client
        sampler = parts.timed("save", lambda: save().result(WAIT_S_MAX))
        answers = parts.timed("rollouts", lambda: sample(sampler, work.calls))
        rollouts = [
            (list(call.prompt), sequence)
            for call, answer in zip(work.calls, answers, strict=True)
            for sequence in answer.sequences
        ]
        if work.scored:
            parts.timed("scoring", lambda: self._score(rollouts))
        advantages = work.advantages([sequence.tokens for _, sequence in rollouts])
        data = [
            self._make_datum(prompt, sequence, advantage)
            for (prompt, sequence), advantage in zip(rollouts, advantages, strict=True)
        ]
        parts.timed("training", lambda: self._train(data))

    def _score(self, rollouts: Sequence[tuple[list[int], types.SampledSequence]]) -> None:
        futures = [
            self._base.compute_logprobs(types.ModelInput.from_ints(prompt + sequence.tokens))
            for prompt, sequence in rollouts
        ]
        for future in futures:
            future.result(WAIT_S_MAX)

    def _train(self, data: Sequence[types.Datum]) -> None:
        added = self._trainer.forward_backward(list(data), "importance_sampling")
        adam = types.AdamParams(learning_rate=LEARNING_RATE)
        self._trainer.optim_step(adam).result(WAIT_S_MAX)
        added.result(WAIT_S_MAX)


class Plain:
    """The same in one process.

    Args:
        settings: Of the run.
        dtype: Of the base model.
    """

    def __init__(self, settings: Settings, dtype: str) -> None:
        arguments = (str(settings.base_model), settings.threads, dtype)
        self.remote = Remote("bench.plain_rl:PlainRl", *arguments)
        self.dtype = dtype

    @classmethod
    def quicker(cls, settings: Settings, work: Work) -> "Plain":
        """In the element type in which it is quicker, found with few groups; it is warm."""
        per_prompt = len(work.calls) // len(work.prompts)
        few = replace(work, calls=work.calls[: PROBE_GROUPS * per_prompt])
        sides, seconds = {}, {}
        for dtype in DTYPES:
            plain = sides[dtype] = cls(settings, dtype)
            plain.step(few, Parts())
            start_s = time.perf_counter()
            plain.step(few, Parts())
            seconds[dtype] = time.perf_counter() - start_s
        better = min(DTYPES, key=seconds.__getitem__)
        for dtype, plain in sides.items():
            if dtype != better:
                plain.close()
        return sides[better]

    def step(self, work: Work, parts: Parts) -> None:
        """Sample all in one batch, score and train."""
        call, new_tokens = self.remote.call, work.calls[0].new_tokens
        made, logprobs = parts.timed(
            "rollouts", lambda: call("rollouts", work.prompts, new_tokens, work.group_size)
        )
        prompts = [prompt for prompt in work.prompts for _ in range(work.group_size)]
        if work.scored:
            rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, made, strict=True)]
            parts.timed("scoring", lambda: call("score", rows))
        advantages = work.advantages(made)
        parts.timed("training", lambda: call("train", prompts, made, logprobs, advantages))

    def close(self) -> None:
        """End the process."""
        self.remote.close()


def example(settings: Settings) -> list[Result]:
    """Row 30: a step of `client/examples/rl_loop.py`."""
    script = _example()
    with Served(settings, OUR_DTYPE) as served:
        ours = Ours(served, script.make_datum)
        tokenizer = served.base().get_tokenizer()
        calls = [
            Call(tokenizer.encode(prompt), EXAMPLE_NEW_TOKENS, EXAMPLE_GROUP_SIZE)
            for prompt in script.PROMPTS
        ]

        def reward(tokens: Sequence[int]) -> float:
            value: float = script.reward(tokenizer.decode(tokens))
            return value

        work = Work(cut(calls, settings.new_tokens_max), EXAMPLE_GROUP_SIZE, reward, scored=False)
        what = "a step of rl_loop.py / one process with generate and PEFT"
        return [_beside(("30", what), ours, lambda seed: _seeded(work, seed), settings)]


def recipe(settings: Settings) -> list[Result]:
    """Row 30m: a step as recipes for mathematics make it, one call per rollout."""

    def work(seed: int) -> Work:
        calls = cut(workloads.rollouts(seed), settings.new_tokens_max)
        return Work(calls, workloads.RL_GROUP_SIZE, _even_share, scored=True)

    with Served(settings, OUR_DTYPE) as served:
        ours = Ours(served, _example().make_datum)
        what = "16 groups of 8, 64 new tokens, scored, a step / one process with generate and PEFT"
        fewer = replace(settings, pairs=max(1, settings.pairs // 3))  # one takes minutes
        return [_beside(("30m", what), ours, work, fewer)]


def _even_share(tokens: Sequence[int]) -> float:
    """A reward that needs no tokenizer."""
    return float(np.mean(np.array(tokens) % 2 == 0))


def _seeded(work: Work, seed: int) -> Work:
    calls = [replace(call, seed=1000 * seed + index) for index, call in enumerate(work.calls)]
    return replace(work, calls=calls)


def _example() -> Any:
    """The example's module."""
    spec = importlib.util.spec_from_file_location("rl_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _beside(
    title: tuple[str, str], ours: Ours, work: Callable[[int], Work], settings: Settings
) -> Result:
    """Both sides in turn, and where their time goes."""
    first = work(10_000)
    ours.step(replace(first, calls=cut(first.calls, 2)), Parts())
    plain = Plain.quicker(settings, replace(first, calls=cut(first.calls, 8)))
    our_parts, plain_parts = Parts(), Parts()
    our_rounds, plain_rounds = itertools.count(), itertools.count()
    try:
        timings = measure(
            [
                Side(
                    "ours",
                    lambda: ours.step(work(next(our_rounds)), our_parts),
                    cpu_clock=ours.cpu_clock,
                ),
                Side(
                    "plain",
                    lambda: plain.step(work(next(plain_rounds)), plain_parts),
                    cpu_clock=plain.remote.cpu_clock,
                ),
            ],
            settings.pairs,
            warm_ups=0,  # both are warm
        )
    finally:
        plain.close()
    return Result(
        *title,
        ratio(timings["ours"], timings["plain"]),
        target=TARGET,
        sides={name: middle(found) for name, found in timings.items()},
        notes=f"ours in {OUR_DTYPE}: {our_parts}; plain in {plain.dtype}: {plain_parts};"
        " CPU of ours is the Sampler's",
    )
