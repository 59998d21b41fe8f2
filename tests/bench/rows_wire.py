"""What servicer, admission, wire and client cost beside the engine alone."""

import itertools
import time

import numpy as np

import tinsmith
from bench import sampling_workloads as workloads
from bench.harness import Result, Side, Timing, estimate, measure, middle, ratio
from bench.remote import Remote
from bench.rows_sampling import WARM_UP_ROUND, cut
from bench.sampling_workloads import Call
from bench.served import Served, default_dtype, params_of, prompt_of, sample
from bench.sides import Settings

CALLS = 16
FIRST_TOKENS_PER_PAIR = 10
RATE_TARGET = 0.97
FIRST_TOKEN_TARGET_MS = 5.0


def wire(settings: Settings) -> list[Result]:
    """Throughput of 16 calls, and what is added to the time to a first token."""
    arguments = (str(settings.base_model), default_dtype(), settings.threads)
    with (
        Served(settings) as served,
        Remote("bench.engine_alone:EngineAlone", *arguments) as alone,
    ):
        base = served.base()
        warm_up = cut(workloads.equal(CALLS, seed=WARM_UP_ROUND), 8)
        sample(base, warm_up)
        alone.call("run", warm_up)
        return [_rate(served, base, alone, settings), _first_token(base, alone, settings)]


def _rate(
    served: Served, base: tinsmith.SamplingClient, alone: Remote, settings: Settings
) -> Result:
    ours, theirs = itertools.count(), itertools.count()

    def calls_of(seed: int) -> list[Call]:
        return cut(workloads.equal(CALLS, seed=seed), settings.new_tokens_max)

    timings = measure(
        [
            Side("wire", lambda: sample(base, calls_of(next(ours))), cpu_clock=served.cpu_clock),
            Side(
                "engine alone",
                lambda: alone.call("run", calls_of(next(theirs))),
                cpu_clock=alone.cpu_clock,
            ),
        ],
        settings.pairs,
    )
    return Result(
        "wire",
        "16 x 64 + 64 tokens: tokens per second through the wire / engine alone",
        ratio(timings["engine alone"], timings["wire"]),
        target=RATE_TARGET,
        higher_is_better=True,
        sides={name: middle(found) for name, found in timings.items()},
    )


def _first_token(base: tinsmith.SamplingClient, alone: Remote, settings: Settings) -> Result:
    seconds = []
    for seed in range(settings.pairs * FIRST_TOKENS_PER_PAIR):
        (call,) = workloads.equal(1, new_tokens=2, seed=seed)
        start_s = time.perf_counter()
        stream = base.sample_stream(prompt_of(call), 1, params_of(call))
        next(stream)
        wire_s = time.perf_counter() - start_s
        list(stream)
        seconds.append((wire_s, alone.call("run", [call])))
    found = np.array(seconds)  # (calls, 2)
    wire_s, alone_s = np.median(found, 0)
    return Result(
        "wire",
        "time to first token through the wire - engine alone",
        estimate((found[:, 0] - found[:, 1]) * 1e3),
        "ms",
        target=FIRST_TOKEN_TARGET_MS,
        sides={"wire": Timing(float(wire_s), 0.0), "engine alone": Timing(float(alone_s), 0.0)},
        notes=f"p50 of {len(found)} calls, one after the other",
    )
