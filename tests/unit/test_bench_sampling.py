"""What the sampling rows are made of: lengths, the process beside, and who pays how much."""

import itertools
import os
from collections.abc import Sequence

import pytest

from bench import sampling_workloads as workloads
from bench.remote import Remote
from bench.rows_rl import Work
from bench.rows_sampling import cut
from bench.sampling_workloads import Call


def test_sampling_asks_for_what_the_rows_say() -> None:
    """Lengths and counts of the table, and no prompt that two rounds share."""
    lengths = sorted(call.new_tokens for call in workloads.mixed())
    assert lengths == list(range(8, 257, 8))
    (group,) = workloads.group()
    assert (len(group.prompt), group.num_samples, group.new_tokens) == (1024, 16, 64)
    turns = workloads.chat()
    assert len(turns) == 8
    for turn, following in itertools.pairwise(turns):
        assert following.prompt[: len(turn.prompt)] == turn.prompt
    rollouts = workloads.rollouts()
    assert len(rollouts) == 128
    assert len({tuple(call.prompt) for call in rollouts}) == 16
    rounds = [*workloads.equal(16), *workloads.equal(16, seed=1)]
    assert len({tuple(call.prompt) for call in rounds}) == 32
    assert workloads.made_tokens(rounds) == 2048


def test_calls_are_cut_only_where_somebody_asks_for_it() -> None:
    calls = [Call([1], 8), Call([1], 2)]
    assert [call.new_tokens for call in cut(calls, 4)] == [4, 2]
    assert cut(calls, None) == calls


def test_an_object_in_another_process_keeps_its_state_and_its_cpu_time() -> None:
    """Answers are told from what it prints; an error there ends the call here."""
    with Remote("unit.remote_counter:Counter", 40) as remote:
        before_s = remote.cpu_clock()
        assert remote.call("add", 1)[0] == 41
        value, pid = remote.call("add", 1)
        assert (value, pid != os.getpid()) == (42, True)
        assert remote.cpu_clock() > before_s > 0
        with pytest.raises(EOFError):
            remote.call("add", "one")


def test_a_rollout_is_paid_beside_its_group() -> None:
    """Advantages are rewards less the group's mean; groups are told by their prompts."""

    def reward(tokens: Sequence[int]) -> float:
        return float(sum(tokens))

    work = Work([Call([1]), Call([1]), Call([2]), Call([2])], 2, reward, scored=False)
    assert work.prompts == [[1], [2]]
    assert work.advantages([[1], [3], [5, 5], [0]]) == [-1, 1, 5, -5]
