"""What a rank group says of its memory and work is bounded; how long it is silent is seen."""

import asyncio
from typing import Any

import pytest

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd.domain import BaseModelInfo, LoraConfig
from tinsmithd.errors import InvalidArgument
from tinsmithd.sizes import Work
from tinsmithd.training.ranks import RankMemory
from tinsmithd.training.ranks.claims import COUNT_MAX, MEMORIES_MAX, GroupClaim, memory_of
from tinsmithd.training.ranks.rank_group import AttachedRankGroup

INFO = BaseModelInfo("tiny", "Llama", 300, 64, "float32", 1, 1)


def alive(*memories: dict[str, Any]) -> pb.Alive:
    return pb.Alive(memory=[pb.RankMemory(**each) for each in memories])


def test_memory_is_by_rank() -> None:
    said = alive({"rank": 0, "resident_bytes": 7}, {"rank": 1, "device_bytes": 3})
    assert memory_of(said, 2) == {0: RankMemory(7, 0, 0), 1: RankMemory(0, 3, 0)}


@pytest.mark.parametrize(
    "memories",
    [
        [{"rank": 2}],
        [{"rank": -1}],
        [{"rank": 1}, {"rank": 1}],
        [{"rank": 0, "resident_bytes": -1}],
        [{"rank": 0, "device_size_bytes": COUNT_MAX + 1}],
        [{"rank": rank % 2} for rank in range(MEMORIES_MAX + 1)],
    ],
)
def test_what_no_group_has_is_refused(memories: list[dict[str, Any]]) -> None:
    """A series each: nobody makes up more ranks than there are."""
    with pytest.raises(InvalidArgument, match=r"^alive.memory"):
        memory_of(alive(*memories), 2)


def hello(**fields: Any) -> pb.Hello:
    from tinsmithd.convert import types as convert

    return pb.Hello(
        base_model=convert.base_model_to_pb(INFO), world_size=2, engine="reference", **fields
    )


def test_work_is_bounded() -> None:
    assert GroupClaim.of(hello(token_weights=5, attention_width=3)).work == Work(5, 3)
    assert GroupClaim.of(hello()).work == Work()
    for fields in ({"token_weights": -1}, {"attention_width": COUNT_MAX + 1}):
        with pytest.raises(InvalidArgument, match=f"^hello.{next(iter(fields))}"):
            GroupClaim.of(hello(**fields))


async def test_silence_and_the_oldest_command_are_seen() -> None:
    """By a clock of the test; a group that has finished has no command."""
    now_s = 10.0
    group = AttachedRankGroup(GroupClaim.of(hello()), lambda: now_s)
    now_s = 12.0
    assert (group.vitals.silence_s, group.vitals.command_s) == (2.0, 0.0)
    creating = asyncio.create_task(group.create_model("m", LoraConfig()))
    command = await anext(group.commands())
    now_s = 15.0
    group.answered(pb.AttachRequest(alive=alive({"rank": 1, "resident_bytes": 9})))
    vitals = group.vitals
    assert (vitals.silence_s, vitals.command_s) == (0.0, 3.0)
    assert vitals.memory == {1: RankMemory(9, 0, 0)}
    group.answered(pb.AttachRequest(command_id=command.command_id, done=pb.Done()))
    await creating
    assert group.vitals.command_s == 0.0
    with pytest.raises(InvalidArgument):
        group.answered(pb.AttachRequest(alive=alive({"rank": 2})))
