"""Rows 20, 21 and 23, and the gap: many adapters, and weights that have just been trained."""

import itertools
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

import tinsmith
from bench import sampling_workloads as workloads
from bench.harness import Result, Side, Timing, estimate, measure, middle, ratio
from bench.rows_sampling import DTYPES, cut
from bench.sampling_workloads import Call
from bench.served import WAIT_S_MAX, Served, sample, train
from bench.sides import Settings
from tinsmith import types

ADAPTERS = 8
SAVES_MIN = 40
FIRST_TOKEN_TARGETS_MS = {50: 60.0, 99: 150.0}
GAP_SEQUENCES, GAP_TOKENS = 16, 64
GAP_TARGET_MILLIONTHS = {"float32": 10.0, "bfloat16": None}


def _fresh(rounds: "itertools.count[int]", count: int, settings: Settings) -> list[Call]:
    """Calls with prompts that no call had before."""
    return cut(workloads.equal(count, seed=next(rounds)), settings.new_tokens_max)


def eight_adapters(settings: Settings) -> list[Result]:
    """Row 20: a sequence of each of eight adapters at once, over one after the other."""
    with Served(settings) as served:
        clients = [served.adapter(seed) for seed in range(ADAPTERS)]
        rounds = itertools.count()

        def at_once() -> None:
            sample(clients, _fresh(rounds, ADAPTERS, settings))

        def one_by_one() -> None:
            for client, call in zip(clients, _fresh(rounds, ADAPTERS, settings), strict=True):
                sample(client, [call])

        timings = measure(
            [
                Side("at once", at_once, cpu_clock=served.cpu_clock),
                Side("one by one", one_by_one, cpu_clock=served.cpu_clock),
            ],
            settings.pairs,
        )
    return [
        Result(
            "20",
            "8 adapters, a sequence of 64 + 64 tokens each, at once / one by one",
            ratio(timings["at once"], timings["one by one"]),
            target=0.30,
            sides={name: middle(found) for name, found in timings.items()},
        )
    ]


def mixed_adapters(settings: Settings) -> list[Result]:
    """Row 21: a batch of eight adapters over the same batch of one, and over the base model."""
    with Served(settings) as served:
        clients = [served.adapter(seed) for seed in range(ADAPTERS)]
        sides = {"mixed": clients, "one adapter": clients[:1], "base model": [served.base()]}
        rounds = itertools.count()

        def run(clients: Sequence[tinsmith.SamplingClient]) -> None:
            sample(clients, _fresh(rounds, ADAPTERS, settings))

        timings = measure(
            [
                Side(name, partial(run, asked), cpu_clock=served.cpu_clock)
                for name, asked in sides.items()
            ],
            settings.pairs,
        )
    return [
        Result(
            "21",
            f"8 sequences of 8 adapters: tokens per second / of {other}",
            ratio(timings[other], timings["mixed"]),
            target=target,
            higher_is_better=True,
            sides={name: middle(timings[name]) for name in ("mixed", other)},
        )
        for other, target in (("one adapter", 0.85), ("base model", None))
    ]


def hand_over(settings: Settings) -> list[Result]:
    """Row 23: from the call that saves to the first token on the new weights.

    Weights are new each time, and a token of other logprob shows it.
    """
    saves = max(SAVES_MIN, settings.pairs)
    found: list[tuple[float, float]] = []
    logprobs: list[float] = []
    with Served(settings) as served:
        trainer = served.trainer(1)
        call = Call(workloads.random_tokens(16, 7), 1)
        for index in range(saves + 1):
            train(trainer, index)
            start_s = time.perf_counter()
            client = trainer.save_weights_and_get_sampling_client().result(WAIT_S_MAX)
            saved_s = time.perf_counter()
            (answer,) = sample(client, [call])
            found.append((saved_s - start_s, time.perf_counter() - saved_s))
            logprobs.append(answer.sequences[0].logprobs[0])
    assert len(set(logprobs)) == len(logprobs), "some weights were not new"
    seconds = np.array(found[1:])  # the first one loads what the others find
    parts = {
        "save": Timing(float(np.median(seconds[:, 0])), 0.0),
        "first token": Timing(float(np.median(seconds[:, 1])), 0.0),
    }
    return [
        Result(
            "23",
            f"save for sampler to first token on new weights, p{percent}",
            estimate(seconds.sum(1) * 1e3, lambda s, p=percent: float(np.percentile(s, p))),
            "ms",
            target=target,
            sides=parts,
            notes=f"{saves} saves after the first; rank 16, 19.5 MB",
        )
        for percent, target in FIRST_TOKEN_TARGETS_MS.items()
    ]


def gap(settings: Settings) -> list[Result]:
    """Logprobs of sampled tokens, by the Sampler as it drew them and by the trainer."""
    return [_gap(settings, dtype) for dtype in DTYPES]


def _gap(settings: Settings, dtype: str) -> Result:
    with Served(settings, dtype) as served:
        trainer = served.trainer(1)
        client = trainer.save_weights_and_get_sampling_client().result(WAIT_S_MAX)
        calls = cut(workloads.equal(GAP_SEQUENCES, new_tokens=GAP_TOKENS), settings.new_tokens_max)
        made = [answer.sequences[0] for answer in sample(client, calls)]
        data = []
        for call, sequence in zip(calls, made, strict=True):
            row = [*call.prompt, *sequence.tokens]
            inputs = {"target_tokens": np.array(row[1:]), "weights": np.ones(len(row) - 1)}
            data.append(types.Datum(types.ModelInput.from_ints(row[:-1]), inputs))
        trained = trainer.forward(data, "cross_entropy").result(WAIT_S_MAX)
    apart = np.array(
        [
            np.abs(sequence.logprobs_np - np.asarray(out["logprobs"])[-len(sequence.logprobs_np) :])
            for sequence, out in zip(made, trained.loss_fn_outputs, strict=True)
        ]
    )
    return Result(
        "gap",
        f"sampled and trainer logprobs apart, mean, {dtype}",
        estimate(apart.mean(1) * 1e6, lambda s: float(np.mean(s))),
        "millionths",
        target=GAP_TARGET_MILLIONTHS[dtype],
        notes=f"{apart.size} tokens of {len(made)} sequences; the largest {apart.max():.1e}",
    )
