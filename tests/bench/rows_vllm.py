"""The rows beside vLLM on this machine's CPU: `make bench-vllm`.

Our side is a cluster as `tinsmith up` runs it, asked through the wire; vLLM's own `LLM` is in a
process of its own, in its own environment, with nothing between it and who asks. It computes in
bfloat16, ours in what a Sampler takes by default. Every round has prompts of its own.
"""

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import tinsmith
from bench import sampling_workloads as workloads
from bench.harness import Result, Side, measure, middle, ratio
from bench.remote import Remote
from bench.rows_sampling import WARM_UP_ROUND, cut
from bench.sampling_workloads import Call
from bench.served import Served, sample
from bench.sides import Settings

PYTHON = Path(os.environ.get("VLLM_VENV", "build/vllm-venv")) / "bin" / "python"
TESTS = Path(__file__).resolve().parent.parent
WARM_UP_TOKENS = 4
VLLM_SLEEPS_AFTER_S = 1.5
"""Its worker looks for work for a second before it sleeps, and takes a core for that."""
CallsOfRound = Callable[[int], list[Call]]


def vllm_of(settings: Settings) -> Remote:
    """vLLM alone, in its own environment."""
    folders = [str(TESTS.parent / name) for name in ("tests", "client", "services")]
    return Remote(
        "bench.vllm_side:Vllm",
        str(settings.base_model.resolve()),
        env={
            "OMP_WAIT_POLICY": "",
            "OMP_NUM_THREADS": "",
            "PYTHONPATH": os.pathsep.join(folders),
        },
        python=str(PYTHON),
    )


def alone(settings: Settings) -> list[Result]:
    """Row 17v: one prompt, and 16 at once."""
    shapes = {f"{count} x 64 + 64 tokens": partial(_equal, count) for count in (1, 16)}
    return _beside_vllm(settings, "17v", shapes, (1.3, 1.5))


def _equal(count: int, seed: int) -> list[Call]:
    return workloads.equal(count, seed=seed)


def mixed(settings: Settings) -> list[Result]:
    """Row 18v: 32 requests of 8 to 256 new tokens."""
    what = "32 requests of 8 to 256 new tokens"
    return _beside_vllm(settings, "18v", {what: workloads.mixed}, (1.3,))


def group(settings: Settings) -> list[Result]:
    """Row 19v: 16 samples of a prompt of 1,024 tokens."""
    return _beside_vllm(
        settings, "19v", {"16 samples of 1,024 + 64 tokens": workloads.group}, (2.0,)
    )


def _beside_vllm(
    settings: Settings,
    row: str,
    shapes: Mapping[str, CallsOfRound],
    targets: Sequence[float],
) -> list[Result]:
    with Served(settings) as served, vllm_of(settings) as vllm:
        base = served.base()
        return [
            _shape(settings, (row, what), target, make, (served, base, vllm))
            for (what, make), target in zip(shapes.items(), targets, strict=True)
        ]


def _shape(
    settings: Settings,
    title: tuple[str, str],
    target: float,
    make: CallsOfRound,
    sides: tuple[Served, tinsmith.SamplingClient, Remote],
) -> Result:
    served, base, vllm = sides
    ours, theirs = itertools.count(), itertools.count()

    def calls_of(seed: int) -> list[Call]:
        return cut(make(seed), settings.new_tokens_max)

    def run_vllm(calls: list[Call]) -> None:
        asked = [(call.prompt, call.new_tokens, call.num_samples) for call in calls]
        assert vllm.call("generate", asked) == workloads.made_tokens(calls)

    sample(base, cut(calls_of(WARM_UP_ROUND), WARM_UP_TOKENS))
    run_vllm(cut(calls_of(WARM_UP_ROUND), WARM_UP_TOKENS))
    timings = measure(
        [
            Side(
                "ours",
                lambda: sample(base, calls_of(next(ours))),
                prepare=lambda: time.sleep(VLLM_SLEEPS_AFTER_S),
                cpu_clock=served.cpu_clock,
            ),
            Side("vLLM", lambda: run_vllm(calls_of(next(theirs)))),
        ],
        settings.pairs,
        warm_ups=0,  # both are warm
    )
    made = workloads.made_tokens(calls_of(0))
    per_s = {name: made / middle(found).wall_s for name, found in timings.items()}
    row, what = title
    return Result(
        row,
        f"{what}: tokens per second / vLLM",
        ratio(timings["vLLM"], timings["ours"]),
        target=target,
        higher_is_better=True,
        sides={name: middle(found) for name, found in timings.items()},
        notes=f"{per_s['ours']:.1f} beside {per_s['vLLM']:.1f} tok/s; ours in {served.dtype},"
        " vLLM in bfloat16",
    )


ROWS: dict[str, Callable[[Settings], list[Result]]] = {"17v": alone, "18v": mixed, "19v": group}
