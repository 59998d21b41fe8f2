"""Rows G1 to G3 on a GPU, bfloat16: ragged rows, packed by the engine, padded by a PEFT loop.

    PYTHONPATH=tests python tests/gpu/bench_gpu.py --shape 0.6b

G1 is the engine's MFU: useful tokens a second times 4 N, over the GPU's dense bfloat16 peak. N is
the number of parameters in matrix products, the head's included; the work of the adapter and of
attention itself is not counted, nor are padding and recomputation. G2 is its time over the loop's.
G3 is the time of a call through a Training server with the settings of deploy/ over the engine's.

Numbers are checked against a float32 loop: the engine may be no further from it than the bfloat16
loop is, times `BFLOAT16_FACTOR`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from served_gpu import through_server

from bench import report, workloads
from bench.configs import QWEN3_0_6B, QWEN3_4B, Shape, write_model
from bench.harness import Agreement, Result, Side, compare, estimate, measure, middle, ratio, walls
from bench.sides import BareLoop, Ours, Settings
from tinsmithd import sizes
from tinsmithd.domain import Datum

SHAPES = {"0.6b": QWEN3_0_6B, "4b": QWEN3_4B}
LENGTHS = {"qwen3-0.6b": (128, 1024), "qwen3-4b": (64, 512)}
"""Median and cap, so short that a padded batch fits into 80 GB without recomputation."""
MFU_TARGET = 0.40
RATIO_TARGET = 0.45
BATCHES = 8
ROWS_PER_BATCH = 8
MICRO_BATCH_TOKENS_MAX = 16_384
BFLOAT16_FACTOR = 2.0


def peak_flops() -> float | None:
    """Of this GPU; None where it is not known."""
    return sizes.peak_flops(torch.cuda.get_device_name(), "bfloat16")


def batches_of(shape: Shape) -> list[list[Datum]]:
    """The data of all rows."""
    median, cap = LENGTHS[shape.name]
    lengths = workloads.padded_batches(BATCHES, ROWS_PER_BATCH, median=median, cap=cap)
    return [workloads.make_batch(ls, shape.vocab, seed=i) for i, ls in enumerate(lengths)]


def ragged_on_gpu(shape: Shape, settings: Settings) -> list[Result]:
    """Rows G1 and G2."""
    folder = write_model(shape, settings.models, dtype=torch.bfloat16)
    ours = Ours(folder, settings, dtype="bfloat16")
    bare = BareLoop(folder, ours.start, dtype="bfloat16", device="cuda")
    batches = batches_of(shape)
    lengths = [[len(datum.tokens) for datum in batch] for batch in batches]
    agreement = _agree(folder, ours, bare, batches[0])
    together = [datum for batch in batches for datum in batch]
    timings = measure(
        [
            Side("ours", _until_done(lambda: ours.forward_backward(together)), ours.clear),
            Side(
                "padded",
                _until_done(lambda: [bare.padded(batch) for batch in batches]),
                bare.clear,
            ),
        ],
        settings.pairs,
        warm_ups=3,
    )
    memory = {
        "ours": _peak_gib(lambda: ours.forward_backward(together), ours.clear),
        "padded": _peak_gib(lambda: [bare.padded(batch) for batch in batches], bare.clear),
    }
    tokens = sum(map(sum, lengths))
    factors = ", ".join(f"{workloads.padding_factor(ls):.2f}" for ls in lengths)
    sides = {name: middle(found) for name, found in timings.items()}
    work = f"{BATCHES} ragged batches of {ROWS_PER_BATCH}, {tokens:,} tokens, {shape.name}"
    notes = (
        f"padding factors {factors}; most GPU memory above what stays, GiB: "
        + ", ".join(f"{name} {gib:.1f}" for name, gib in memory.items())
        + "".join(f"; {k} {tokens / t.wall_s:,.0f} tokens/s" for k, t in sides.items())
    )
    results = [
        Result(
            "G2",
            f"{work} / padded loop",
            ratio(timings["ours"], timings["padded"]),
            target=RATIO_TARGET,
            sides=sides,
            agreement=agreement,
            notes=notes,
        )
    ]
    peak = peak_flops()
    for name, target in (("ours", MFU_TARGET), ("padded", None)):
        if peak is not None:
            flops = 4 * shape.matmul_parameters * tokens
            mfu = estimate(flops / peak / walls(timings[name]))
            what = f"MFU (4N) of {name}, {work}"
            results.append(
                Result(
                    "G1", what, mfu, "of peak", target, higher_is_better=True, agreement=agreement
                )
            )
    return results


def _agree(folder: Path, ours: Ours, bare: BareLoop, batch: Sequence[Datum]) -> Agreement:
    """How far we are from a float32 loop, with limits from how far the bfloat16 loop is."""
    exact_loop = BareLoop(folder, ours.start, device="cuda")
    exact = exact_loop.one_by_one(batch), exact_loop.take_gradients()
    del exact_loop
    torch.cuda.empty_cache()
    plain = compare((bare.one_by_one(batch), bare.take_gradients()), exact)
    return compare(
        (ours.forward_backward(batch), ours.take_gradients()),
        exact,
        logprobs_abs_max=BFLOAT16_FACTOR * plain.logprobs_abs,
        gradients_rel_max=BFLOAT16_FACTOR * plain.gradients_rel,
    )


def _until_done(run: Callable[[], object]) -> Callable[[], None]:
    """The same, to the end of what it started on the GPU."""

    def run_and_wait() -> None:
        run()
        torch.cuda.synchronize()

    return run_and_wait


def _peak_gib(run: Callable[[], object], clear: Callable[[], object]) -> float:
    """Most memory that a call allocates above what was allocated before it."""
    clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench_gpu", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b", help="Qwen3 of this size")
    parser.add_argument("--pairs", type=int, default=9, help="rounds of each measurement")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for results")
    parser.add_argument(
        "--models", type=Path, default=Path("build/bench-models"), help="folder for model files"
    )
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("NO GPU HERE: rows G1 to G3 need one", file=sys.stderr)
        return 1
    settings = Settings(
        models=given.models, pairs=given.pairs, micro_batch_tokens_max=MICRO_BATCH_TOKENS_MAX
    )
    values = report.machine(torch.get_num_threads(), given.pairs)
    values |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    print(report.machine_line(values), flush=True)
    shape = SHAPES[given.shape]
    results = ragged_on_gpu(shape, settings)
    torch.cuda.empty_cache()
    results += through_server(shape, settings, batches_of(shape), peak_flops(), _until_done)
    print(report.table(results))
    print(report.remarks(results))
    if peak_flops() is None:
        print("row G1 was left out: the peak of this GPU is not in PEAK_FLOPS")
    given.out.mkdir(parents=True, exist_ok=True)
    report.write_json(given.out / "bench-gpu.json", values, results)
    report.write_png(given.out / "bench-gpu.png", values, results)
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
