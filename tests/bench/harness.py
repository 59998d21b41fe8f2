"""Interleaved measurements, their ratios with intervals, and what a row of the table says."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

BOOTSTRAP_SAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Timing:
    """One run of one side, seconds; `cpu_s` is of all threads that worked for it."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """How far two sides' numbers are apart.

    Attributes:
        logprobs_abs: Largest absolute difference of a per-token logprob.
        gradients_rel: L2 norm of the difference over that of the baseline's gradients.
    """

    logprobs_abs: float
    gradients_rel: float
    logprobs_abs_max: float = 1e-4
    gradients_rel_max: float = 1e-4

    @property
    def holds(self) -> bool:
        """False for NaN, too."""
        return (
            self.logprobs_abs <= self.logprobs_abs_max
            and self.gradients_rel <= self.gradients_rel_max
        )


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        row: Row of the benchmark table.
        what: What was measured.
        estimate: Of what is measured.
        unit: "" for a ratio.
        target: The estimate should be at most this; at least, where `higher_is_better`.
        sides: Median times by side.
        agreement: None where there are no numbers to compare.
        notes: What else a reader must know.
    """

    row: str
    what: str
    estimate: Estimate
    unit: str = ""
    target: float | None = None
    higher_is_better: bool = False
    sides: Mapping[str, Timing] = field(default_factory=dict)
    agreement: Agreement | None = None
    notes: str = ""

    @property
    def failed(self) -> bool:
        """The two sides did not compute the same: the estimate means nothing."""
        return self.agreement is not None and not self.agreement.holds

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none, or the row failed."""
        if self.target is None or self.failed:
            return None
        if self.higher_is_better:
            return self.estimate.value >= self.target
        return self.estimate.value <= self.target


@dataclass(frozen=True)
class Side:
    """One way to do some work.

    Attributes:
        name: How reports call it.
        run: What is timed.
        prepare: Runs before each time, not timed.
        cpu_clock: CPU seconds so far; of this process, unless others work for the side.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    cpu_clock: Callable[[], float] = time.process_time


def measure(
    sides: Sequence[Side], pairs: int, *, warm_ups: int = 1, collect: bool = True
) -> dict[str, list[Timing]]:
    """Time sides in turn, `pairs` times; every other round goes backwards, against drift.

    Args:
        sides: What to time.
        pairs: Rounds that count.
        warm_ups: Rounds before those.
        collect: Collect garbage before each time.
    """
    found: dict[str, list[Timing]] = {side.name: [] for side in sides}
    for index in range(-warm_ups, pairs):
        for side in sides if index % 2 else reversed(sides):
            side.prepare()
            if collect:
                gc.collect()
            cpu_s, wall_s = side.cpu_clock(), time.perf_counter()
            side.run()
            timing = Timing(time.perf_counter() - wall_s, side.cpu_clock() - cpu_s)
            if index >= 0:
                found[side.name].append(timing)
    return found


def walls(timings: Sequence[Timing]) -> np.ndarray:
    """Wall times, float64 `(pairs,)`, seconds."""
    return np.array([timing.wall_s for timing in timings])


def middle(timings: Sequence[Timing]) -> Timing:
    """Medians of wall and CPU time."""
    return Timing(
        float(np.median([timing.wall_s for timing in timings])),
        float(np.median([timing.cpu_s for timing in timings])),
    )


def estimate(
    samples: np.ndarray, statistic: Callable[[np.ndarray], float] = lambda s: float(np.median(s))
) -> Estimate:
    """A statistic of some samples with its bootstrap interval.

    Args:
        samples: `(pairs, ...)`; whole rows are drawn, so what was measured together stays together.
        statistic: Takes samples, the median by default.
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(samples), (BOOTSTRAP_SAMPLES, len(samples)))
    values = [statistic(samples[indices]) for indices in drawn]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return Estimate(statistic(samples), float(low), float(high))


def ratio(ours: Sequence[Timing], baseline: Sequence[Timing]) -> Estimate:
    """Median of the pairs' ratios of wall time."""
    return estimate(walls(ours) / walls(baseline))


def compare(
    ours: tuple[Sequence[np.ndarray], Mapping[str, np.ndarray]],
    baseline: tuple[Sequence[np.ndarray], Mapping[str, np.ndarray]],
    *,
    logprobs_abs_max: float = 1e-4,
    gradients_rel_max: float = 1e-4,
) -> Agreement:
    """Compare logprobs (one array per datum) and gradients (by parameter name) of two sides."""
    (our_logprobs, our_gradients), (logprobs, gradients) = ours, baseline
    if our_gradients.keys() != gradients.keys() or len(our_logprobs) != len(logprobs):
        return Agreement(float("inf"), float("inf"))
    apart = [float(np.abs(a - b).max()) for a, b in zip(our_logprobs, logprobs, strict=True)]
    square = sum(float(np.square(a).sum(dtype=np.float64)) for a in gradients.values())
    difference = sum(
        float(np.square(our_gradients[name] - a).sum(dtype=np.float64))
        for name, a in gradients.items()
    )
    return Agreement(
        float(np.max(apart, initial=0.0)),  # NaN stays NaN
        float(np.sqrt(difference / square)) if square else float("inf"),
        logprobs_abs_max,
        gradients_rel_max,
    )
