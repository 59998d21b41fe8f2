"""When ranks that live get nothing done: by a clock of the test's own, and by the real one."""

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from tinsmithd.trainer.process_group.stall import (
    FACTOR,
    Memory,
    Report,
    Reports,
    StallRule,
    StallWatch,
)

MINUTE_S = 60.0
LIMIT_S = 5 * MINUTE_S
LOOK_S = 2.0


class Group:
    """Ranks under a virtual clock, looked at every two seconds."""

    def __init__(self, size: int = 1) -> None:
        self.now_s = 0.0
        self.rule = StallRule(LIMIT_S)
        self.said: dict[int, Report] = dict.fromkeys(range(size), Report())
        self._alarms = self._watch()

    def _watch(self) -> Iterator[float | None]:
        while True:
            self.now_s += LOOK_S
            yield self.rule.too_long_s(self.now_s, self.said)

    def alarm_within(self, seconds: float) -> float | None:
        """Let time go by; returns after how long the alarm came, if it did."""
        start_s = self.now_s
        while self.now_s < start_s + seconds:
            if next(self._alarms) is not None:
                return self.now_s - start_s
        return None

    def says(self, rank: int, *, doing: str = "compute", collective: bool = False) -> None:
        """A rank got something done."""
        before = self.said[rank]
        self.said[rank] = Report(before.count + 1, before.collectives + collective, doing)


@pytest.mark.parametrize(
    "spans_s",
    [
        [10.0] * 180,
        [LIMIT_S - LOOK_S] * 7,  # each is as long as the first may be
        [60.0, 300.0, 1440.0],  # each is longer than all before
    ],
)
def test_a_call_of_thirty_minutes_is_no_alarm(spans_s: Sequence[float]) -> None:
    """Whether its micro-batches take seconds or ever longer; the other rank waits all the time."""
    group = Group(2)
    for rank in range(2):
        group.says(rank)
    group.says(1, collective=True)
    for span_s in spans_s:
        assert group.alarm_within(span_s) is None
        group.says(0)
    assert group.now_s >= 30 * MINUTE_S
    group.says(0, doing="")
    group.says(1, doing="")
    assert group.alarm_within(24 * 60 * MINUTE_S) is None  # nobody asks for anything


@pytest.mark.parametrize("longest_s", [0.0, 20.0, 100.0])
def test_ranks_that_get_nothing_done_are_an_alarm(longest_s: float) -> None:
    """After the limit, and after ten times the longest that was no alarm; whichever rank it is."""
    group = Group(2)
    group.says(0)
    assert group.alarm_within(longest_s) is None
    group.says(1, collective=True)
    found_s = group.alarm_within(60 * MINUTE_S)
    expected_s = max(LIMIT_S, FACTOR * longest_s)
    assert found_s is not None
    assert expected_s < found_s <= expected_s + FACTOR * LOOK_S + 2 * LOOK_S


def test_ranks_that_are_told_by_another_one_end_too() -> None:
    """However long they would have waited themselves."""
    group = Group(2)
    group.says(0)
    assert group.alarm_within(20.0) is None
    group.said[1] = Report(ends=True)
    assert group.alarm_within(20.0) == LOOK_S


def test_what_a_rank_says_comes_back_from_a_beat() -> None:
    """And what no rank says is taken for nothing."""
    for report in (
        Report(),
        Report(3, 4, "optim_step", memory=Memory(5, 6, 7)),
        Report(1, 2, "compute", ends=True),
    ):
        assert Report.decode(report.encode()) == report
    for text in ("", "left", "1", "1 2 0 4 5 6", "a b c d e f g", "-1 2 0 4 5 6 x"):
        assert Report.decode(text) == Report()
    assert Report.decode("1 2 0 4 5 6 a\nb").doing == "a\\nb"


Watch = Callable[..., str | None]


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Watches with a limit of 0.1 s; what is told within ten times that, or so many seconds."""
    running: list[StallWatch] = []

    def told(reports: Callable[[], Reports], seconds: float = 1) -> str | None:
        messages: list[str] = []
        came = threading.Event()

        def on_stall(message: str) -> None:
            messages.append(message)
            came.set()

        running.append(StallWatch(reports, timeout_s=0.1, on_stall=on_stall))
        running[-1].start()
        came.wait(seconds)
        return messages[0] if messages else None

    yield told
    for each in running:
        each.close()


def test_the_watch_says_what_each_rank_is_at(watch: Watch) -> None:
    """Only where one has a command; a rank that counts is no alarm."""
    stuck = {0: Report(7, 3, "compute"), 1: Report(9, 4, "")}
    message = watch(lambda: stuck, 60)
    assert message is not None
    assert message.startswith("nothing was done for 0 s (rank 0: compute, 3 collectives; rank 1: ")
    counts = iter(range(1_000_000))
    assert watch(lambda: {0: Report(next(counts), 0, "compute")}) is None
    assert watch(lambda: {0: Report(1, 0, "")}) is None
