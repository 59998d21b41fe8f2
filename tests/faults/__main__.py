"""Kills a cluster's processes again and again while users train: `make faults KILLS=100`.

Exit status 1 when a step was lost, was done twice, or any value or file differs from an undisturbed
run; everything that was written is in --out.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

# As `conftest.py`: numbers must not depend on how many threads there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from faults.harness import KINDS, Harness, Plan
from tiny_models import write_tiny_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100, help="of each script in each round")
    parser.add_argument("--scripts", type=int, default=2, help="users at once")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=None, help="unset draws one and says it")
    parser.add_argument("--out", type=Path, default=None, help="empty folder for files")
    parser.add_argument("--real", type=Path, default=None, help="base model in place of a tiny one")
    parser.add_argument("--batch", type=int, default=6, help="data in a call")
    parser.add_argument("--length", type=int, default=40, help="most tokens of a datum")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=[], help="what is killed")
    parser.add_argument(
        "--pause", dest="pause_s_max", type=float, default=1.5, help="most seconds between kills"
    )
    given = vars(parser.parse_args())
    out, seed, real, only = (given.pop(name) for name in ("out", "seed", "real", "only"))
    if out is not None and out.exists() and any(out.iterdir()):
        parser.error(f"--out {out} is not empty")
    seed = random.randrange(10**6) if seed is None else seed
    out = out or Path(tempfile.mkdtemp(prefix="tinsmith-faults-"))
    print(f"seed {seed}, {given['kills']} kills, files in {out}", flush=True)
    base_model = real or write_tiny_model(out / "tiny-llama")
    kinds = {kind: KINDS[kind] for kind in only or KINDS}
    harness = Harness(Plan(base_model=base_model, out=out, seed=seed, kinds=kinds, **given))
    began_s = time.monotonic()
    try:
        report = harness.run()
    finally:
        harness.report.print()
        print(f"{'seconds':<44}{time.monotonic() - began_s:>10.0f}")
    sys.exit(1 if report.differences or report.lost or report.twice else 0)


if __name__ == "__main__":
    main()
