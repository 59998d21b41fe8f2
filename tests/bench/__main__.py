"""`python -m bench [ROW ...]`: measure rows of the benchmark table, each beside a plain baseline.

Both sides of a row run in turn, on the same data and the same adapter, and must give the same
logprobs and gradients; a row whose sides disagree FAILED, and the exit status is 1. A target that
is missed is reported, and is no failure. Sides of training share a process. Those of sampling have
processes of their own, and it is compared what both say of the same tokens.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

# As in a rank, for both sides; it is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from bench import (
    report,
    rows_compute,
    rows_crowd,
    rows_durable,
    rows_gateway,
    rows_memory,
    rows_neighbour,
    rows_recovery,
    rows_rl,
    rows_rpc,
    rows_sampling,
    rows_step,
    rows_store,
    rows_vllm,
    rows_weights,
    rows_wire,
)
from bench.configs import SHAPES
from bench.harness import Result
from bench.sides import Settings

ROWS: dict[str, Callable[[Settings], list[Result]]] = {
    "1": rows_compute.dense,
    "2": rows_compute.peer_style,
    "3": rows_compute.ragged,
    "4": rows_compute.short,
    "5": rows_compute.zero_weights,
    "9": rows_step.optim_step,
    "10": rows_memory.peak_memory,
    "loading": rows_memory.loading,
    "11": rows_rpc.rpc,
    "16": rows_durable.durable_step,
    "17": rows_sampling.equal,
    "17f": rows_sampling.with_adapter,
    "18": rows_sampling.mixed,
    "19": rows_sampling.group,
    "20": rows_weights.eight_adapters,
    "21": rows_weights.mixed_adapters,
    "22": rows_sampling.prefixes,
    "23": rows_weights.hand_over,
    "scoring": rows_sampling.scoring,
    "30": rows_rl.example,
    "30m": rows_rl.recipe,
    "gap": rows_weights.gap,
    "wire": rows_wire.wire,
    "crowd": rows_crowd.crowd,
    "gateway": rows_gateway.gateway,
    "25": rows_compute.growth,
    "27": rows_compute.experts,
    "26": rows_step.idle_models,
    "28": rows_durable.back_again,
    "29": rows_neighbour.neighbour,
    "31": rows_recovery.recovery,
    "store": rows_store.store,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all if none")
    parser.add_argument("--pairs", type=int, default=9, help="rounds of each measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for results")
    parser.add_argument(
        "--models", type=Path, default=Path("build/bench-models"), help="folder for model files"
    )
    parser.add_argument("--shape", choices=SHAPES, default="", help="instead of the rows' own")
    parser.add_argument("--zero-stage", type=int, default=Settings.zero_stage)
    parser.add_argument("--micro-batch-tokens-max", type=int)
    parser.add_argument("--base-model", type=Path, default=Settings.base_model)
    parser.add_argument("--new-tokens-max", type=int, help="of a sequence: for a quick look")
    given = vars(parser.parse_args(argv))
    rows: list[str] = given.pop("rows")
    out: Path = given.pop("out")
    every = ROWS | rows_vllm.ROWS
    for row in rows:
        if row not in every:
            parser.error(f"no row {row!r}; there are {', '.join(every)}")
    settings = Settings(**given)
    torch.set_num_threads(settings.threads)
    out.mkdir(parents=True, exist_ok=True)
    values = report.machine(settings.threads, settings.pairs)
    print(report.machine_line(values), flush=True)
    results: list[Result] = []
    broken: list[str] = []
    for row in rows or ROWS:
        print(f"row {row} ...", file=sys.stderr, flush=True)
        try:
            found = every[row](settings)
            results += found
            # A later row may take long, or never end.
            print(f"{report.table(found)}\n{report.remarks(found)}", file=sys.stderr, flush=True)
        except Exception:
            # The other rows are still worth having.
            traceback.print_exc()
            broken.append(row)
    print(report.table(results))
    print(report.remarks(results))
    report.write_json(out / "bench.json", values, results)
    report.write_png(out / "bench.png", values, results)
    print(f"wrote {out / 'bench.json'} and {out / 'bench.png'}")
    for row in broken:
        print(f"row {row} FAILED: it raised, see above")
    for result in results:
        if result.failed:
            print(f"row {result.row} FAILED: {result.what}: the sides do not agree")
    return int(bool(broken) or any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
