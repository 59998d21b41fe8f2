"""One ordered lane per model: numbers in, effects in order, one at a time per lane.

A lane admits calls by `seq_id`: the next number becomes ready, later ones are parked until the
numbers before them arrived. Each lane runs its ready calls one after the other. Lanes share the
trainer by `Turns`: a call takes one turn, or one for each of its parts, so that a lane with a long
queue or large calls delays another by one part at most.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tinsmithd.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    NotFound,
    Reason,
    ResourceExhausted,
    TinsmithError,
    Unavailable,
)
from tinsmithd.training.journal import Answer, Journal
from tinsmithd.training.trainer import ModelBroken, TrainerLost
from tinsmithd.training.turns import Turns

_log = logging.getLogger(__name__)

Emit = Callable[[Any], None]
"""Takes the next part of an answer."""

TakeTurn = Callable[[int], contextlib.AbstractAsyncContextManager[None]]
"""A turn at the trainer that costs so many tokens; entering raises when the lane was closed."""

Run = Callable[[Emit, TakeTurn], Awaitable[Any]]
"""Applies a call, using the trainer only in turns that it takes; returns the answer's value."""


@dataclass(frozen=True)
class LaneLimits:
    """Bounds of one lane; the names are those of the settings."""

    lane_calls_max: int
    lane_bytes_max: int
    gap_wait_s_max: float
    answers_kept_max: int
    answer_bytes_kept_max: int


@dataclass
class Call:
    """A call as the lane sees it. `refusal` is set when it was found invalid: it only counts."""

    digest: bytes
    nbytes: int
    run: Run
    refusal: TinsmithError | None = None


@dataclass
class _Entry:
    seq_id: int
    call: Call
    answer: Answer = field(default_factory=Answer)
    gap_timer: asyncio.TimerHandle | None = None


class Lane:
    """The ordered calls of one model."""

    def __init__(self, name: str, limits: LaneLimits, turns: Turns) -> None:
        self._name = name
        self._limits = limits
        self._turns = turns
        self._journal = Journal(limits.answers_kept_max, limits.answer_bytes_kept_max)
        self._parked: dict[int, _Entry] = {}
        self._ready: deque[_Entry] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._closed: TinsmithError | None = None

    @property
    def next_seq_id(self) -> int:
        """The number that the next new call should carry."""
        return self._journal.next_seq_id

    @property
    def lost(self) -> bool:
        """True when the model's state is gone."""
        return isinstance(self._closed, DataLoss)

    @property
    def idle(self) -> bool:
        """True when nothing waits and nothing runs."""
        return self._runner is None and not self._parked

    def submit(self, seq_id: int, call: Call) -> Answer:
        """Take a call in; its answer comes when its turn came.

        Raises:
            AlreadyExists, FailedPrecondition: See `Journal.find`.
            ResourceExhausted: The lane is full (QUEUE_FULL); the number is unused.
            DataLoss, NotFound: The model is lost or deleted.
        """
        if seq_id:
            answer = self._journal.find(seq_id, call.digest)
            if answer is not None:
                return answer
        if self._closed is not None:
            raise self._closed
        self._check_room(seq_id, call)
        entry = _Entry(seq_id, call)
        if call.refusal is not None:
            entry.answer.fail(call.refusal)
        if not seq_id:
            self._ready.append(entry)
        else:
            self._journal.record(seq_id, call.digest, entry.answer)
            self._park(entry)
            self._admit()
        self._start()
        return entry.answer

    def _check_room(self, seq_id: int, call: Call) -> None:
        # The call that the parked ones wait for must always get in, or they would wait for ever.
        waiting = list(self._ready)
        if seq_id != self._journal.next_seq_id:
            waiting += self._parked.values()
        nbytes = call.nbytes + sum(entry.call.nbytes for entry in waiting)
        for limit, value, most in (
            ("lane_calls_max", len(waiting) + 1, self._limits.lane_calls_max),
            ("lane_bytes_max", nbytes, self._limits.lane_bytes_max),
        ):
            if value > most:
                raise ResourceExhausted(
                    f"too much waits for this model: {limit} is {most}",
                    Reason.QUEUE_FULL,
                    retry_after_s=1.0,
                    metadata={"limit": limit, "value": str(value)},
                )

    def _park(self, entry: _Entry) -> None:
        self._parked[entry.seq_id] = entry
        if entry.seq_id != self._journal.next_seq_id:
            loop = asyncio.get_running_loop()
            entry.gap_timer = loop.call_later(self._limits.gap_wait_s_max, self._gap, entry)

    def _gap(self, entry: _Entry) -> None:
        del self._parked[entry.seq_id]
        self._journal.forget(entry.seq_id)
        if entry.answer.done:
            return
        entry.answer.fail(
            FailedPrecondition(
                f"seq_id {self._journal.next_seq_id} did not arrive within "
                f"{self._limits.gap_wait_s_max:g} s; {entry.seq_id} is unused",
                Reason.SEQ_ID_GAP,
                metadata={
                    "seq_id": str(entry.seq_id),
                    "next_seq_id": str(self._journal.next_seq_id),
                },
            )
        )

    def _admit(self) -> None:
        while (entry := self._parked.pop(self._journal.next_seq_id, None)) is not None:
            if entry.gap_timer is not None:
                entry.gap_timer.cancel()
            self._journal.next_seq_id += 1
            self._ready.append(entry)

    def _start(self) -> None:
        if self._ready and self._runner is None:
            self._runner = asyncio.create_task(self._run(), name=f"lane {self._name}")

    async def _run(self) -> None:
        try:
            while self._ready:
                entry = self._ready.popleft()
                if not entry.answer.done:
                    await self._apply(entry)
                self._journal.trim()
        finally:
            self._runner = None

    @contextlib.asynccontextmanager
    async def _turn(self, tokens: int) -> AsyncIterator[None]:
        async with self._turns.take(self._name, tokens):
            # While it waited the model may have been deleted, or lost with its trainer.
            if self._closed is not None:
                raise self._closed
            yield

    async def _apply(self, entry: _Entry) -> None:
        try:
            value = await entry.call.run(entry.answer.add, self._turn)
        except (Unavailable, ResourceExhausted) as error:
            self._take_back(entry)
            entry.answer.fail(error)
        except TinsmithError as error:
            entry.answer.fail(error)
        except (TrainerLost, ModelBroken) as error:
            _log.error("model %s is lost: %s", self._name, error)
            lost = model_lost(self._name)
            self.close(lost)
            entry.answer.fail(lost)
        except Exception:
            _log.exception("a call of model %s failed", self._name)
            entry.answer.fail(Internal())
        else:
            entry.answer.finish(value)

    def _take_back(self, entry: _Entry) -> None:
        # Nothing happened and the number is free again: what came after has to wait for it again.
        if not entry.seq_id:
            return
        self._journal.forget(entry.seq_id)
        self._journal.next_seq_id = entry.seq_id
        later = [e for e in self._ready if e.seq_id]
        self._ready = deque(e for e in self._ready if not e.seq_id)
        for waiting in later:
            self._park(waiting)

    def close(self, error: TinsmithError) -> None:
        """Fail all that waits and all that comes with `error`; kept answers stay."""
        self._closed = error
        waiting = [*self._ready, *self._parked.values()]
        self._ready.clear()
        self._parked.clear()
        for entry in waiting:
            if entry.gap_timer is not None:
                entry.gap_timer.cancel()
            if not entry.answer.done:
                entry.answer.fail(error)

    def forget(self) -> None:
        """Drop the kept answers: the model is deleted."""
        self._journal.clear()


def model_lost(model_id: str) -> DataLoss:
    """The error of a model whose trainer is gone."""
    return DataLoss(
        f"the trainer that held model {model_id} is gone; create it again from a checkpoint",
        Reason.MODEL_LOST,
        metadata={"model_id": model_id},
    )


def model_not_found(model_id: str) -> NotFound:
    """The error of an id that names no model."""
    return NotFound(f"no model {model_id!r}", Reason.MODEL_NOT_FOUND)
