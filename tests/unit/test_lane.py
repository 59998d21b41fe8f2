"""The ordered lane of one model: every rule about numbers, repeats and gaps."""

import asyncio
from collections.abc import Sequence

import pytest

from tinsmithd.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    Reason,
    ResourceExhausted,
    TinsmithError,
    Unavailable,
)
from tinsmithd.training.call import Answer, Call, ComputeWork, RefusedWork, Work, model_not_found
from tinsmithd.training.journal import NoJournal
from tinsmithd.training.lane import Effect, Lane, LaneContext, LaneLimits, TakeTurn, Turns
from tinsmithd.training.lane.kept_answers import KeptAnswers
from tinsmithd.training.ranks import OnOutput, RankGroupLost
from waiting import until

LIMITS = LaneLimits(8, 1000, gap_wait_s_max=30, answers_kept_max=4, answer_bytes_kept_max=1000)


class Recorder:
    """The executor of a lane whose calls write down when they took effect."""

    def __init__(self, limits: LaneLimits = LIMITS) -> None:
        self.applied: list[str] = []
        self.moves: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.errors: dict[str, Exception] = {}
        self.lane = Lane(LaneContext("model", limits, NoJournal(), self), Turns())

    def check_room(self, nbytes: int) -> None:
        pass

    def wrote(self, position: int, nbytes: int) -> None:
        pass

    def forgot(self, positions: Sequence[int]) -> None:
        pass

    async def forget(self) -> None:
        pass

    async def execute(
        self, position: int, seq_id: int, work: Work, on_output: OnOutput, turn: TakeTurn
    ) -> Effect:
        assert isinstance(work, ComputeWork)
        name = work.loss.decode()
        async with turn(1):
            await self.gate.wait()
            if name in self.errors:
                raise self.errors.pop(name)
            self.applied.append(name)
            on_output(f"output of {name}".encode())
        return Effect({"name": name})

    async def restore(self, turn: TakeTurn) -> None:
        self.moves.append("back")

    def left(self) -> None:
        self.moves.append("on disk")

    async def rest(self, turn: TakeTurn) -> None:
        async with turn(1):
            self.moves.append("rest")

    async def settled(self, position: int, work: Work, turn: TakeTurn) -> None:
        pass

    def submit(
        self, seq_id: int, name: str, *, error: Exception | None = None, nbytes: int = 1
    ) -> Answer:
        if error is not None:
            self.errors[name] = error
        work = ComputeWork(name.encode(), [], [], backward=False)
        return self.lane.submit(Call(seq_id, name.encode(), work, nbytes))


async def name_of(answer: Answer) -> str:
    return str((await answer.value())["name"])


async def test_calls_take_effect_in_the_order_of_their_numbers() -> None:
    """Numbers decide, not arrival."""
    r = Recorder()
    answers = [r.submit(n, str(n)) for n in (3, 1, 4, 2)]
    assert [await name_of(a) for a in answers] == ["3", "1", "4", "2"]
    assert r.applied == ["1", "2", "3", "4"]


async def test_a_repeat_gets_the_first_answer_and_has_no_effect() -> None:
    """The same number with the same content is the same call, before and after it ended."""
    r = Recorder()
    first, early = r.submit(1, "a"), r.submit(1, "a")
    await first.value()
    late = r.submit(1, "a")
    assert first is early is late
    assert r.applied == ["a"]
    assert [output async for output in late.outputs()] == [b"output of a"]


async def test_other_content_under_a_used_number_is_refused() -> None:
    """It must neither run nor be answered with another call's answer."""
    r = Recorder()
    await r.submit(1, "a").value()
    with pytest.raises(AlreadyExists) as refusal:
        r.submit(1, "b")
    assert refusal.value.reason is Reason.SEQ_ID_CONFLICT
    assert r.applied == ["a"]


async def test_an_old_answer_expires_and_says_so() -> None:
    """Only `answers_kept_max` answers are kept."""
    r = Recorder()
    for n in range(1, 7):
        await r.submit(n, str(n)).value()
    with pytest.raises(FailedPrecondition) as refusal:
        r.submit(1, "1")
    assert refusal.value.reason is Reason.ANSWER_EXPIRED
    assert r.submit(3, "3").done
    assert r.applied == list("123456")


async def test_kept_answers_are_bounded_in_bytes() -> None:
    """The newest stays whatever its size; older ones go while the sum is too large."""
    answers = KeptAnswers(kept_max=10, bytes_kept_max=100)
    for seq_id in range(1, 5):
        answer = Answer()
        answer.add(bytes(40))
        answer.finish({})
        answers.add(seq_id, b"", answer)
        assert answers.recorded(seq_id, position=seq_id) == max(0, seq_id - 2)
    assert answers.find(4, b"", 5) is not None
    assert answers.find(3, b"", 5) is not None
    for seq_id in (1, 2):
        with pytest.raises(FailedPrecondition):
            answers.find(seq_id, b"", 5)


async def test_numbers_of_before_a_restored_back_up_are_told_from_those_that_were_used() -> None:
    """What the back-up has is answered; what it lacks may have been answered by who was lost. A
    model that was created since then counts from 1, as any."""
    first = 1 << 40
    answers = KeptAnswers(kept_max=1, bytes_kept_max=100, restored_at=first)
    for seq_id in (7, first + 1, first + 2):
        answer = Answer()
        answer.finish({})
        answers.add(seq_id, b"", answer)
    assert answers.find(7, b"", first + 3) is not None
    answers.recorded(7, position=7)
    answers.recorded(first + 1, position=8)  # which drops the one before
    for seq_id, next_seq_id, reason in (
        (7, first + 3, Reason.MODEL_RESTORED),
        (8, first + 3, Reason.MODEL_RESTORED),
        (first, first + 3, Reason.MODEL_RESTORED),
        (3, 9, Reason.ANSWER_EXPIRED),
    ):
        with pytest.raises(FailedPrecondition) as refusal:
            answers.find(seq_id, b"", next_seq_id)
        assert refusal.value.reason is reason
    assert answers.find(first + 3, b"", first + 3) is None


async def test_a_gap_fails_in_time_and_leaves_the_number_free() -> None:
    """What waits for a missing number fails, and can be sent again."""
    r = Recorder(LaneLimits(8, 1000, 0.05, 4, 1000))
    answer = r.submit(2, "b")
    with pytest.raises(FailedPrecondition) as refusal:
        await answer.value()
    assert refusal.value.reason is Reason.SEQ_ID_GAP
    assert refusal.value.metadata == {"seq_id": "2", "next_seq_id": "1"}
    answers = [r.submit(2, "b"), r.submit(1, "a")]
    assert [await name_of(a) for a in answers] == ["b", "a"]
    assert r.applied == ["a", "b"]


async def test_a_refused_call_uses_up_its_number() -> None:
    """The next call runs, and a repeat of the refused one is refused again."""
    r = Recorder()
    error = InvalidArgument("data", "is bad")
    for _ in range(2):
        answer = r.lane.submit(Call(1, b"bad", RefusedWork(error)))
        with pytest.raises(InvalidArgument):
            await answer.value()
    assert await name_of(r.submit(2, "good")) == "good"
    assert r.applied == ["good"]


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("later", Reason.CHECKPOINT_UNAVAILABLE),
        ResourceExhausted("later", Reason.OUT_OF_MEMORY),
    ],
)
async def test_unavailable_gives_the_number_back(error: TinsmithError) -> None:
    """Calls behind it wait until the same number is sent again, and order holds."""
    r = Recorder()
    first = r.submit(1, "a", error=error)
    second = r.submit(2, "b")
    with pytest.raises(type(error)):
        await first.value()
    assert not second.done
    assert r.lane.next_seq_id == 1
    again = r.submit(1, "a")
    assert [await name_of(again), await name_of(second)] == ["a", "b"]
    assert r.applied == ["a", "b"]


async def test_an_unexpected_failure_is_internal_and_uses_up_its_number() -> None:
    """Nothing of the cause reaches the caller."""
    r = Recorder()
    with pytest.raises(TinsmithError) as failure:
        await r.submit(1, "a", error=RuntimeError("secret")).value()
    assert failure.value.reason is Reason.INTERNAL
    assert "secret" not in failure.value.message
    assert await name_of(r.submit(2, "b")) == "b"


async def test_number_zero_runs_after_what_is_queued_and_is_no_repeat() -> None:
    """seq_id 0 means now."""
    r = Recorder()
    r.gate.clear()
    answers = [r.submit(1, "a"), r.submit(0, "x"), r.submit(0, "x"), r.submit(2, "b")]
    r.gate.set()
    assert [await name_of(a) for a in answers] == ["a", "x", "x", "b"]
    assert r.applied == ["a", "x", "x", "b"]


async def test_a_full_lane_refuses_but_never_the_missing_number() -> None:
    """The call that the others wait for always gets in."""
    r = Recorder()
    answers = [r.submit(n, str(n)) for n in range(2, 10)]
    with pytest.raises(ResourceExhausted) as refusal:
        r.submit(10, "10")
    assert refusal.value.reason is Reason.QUEUE_FULL
    assert refusal.value.retry_after_s
    answers.append(r.submit(1, "1"))
    for answer in answers:
        await answer.value()
    assert r.applied == [str(n) for n in range(1, 10)]
    assert await name_of(r.submit(10, "10")) == "10"


async def test_waiting_bytes_are_bounded() -> None:
    """`lane_bytes_max` counts what waits."""
    r = Recorder()
    r.submit(2, "b", nbytes=600)
    with pytest.raises(ResourceExhausted):
        r.submit(3, "c", nbytes=600)


async def test_a_lost_rank_group_fails_what_waits_and_what_comes() -> None:
    """The model's state is gone: every later call says DATA_LOSS, kept answers stay."""
    r = Recorder()
    await r.submit(1, "a").value()
    answers = [r.submit(2, "b", error=RankGroupLost("gone")), r.submit(3, "c")]
    for answer in answers:
        with pytest.raises(DataLoss):
            await answer.value()
    with pytest.raises(DataLoss):
        r.submit(4, "d")
    assert r.lane.lost
    assert await name_of(r.submit(1, "a")) == "a"


async def test_deleting_fails_what_waits() -> None:
    """Queued calls of a deleted model are not found."""
    r = Recorder()
    r.gate.clear()
    running, waiting = r.submit(1, "a"), r.submit(2, "b")
    await asyncio.sleep(0)
    r.lane.close(model_not_found("model"))
    r.gate.set()
    with pytest.raises(TinsmithError) as refusal:
        await waiting.value()
    assert refusal.value.reason is Reason.MODEL_NOT_FOUND
    await asyncio.wait_for(asyncio.gather(running.value(), return_exceptions=True), 5)


async def test_a_model_that_nobody_waits_for_stays_on_disk_when_its_ranks_are_gone() -> None:
    """Others come back first; it does with its next call, and one that is called at once."""
    idle, called = Recorder(), Recorder()
    for recorder in (idle, called):
        await recorder.submit(1, "a").value()
    waiting = called.submit(2, "b")
    for recorder in (idle, called):
        recorder.lane.lose_ranks()
    assert await name_of(waiting) == "b"
    await idle.lane.ended()
    assert (idle.moves, called.moves) == (["on disk"], ["back"])
    assert idle.lane.suspended
    assert not idle.lane.recovering
    idle.lane.lose_ranks()  # the next ones, too
    assert await name_of(idle.submit(2, "b")) == "b"
    assert idle.moves == ["on disk", "back"]


async def test_a_model_without_calls_rests_once() -> None:
    """`snapshot_idle_s` after its last call, unless it is not at the ranks then."""
    limits = LaneLimits(8, 1000, 30, 4, 1000, snapshot_idle_s=0.5)
    there, gone = Recorder(limits), Recorder(limits)
    await asyncio.gather(*(gone.submit(n, str(n)).value() for n in (1, 2)))
    gone.lane.lose_ranks()
    await asyncio.gather(*(there.submit(n, str(n)).value() for n in (1, 2)))
    await until(lambda: there.moves)
    for recorder in (there, gone):
        await recorder.lane.ended()
    assert (there.moves, gone.moves) == (["rest"], ["on disk"])
    assert there.lane.idle


class _Shared(Recorder):
    """Writes down whose batch runs; a call's `loss` says how many batches and tokens it has."""

    def __init__(self, name: str, turns: Turns, order: list[str]) -> None:
        self._name, self._order = name, order
        self.lane = Lane(LaneContext(name, LIMITS, NoJournal(), self), turns)

    async def execute(
        self, position: int, seq_id: int, work: Work, on_output: OnOutput, turn: TakeTurn
    ) -> Effect:
        assert isinstance(work, ComputeWork)
        batches, tokens = map(int, work.loss.split())
        for index in range(batches):
            async with turn(tokens):
                self._order.append(self._name)
                on_output(bytes([index]))
                await asyncio.sleep(0)
        return Effect()


class Lanes:
    """Lanes that share the ranks, and the order in which their calls' batches ran."""

    def __init__(self, *names: str) -> None:
        self.order: list[str] = []
        turns = Turns()
        self.lanes = {name: _Shared(name, turns, self.order).lane for name in names}

    def submit(self, name: str, seq_id: int, batches: int, tokens: int = 1) -> Answer:
        work = ComputeWork(f"{batches} {tokens}".encode(), [], [], backward=False)
        return self.lanes[name].submit(Call(seq_id, f"{name} {seq_id}".encode(), work, 1))


async def test_a_long_queue_delays_another_lane_by_one_call() -> None:
    """Not by its length."""
    lanes = Lanes("heavy", "light")
    answers = [lanes.submit("heavy", n, batches=1) for n in range(1, 7)]
    answers.append(lanes.submit("light", 1, batches=1))
    for answer in answers:
        await answer.value()
    assert lanes.order.index("light") <= 1


async def test_a_large_call_delays_another_lane_by_one_batch() -> None:
    """Its other batches come afterwards, and its answer is whole."""
    lanes = Lanes("heavy", "light")
    large = lanes.submit("heavy", 1, batches=5, tokens=100)
    while not lanes.order:
        await asyncio.sleep(0)
    await lanes.submit("light", 1, batches=1).value()
    assert lanes.order[:2] == ["heavy", "light"]
    assert [output async for output in large.outputs()] == [bytes([n]) for n in range(5)]
    assert lanes.order == ["heavy", "light", *["heavy"] * 4]


async def test_many_small_calls_get_as_many_tokens_as_few_large_ones() -> None:
    """A lane that has more to do keeps its place when one of its calls ends."""
    lanes = Lanes("large", "small")
    answers = [lanes.submit("large", n, batches=1, tokens=10) for n in (1, 2)]
    answers += [lanes.submit("small", n, batches=1, tokens=4) for n in range(1, 6)]
    for answer in answers:
        await answer.value()
    assert lanes.order == [
        *("small", "large", "small", "small"),  # 12 against 10
        *("large", "small", "small"),
    ]


async def test_a_model_deleted_between_batches_runs_no_further() -> None:
    """The call fails as not found, and the turns go on."""
    lanes = Lanes("deleted", "other")
    answer = lanes.submit("deleted", 1, batches=5)
    while len(lanes.order) < 2:
        await asyncio.sleep(0)
    lanes.lanes["deleted"].close(model_not_found("deleted"))
    with pytest.raises(TinsmithError) as refusal:
        await answer.value()
    assert refusal.value.reason is Reason.MODEL_NOT_FOUND
    await lanes.submit("other", 1, batches=2).value()
    assert lanes.order == ["deleted", "deleted", "other", "other"]
