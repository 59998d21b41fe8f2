"""Which models go because nobody used them."""

import time
from collections.abc import Mapping
from typing import Any

import pytest

from tinsmithd.domain import BaseModelInfo, LoraConfig
from tinsmithd.training.journal import NoJournal
from tinsmithd.training.lane import LaneLimits
from tinsmithd.training.models import (
    CallLimits,
    Checkpoints,
    Copies,
    ModelLimits,
    Models,
    NewModel,
    SeatLimits,
    SnapshotRule,
)

TTL_S = 1000.0
REQUEST = NewModel("", LoraConfig(), None, False, {}, "", b"")


class Ranks:
    """As much of a rank group as coming and going needs."""

    info = BaseModelInfo("base", "llama", 10, 10, "float32", 1, 1)
    identity: Mapping[str, str] = {}

    async def create_model(self, model_id: str, tuning: Any) -> None:
        pass

    async def delete_model(self, model_id: str) -> None:
        pass


async def one_model() -> Models:
    lane = LaneLimits(8, 1000, 1.0, 8, 1000)
    calls = CallLimits(100, 1000, SnapshotRule(1, 1.0))
    checkpoints = Checkpoints(None, None, Copies(1))  # type: ignore[arg-type]
    limits = ModelLimits(8, TTL_S, SeatLimits(8), lane, calls)
    models = Models(limits, checkpoints, NoJournal(), None)
    models.place.attach(Ranks())  # type: ignore[arg-type]
    await models.create(REQUEST)
    return models


@pytest.mark.parametrize("jump_s", [-10 * TTL_S, 10 * TTL_S])
async def test_row_36_a_clock_that_is_set_deletes_no_model(
    monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """Row 36: the wall clock is for people; how long nobody came is counted by one nobody sets."""
    models = await one_model()
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + jump_s)
    await models.delete_idle()
    assert len(models.list()) == 1


async def test_a_model_that_nobody_used_for_its_ttl_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not a moment earlier."""
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    models = await one_model()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + TTL_S - 1)
    await models.delete_idle()
    assert len(models.list()) == 1
    monkeypatch.setattr(time, "monotonic", lambda: now_s + TTL_S + 1)
    await models.delete_idle()
    assert len(models.list()) == 0
