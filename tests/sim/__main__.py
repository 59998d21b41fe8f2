"""The simulator from the command line.

    PYTHONPATH=tests python -m sim --seeds 2000
    PYTHONPATH=tests python -m sim --seed 17 --trace

Runs seeds on two processes, says what was done to the system and what was checked, and ends with
status 1 where something was wrong, or with a mutation, where nothing was found.
"""

import argparse
import contextlib
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from sim import mutations
from sim.world import Result, simulate

PROCESSES = 2
SHOWN_MAX = 10


def main() -> int:
    """Read the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: show what happened")
    parser.add_argument("--hash", action="store_true", help="with --seed: show the trace's hash")
    parser.add_argument("--mutation", choices=sorted(mutations.MUTATIONS), help="put a bug in")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    args = parser.parse_args()
    if args.seed is not None:
        return _one(args.seed, args.mutation, tracing=args.trace, show_hash=args.hash)
    seeds = range(args.first, args.first + args.seeds)
    if args.mutation:
        return _find(seeds, args.mutation)
    return _many(seeds, args.processes)


def _one(seed: int, mutation: str | None, *, tracing: bool, show_hash: bool) -> int:
    with mutations.applied(mutation):
        result = simulate(seed, tracing=tracing)
    for line in result.trace:
        print(line)
    if show_hash:
        print(result.trace_hash)
    _show(result)
    return bool(result.failures)


def _find(seeds: Iterable[int], mutation: str) -> int:
    result = mutations.find(mutation, seeds)
    if result is None:
        print(f"{mutation}: not found")
        return 1
    print(f"{mutation}: found with seed {result.seed}: {result.failures[0][:300]}")
    return 0


def _many(seeds: range, processes: int) -> int:
    start_s = time.monotonic()
    counts: Counter[str] = Counter()
    checks: Counter[str] = Counter()
    failed = 0
    for result in _results(seeds, processes):
        counts.update(result.counts)
        checks.update(result.checks)
        if result.failures:
            failed += 1
            if failed <= SHOWN_MAX:
                _show(result)
    took_s = time.monotonic() - start_s
    _table("what was done, and what came of it", counts)
    _table("what was checked", checks)
    print(f"{len(seeds)} seeds in {took_s:.0f} s, {failed} failed")
    return bool(failed)


def _results(seeds: range, processes: int) -> Iterator[Result]:
    if processes == 1:
        yield from map(simulate, seeds)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(simulate, seeds, chunksize=10)


def _show(result: Result) -> None:
    for failure in result.failures:
        print(f"seed {result.seed}: {failure[:2000]}")
    if result.failures:
        print(f"replay with: PYTHONPATH=tests python -m sim --seed {result.seed} --trace")


def _table(title: str, counts: Counter[str]) -> None:
    print(f"{title}:")
    for name, count in sorted(counts.items()):
        print(f"  {count:9,}  {name}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
