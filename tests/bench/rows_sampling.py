"""Rows 17 to 19 and 22, and scoring: what sampling costs beside transformers alone.

Our side is a cluster as `tinsmith up` runs it, asked through the wire by the public client; the
other one is `generate` in a process of its own, in the better of float32 and bfloat16. Every round
has prompts of its own, so that no cache helps where a row does not mean it to.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

import tinsmith
from bench import sampling_workloads as workloads
from bench.harness import Agreement, Result, Side, Timing, estimate, measure, middle, ratio, walls
from bench.remote import Remote
from bench.sampling_workloads import Call
from bench.served import WAIT_S_MAX, Served, prompt_of, sample
from bench.sides import Settings
from tinsmith import types

DTYPES = ("bfloat16", "float32")
LOGPROBS_ABS_MAX = {"bfloat16": 1.0, "float32": 1e-3}
"""The largest of hundreds of tokens, beside a float32 forward of transformers."""
WARM_UP_ROUND, PROBE_ROUND = 9_000, 9_001
PROBE_TOKENS = 16
CHECKED_SEQUENCES = 4

SKYRL_GENERATE_PER_S = 14.5
"""`generate` in float32 in the hour in which SkyRL's JAX server was measured: tokens per second."""
SKYRL_NEW_TOKENS = 32
SKYRL_S = {"one sample": 1.71, "16 samples in one call": 6.1, "16 calls": 11.5}
SKYRL_TARGETS = {"one sample": 1.6, "16 samples in one call": 2.5, "16 calls": 3.0}

SCORED_ROWS, SCORED_TOKENS = 8, 512
CALLS_OF_ROUND = Callable[[int], list[Call]]


def plain_of(settings: Settings) -> Remote:
    """Transformers alone."""
    arguments = (str(settings.base_model), settings.threads)
    return Remote("bench.plain_generate:Plain", *arguments)


def equal(settings: Settings) -> list[Result]:
    """Row 17: one prompt, and 16 at once."""
    with Served(settings) as served, plain_of(settings) as plain:
        return [
            _beside_generate(
                ("17", f"{count} x 64 + 64 tokens: tokens per second / generate"),
                target,
                partial(_equal_round, count),
                (served, plain),
                settings,
            )
            for count, target in ((1, 1.6), (16, 2.2))
        ]


def _equal_round(count: int, seed: int) -> list[Call]:
    return workloads.equal(count, seed=seed)


def mixed(settings: Settings) -> list[Result]:
    """Row 18: 32 requests of 8 to 256 new tokens; `generate` makes all as long as the longest."""
    with Served(settings) as served, plain_of(settings) as plain:
        what = "32 requests of 8 to 256 new tokens: tokens per second / generate"
        return [
            _beside_generate(("18", what), 2.5, workloads.mixed, (served, plain), settings),
        ]


def group(settings: Settings) -> list[Result]:
    """Row 19: 16 samples of a prompt of 1,024 tokens."""
    with Served(settings) as served, plain_of(settings) as plain:
        what = "16 samples of 1,024 + 64 tokens: time / generate, num_return_sequences=16"
        return [
            _beside_generate(
                ("19", what), 0.30, workloads.group, (served, plain), settings, rates=False
            )
        ]


def cut(calls: Sequence[Call], new_tokens_max: int | None) -> list[Call]:
    """Calls that make no more tokens than that."""
    most = new_tokens_max or max(call.new_tokens for call in calls)
    return [replace(call, new_tokens=min(call.new_tokens, most)) for call in calls]


def _generate(plain: Remote, dtype: str, calls: Sequence[Call]) -> None:
    """One static batch; all of it as long as the longest."""
    longest = max(call.new_tokens for call in calls)
    plain.call("generate", dtype, [c.prompt for c in calls], longest, calls[0].num_samples)


def better_dtype(plain: Remote, calls: Sequence[Call]) -> str:
    """The element type with which `generate` is quicker, found with few tokens; both are warm."""
    few = [replace(call, num_samples=1) for call in cut(calls, PROBE_TOKENS)]
    seconds = {}
    for dtype in DTYPES:
        _generate(plain, dtype, cut(few, 2))
        start_s = time.perf_counter()
        _generate(plain, dtype, few)
        seconds[dtype] = time.perf_counter() - start_s
    return min(DTYPES, key=seconds.__getitem__)


def _beside_generate(
    title: tuple[str, str],
    target: float,
    make: CALLS_OF_ROUND,
    sides: tuple[Served, Remote],
    settings: Settings,
    *,
    rates: bool = True,
) -> Result:
    """The base model through the wire beside `generate`.

    Args:
        title: Row, and what it says.
        target: Of the ratio.
        make: Calls of a round.
        sides: Both.
        settings: Of the run.
        rates: The ratio is of rates, ours above; else of times, ours above.
    """
    served, plain = sides
    base = served.base()

    def calls_of(seed: int) -> list[Call]:
        return cut(make(seed), settings.new_tokens_max)

    sample(base, cut(calls_of(WARM_UP_ROUND), 4))
    dtype = better_dtype(plain, calls_of(PROBE_ROUND))
    ours, theirs, answered = itertools.count(), itertools.count(), {}

    def run_ours() -> None:
        calls = calls_of(next(ours))
        answered["last"] = (calls, sample(base, calls))

    timings = measure(
        [
            Side("ours", run_ours, cpu_clock=served.cpu_clock),
            Side(
                "generate",
                lambda: _generate(plain, dtype, calls_of(next(theirs))),
                cpu_clock=plain.cpu_clock,
            ),
        ],
        settings.pairs,
        warm_ups=0,  # both are warm, and a round takes a minute
    )
    made = workloads.made_tokens(calls_of(0))
    per_s = {name: made / middle(found).wall_s for name, found in timings.items()}
    pair = (
        (timings["generate"], timings["ours"]) if rates else (timings["ours"], timings["generate"])
    )
    return Result(
        *title,
        ratio(*pair),
        target=target,
        higher_is_better=rates,
        sides={name: middle(found) for name, found in timings.items()},
        agreement=agreement(plain, served.dtype, *answered["last"]),
        notes=f"{per_s['ours']:.1f} beside {per_s['generate']:.1f} tok/s; ours in {served.dtype},"
        f" generate in {dtype}",
    )


def agreement(
    plain: Remote, dtype: str, calls: Sequence[Call], answers: Sequence[types.SampleResponse]
) -> Agreement:
    """Logprobs of some sampled tokens beside those of a float32 forward of transformers.

    Args:
        plain: Who computes it.
        dtype: In which we did.
        calls: The calls.
        answers: Their answers.
    """
    rows, found = [], []
    for call, answer in list(zip(calls, answers, strict=True))[:CHECKED_SEQUENCES]:
        rows.append([*call.prompt, *answer.sequences[0].tokens])
        found.append(answer.sequences[0].logprobs_np)
    expected = plain.call("logprobs", "float32", rows)
    apart = [
        float(np.abs(ours - theirs[-len(ours) :]).max())
        for ours, theirs in zip(found, expected, strict=True)
    ]
    return Agreement(float(np.max(apart)), 0.0, LOGPROBS_ABS_MAX[dtype])


def with_adapter(settings: Settings) -> list[Result]:
    """Row 17f: float32 and an adapter of rank 16, beside figures of SkyRL's JAX server.

    They come from another hour on this kind of machine, so they are scaled by what `generate` in
    float32 does in each round.
    """
    with Served(settings, "float32") as served, plain_of(settings) as plain:
        client = served.adapter(1)
        shapes = {
            "one sample": lambda seed: workloads.equal(1, seed=seed),
            "16 samples in one call": lambda seed: [
                replace(call, num_samples=16) for call in workloads.equal(1, seed=seed)
            ],
            "16 calls": lambda seed: workloads.equal(16, seed=seed),
        }
        rounds = itertools.count()  # never twice the same prompt
        new_tokens = min(settings.new_tokens_max or SKYRL_NEW_TOKENS, SKYRL_NEW_TOKENS)

        def run(make: CALLS_OF_ROUND) -> None:
            sample(client, cut(make(next(rounds)), new_tokens))

        alone = workloads.equal(1, new_tokens=new_tokens)
        for make in shapes.values():
            sample(client, cut(make(WARM_UP_ROUND), 2))
        _generate(plain, "float32", cut(alone, 2))
        timings = measure(
            [
                *(
                    Side(name, partial(run, make), cpu_clock=served.cpu_clock)
                    for name, make in shapes.items()
                ),
                Side(
                    "generate",
                    lambda: _generate(plain, "float32", alone),
                    cpu_clock=plain.cpu_clock,
                ),
            ],
            settings.pairs,
            warm_ups=0,
        )
    per_s = new_tokens / walls(timings["generate"])
    share = new_tokens / SKYRL_NEW_TOKENS
    return [
        Result(
            "17f",
            f"fp32, rank 16, {name}: rate / SkyRL's, scaled",
            estimate(skyrl_s * share * SKYRL_GENERATE_PER_S / per_s / walls(timings[name])),
            target=SKYRL_TARGETS[name],
            higher_is_better=True,
            sides={key: middle(timings[key]) for key in (name, "generate")},
            notes=f"generate {np.median(per_s):.1f} tok/s in float32, so SkyRL's {skyrl_s} s count"
            f" as {skyrl_s * share * SKYRL_GENERATE_PER_S / np.median(per_s):.2f}",
        )
        for name, skyrl_s in SKYRL_S.items()
    ]


def scoring(settings: Settings) -> list[Result]:
    """Eight `compute_logprobs` of 512 tokens beside one bare forward over the 4,096."""
    return [_scoring(settings, dtype) for dtype in DTYPES]


def _scoring(settings: Settings, dtype: str) -> Result:
    def rows_of(seed: int) -> list[list[int]]:
        return [
            workloads.random_tokens(SCORED_TOKENS, 55_000 + seed * SCORED_ROWS + index)
            for index in range(SCORED_ROWS)
        ]

    with Served(settings, dtype) as served, plain_of(settings) as plain:
        base = served.base()

        def compute(rows: Sequence[Sequence[int]]) -> list[list[float | None]]:
            prompts = [types.ModelInput.from_ints(list(row)) for row in rows]
            futures = [base.compute_logprobs(prompt) for prompt in prompts]
            return [future.result(WAIT_S_MAX) for future in futures]

        ours, theirs = itertools.count(), itertools.count()
        checked = rows_of(PROBE_ROUND)
        apart = np.concatenate(
            [
                np.abs(np.array(found[1:], np.float32) - expected)
                for found, expected in zip(
                    compute(checked), plain.call("logprobs", "float32", checked), strict=True
                )
            ]
        )
        timings = measure(
            [
                Side("ours", lambda: compute(rows_of(next(ours))), cpu_clock=served.cpu_clock),
                Side(
                    "bare forward",
                    lambda: plain.call("forward", dtype, rows_of(next(theirs))),
                    cpu_clock=plain.cpu_clock,
                ),
            ],
            settings.pairs,
        )
    return Result(
        "scoring",
        f"8 compute_logprobs of 512 tokens, {dtype} / one bare forward over 4,096",
        ratio(timings["ours"], timings["bare forward"]),
        target=1.0,
        sides={name: middle(found) for name, found in timings.items()},
        agreement=Agreement(float(apart.max()), 0.0, LOGPROBS_ABS_MAX[dtype]),
        notes=f"mean gap to a float32 forward {apart.mean():.1e}",
    )


def prefixes(settings: Settings) -> list[Result]:
    """Row 22: prompt tokens that are computed, of a prompt that came before and of a chat."""
    with Served(settings) as served:
        base = served.base()
        again, chats, first_s, second_s = [], [], [], []
        sample(base, cut(workloads.group(WARM_UP_ROUND), 2))
        for seed in range(settings.pairs):
            call = replace(workloads.group(seed)[0], num_samples=1)
            for times in (first_s, second_s):
                times.append(_first_token_s(base, call))
            again.append(_computed(sample(base, cut([call], 1)), [call]) / len(call.prompt))
            turns = cut(workloads.chat(seed), settings.new_tokens_max)
            answers = [answer for turn in turns for answer in sample(base, [turn])]
            chats.append(_computed(answers, turns) / sum(len(turn.prompt) for turn in turns))
    common = {"row": "22", "notes": "of tokens that were asked for"}
    first, second = (Timing(float(np.median(times)), 0.0) for times in (first_s, second_s))
    return [
        Result(
            what="the same 1,024-token prompt again: tokens computed / first time",
            estimate=estimate(np.array(again)),
            target=0.02,
            sides={"first token, first time": first, "again": second},
            **common,
        ),
        Result(
            what="chat of 8 turns: tokens computed / without a cache",
            estimate=estimate(np.array(chats)),
            target=0.25,
            **common,
        ),
    ]


def _first_token_s(client: tinsmith.SamplingClient, call: Call) -> float:
    start_s = time.perf_counter()
    params = types.SamplingParams(max_tokens=1, seed=0, stop=[])
    client.sample(prompt_of(call), 1, params).result(WAIT_S_MAX)
    return time.perf_counter() - start_s


def _computed(answers: Sequence[types.SampleResponse], calls: Sequence[Call]) -> int:
    """Prompt tokens that no cache had."""
    return sum(
        len(call.prompt) - answer.prompt_cache_hit_tokens
        for call, answer in zip(calls, answers, strict=True)
    )
