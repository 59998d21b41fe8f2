"""Rows 1 to 5, 25 and 27: what `forward_backward` costs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bench import workloads
from bench.configs import SHAPES, Shape, write_model
from bench.harness import Result, Side, estimate, measure, middle, ratio, walls
from bench.sides import LORA, BareLoop, Ours, Settings, agree
from tinsmithd.domain import Datum, LoraConfig

BATCHES = 3
ROWS_PER_BATCH = 8
ROW_TOKENS = 256
ZERO_SHARE = 0.8
GROWTH_TOKENS = (64, 128, 256, 512, 1024)

DENSE_TARGET = 1.00
PEER_TARGET = 0.70
PADDED_TARGET = 0.42
SHORT_TARGET = 0.80
BETTER_TARGET = 1.00
RAGGED_TARGET = 0.80
GROWTH_TARGET = 1.05
EXPERTS_TARGET = 0.50
ZERO_WEIGHT_MARGIN = 0.04


def dense(settings: Settings) -> list[Result]:
    """Row 1: equal rows against one batch of them; with an adapted head, too."""
    shape, ours, bare = _sides(settings)
    batch = workloads.make_batch([ROW_TOKENS] * ROWS_PER_BATCH, shape.vocab)
    size = f"dense {ROWS_PER_BATCH}x{ROW_TOKENS}"
    what = f"{size} / bare loop"
    results = [_against_batch("1", what, ours, bare, batch, settings, DENSE_TARGET)]
    lora = LoraConfig(rank=LORA.rank, train_unembed=True)
    _, ours, bare = _sides(settings, lora=lora)
    what = f"{size}, head adapted / bare loop"
    return [*results, _against_batch("1", what, ours, bare, batch, settings, DENSE_TARGET)]


def peer_style(settings: Settings) -> list[Result]:
    """Row 2: the same against a loop of single rows that always recomputes its layers."""
    shape, ours, bare = _sides(settings, recompute=True)
    batch = workloads.make_batch([ROW_TOKENS] * ROWS_PER_BATCH, shape.vocab)
    what = f"dense {ROWS_PER_BATCH}x{ROW_TOKENS} / a row at a time, recomputed"
    return [_against_batch("2", what, ours, bare, batch, settings, PEER_TARGET, one_by_one=True)]


def zero_weights(settings: Settings) -> list[Result]:
    """Row 5: most tokens have no weight; all logprobs are still answered."""
    shape, ours, bare = _sides(settings)
    lengths = [ROW_TOKENS] * ROWS_PER_BATCH
    batch = workloads.make_batch(lengths, shape.vocab, zero_share=ZERO_SHARE)
    # Without weight a token needs no backward of the head: half of the head's matmul work.
    target = 1 - ZERO_SHARE / 2 * shape.head_share + ZERO_WEIGHT_MARGIN
    what = f"{ZERO_SHARE:.0%} zero-weight tokens, {ROWS_PER_BATCH}x{ROW_TOKENS} / bare loop"
    return [_against_batch("5", what, ours, bare, batch, settings, round(target, 2))]


def ragged(settings: Settings) -> list[Result]:
    """Row 3: log-normal lengths."""
    lengths = workloads.padded_batches(BATCHES, ROWS_PER_BATCH)
    targets = {"padded": PADDED_TARGET, "better": RAGGED_TARGET}
    return _against_loops("3", "ragged", lengths, settings, targets)


def short(settings: Settings) -> list[Result]:
    """Row 4: log-normal lengths of at most 64 tokens."""
    lengths = [
        workloads.log_normal_lengths(seed, ROWS_PER_BATCH, median=32, cap=64)
        for seed in range(BATCHES)
    ]
    targets = {"one by one": SHORT_TARGET, "better": BETTER_TARGET}
    return _against_loops("4", "short rows", lengths, settings, targets)


def growth(settings: Settings) -> list[Result]:
    """Row 25: slope of log time against log tokens, one datum; the bare loop's beside it."""
    shape, ours, bare = _sides(settings)
    data = {n: workloads.make_batch([n], shape.vocab) for n in GROWTH_TOKENS}
    agreement = agree(ours, bare, list(data.values()))
    timings = measure(
        [
            side
            for n, batch in data.items()
            for side in (
                Side(f"ours {n}", lambda b=batch: ours.forward_backward(b), ours.clear),
                Side(f"bare {n}", lambda b=batch: bare.padded(b), bare.clear),
            )
        ],
        settings.pairs,
    )
    results = []
    for name in ("ours", "bare"):
        samples = np.stack([walls(timings[f"{name} {n}"]) for n in data], axis=1)
        loop = "" if name == "ours" else " of the bare loop, for comparison"
        results.append(
            Result(
                "25",
                f"log-log slope, {GROWTH_TOKENS[0]} to {GROWTH_TOKENS[-1]} tokens{loop}",
                estimate(samples, _slope),
                target=GROWTH_TARGET if name == "ours" else None,
                sides={k: middle(v) for k, v in timings.items() if k.startswith(name)},
                agreement=agreement,
            )
        )
    return results


def experts(settings: Settings) -> list[Result]:
    """Row 27: experts with adapters, of which PEFT merges copies of all weights in each forward."""
    shape, ours, bare = _sides(replace(settings, shape=settings.shape or "E"))
    results = []
    for tokens in (ROW_TOKENS // 16, ROW_TOKENS // 4):
        batch = workloads.make_batch([tokens] * ROWS_PER_BATCH, shape.vocab)
        what = f"{shape.experts} experts adapted, {ROWS_PER_BATCH}x{tokens} / bare loop"
        target = EXPERTS_TARGET
        results.append(_against_batch("27", what, ours, bare, batch, settings, target))
    return results


def _slope(samples: np.ndarray) -> float:
    """Least squares on the logarithms of medians; samples are `(pairs, len(GROWTH_TOKENS))`."""
    times = np.log(np.median(samples, axis=0))
    return float(np.polyfit(np.log(GROWTH_TOKENS), times, 1)[0])


def _sides(
    settings: Settings, *, lora: LoraConfig = LORA, recompute: bool = False
) -> tuple[Shape, Ours, BareLoop]:
    shape = SHAPES[settings.shape or "S"]
    folder = write_model(shape, settings.models)
    ours = Ours(folder, settings, lora=lora)
    return shape, ours, BareLoop(folder, ours.start, recompute=recompute)


def _against_batch(
    row: str,
    what: str,
    ours: Ours,
    bare: BareLoop,
    batch: Sequence[Datum],
    settings: Settings,
    target: float,
    *,
    one_by_one: bool = False,
) -> Result:
    agreement = agree(ours, bare, [batch], one_by_one=one_by_one)
    loop = bare.one_by_one if one_by_one else bare.padded
    timings = measure(
        [
            Side("ours", lambda: ours.forward_backward(batch), ours.clear),
            Side("bare", lambda: loop(batch), bare.clear),
        ],
        settings.pairs,
    )
    return Result(
        row,
        what,
        ratio(timings["ours"], timings["bare"]),
        target=target,
        sides={name: middle(found) for name, found in timings.items()},
        agreement=agreement,
    )


def _against_loops(
    row: str,
    what: str,
    lengths: Sequence[Sequence[int]],
    settings: Settings,
    targets: dict[str, float],
) -> list[Result]:
    """All batches by us, padded, and one by one; also against whichever loop is the faster."""
    shape, ours, bare = _sides(settings)
    batches = [workloads.make_batch(ls, shape.vocab, seed=i) for i, ls in enumerate(lengths)]
    agreements = {
        "padded": agree(ours, bare, batches),
        "one by one": agree(ours, bare, batches, one_by_one=True),
    }
    timings = measure(
        [
            Side("ours", lambda: [ours.forward_backward(b) for b in batches], ours.clear),
            Side("padded", lambda: [bare.padded(b) for b in batches], bare.clear),
            Side("one by one", lambda: [bare.one_by_one(b) for b in batches], bare.clear),
        ],
        settings.pairs,
    )
    sides = {name: middle(found) for name, found in timings.items()}
    better = min(agreements, key=lambda name: sides[name].wall_s)
    factors = ", ".join(f"{workloads.padding_factor(ls):.2f}" for ls in lengths)
    return [
        Result(
            row,
            f"{what}, {len(lengths)} batches of {ROWS_PER_BATCH} / {name} loop"
            + (f" ({loop})" if name != loop else ""),
            ratio(timings["ours"], timings[loop]),
            target=targets.get(name),
            sides={"ours": sides["ours"], loop: sides[loop]},
            agreement=agreements[loop],
            notes=f"padding factors {factors}",
        )
        for name, loop in (("padded",) * 2, ("one by one",) * 2, ("better", better))
    ]
