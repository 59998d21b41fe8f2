"""Ranks of a group that were set in another way say how, and are none."""

import json

import pytest

from tinsmithd.config import TrainerConfig
from tinsmithd.trainer.process_group import alike
from tinsmithd.trainer.process_group.heartbeat import MeetError


def config(**settings: object) -> TrainerConfig:
    return TrainerConfig(base_model="m", **settings)


def check(own: TrainerConfig, first: bytes) -> None:
    alike.check(own, 1, lambda data: first)


def first_of(of: TrainerConfig) -> bytes:
    """What rank 0 tells the others."""
    told: list[bytes] = []

    def broadcast(data: bytes | None) -> bytes:
        assert data is not None
        told.append(data)
        return data

    alike.check(of, 0, broadcast)
    return told[0]


def test_what_is_of_one_machine_may_differ() -> None:
    """Where it is, what it logs, how many threads it has."""
    there = config(node="trainer-0", nodes=2, meet_address="{first}:1", log_level="DEBUG")
    check(config(node="trainer-1", nodes=2, meet_address="{first}:1", threads=3), first_of(there))


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_tokens_max": 64},
        {"share_prefixes": False},
        {"sequence_parallel": 2},
        {"zero_stage": 3},
        {"dtype": "bfloat16"},
        {"resident_models_max": 2},
    ],
)
def test_what_a_rank_computes_may_not(settings: dict[str, object]) -> None:
    """The message names the setting, and both values."""
    ((key, value),) = settings.items()
    with pytest.raises(MeetError, match=f"{key} is {value} here and .* on rank 0"):
        check(config(**settings), first_of(config()))


def test_another_release_is_another_composer() -> None:
    """One that knows nothing of this, too, whose first word is a command."""
    said = {**alike.said_of(config()), "release": "0.0.1"}
    with pytest.raises(MeetError, match=r"release is .* here and 0\.0\.1 on rank 0"):
        check(config(), json.dumps(said).encode())
    for other in (b"", b"\x0a\x02", b"[1]", b"7"):
        with pytest.raises(MeetError, match="rank 0 is of another release"):
            check(config(), other)


def test_every_setting_is_compared_or_of_one_machine() -> None:
    """A new one is compared unless somebody says otherwise."""
    assert set(TrainerConfig.model_fields) >= alike.OF_ONE_MACHINE
    assert not alike.OF_ONE_MACHINE & set(alike.said_of(config()))
