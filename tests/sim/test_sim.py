"""A short round of the simulator, and proof that it would find something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sim import mutations
from sim.world import simulate

SEEDS = 150
SEARCH = 800
"""A mutation must show within so many seeds; most show within a hundred."""
FIRST = {
    "answer-before-record": 36,
    "answer-unwritten": 151,
    "durable-too-early": 36,
    "everyone-blamed": 156,
    "replay-unchecked": 119,
}
"""The search begins where a mutation showed when somebody looked last; it is found all the same
when other code lets it show elsewhere."""
FOUND = sorted(
    set(mutations.MUTATIONS)
    # Their moments are rare, or (saving before its turn) none was met: `make sim` is for those.
    - {"orphans-kept", "save-before-record", "load-beside-snapshot", "stale-ranks"}
)


def test_nothing_acknowledged_is_lost_or_done_twice_under_any_of_these_seeds() -> None:
    """Every invariant after kills, zombies, lost and doubled messages, full disks and bit rot."""
    failures = [f"seed {seed}: {f}" for seed in range(SEEDS) for f in simulate(seed).failures]
    assert failures == []


@pytest.mark.parametrize("seed", [3, 17])
def test_a_seed_is_a_run_in_any_process(seed: int) -> None:
    """The same trace whatever the hashes of this process are: a failing seed can be replayed."""
    command = [sys.executable, "-W", "ignore", "-m", "sim", "--seed", str(seed), "--hash"]
    hashes = set()
    for hash_seed in ("0", "1", "12345"):
        paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
        env = {
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        hashes.add(done.stdout)
    assert len(hashes) == 1
    assert simulate(seed).trace_hash in hashes.pop()


@pytest.mark.parametrize("name", FOUND)
def test_a_bug_that_is_put_in_is_found(name: str) -> None:
    """Skipping a sync, a digest or a fence, and other mistakes, each show as a broken promise."""
    begin = FIRST.get(name, 0)
    seeds = [*range(begin, SEARCH), *range(begin)]
    assert mutations.find(name, seeds) is not None
