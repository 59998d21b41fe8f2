"""`python -m lanes`: all stages, two at once; the status is 0 where all pass.

A lane that is free takes the next stage from the queue. The first lane is shown while it runs, the
other one when all have ended. A stage that fails ends both lanes; what it said comes last.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

import programs
from lanes.report import lines_of, timings_of
from lanes.stages import BUDGETS_S, OUT, QUEUE, Stage

LANES = 2
STOP_S_MAX = 20.0
"""How long a stage may take to end when the other lane has failed."""


class Lane:
    """Runs stages, one after the other, in a thread.

    Args:
        queue: What no lane has taken yet; the first is next.
        shown: Whether to show what they say while they run.
        failed: Set when a stage of any lane fails: then no stage starts any more.

    Attributes:
        stages: Those that it took.
        took_s: Of each stage that ended, by name.
        failure: The stage that failed by itself.
    """

    def __init__(self, queue: deque[Stage], failed: threading.Event, *, shown: bool) -> None:
        self.stages: list[Stage] = []
        self.took_s: dict[str, float] = {}
        self.failure: Stage | None = None
        self._queue = queue
        self._shown = shown
        self._failed = failed
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until it ends by itself, or because any lane failed."""
        while self._thread.is_alive() and not self._failed.is_set():
            self._thread.join(0.1)

    def stop(self) -> None:
        """End what runs, and wait for it."""
        process = self._process
        for number in (signal.SIGINT, signal.SIGKILL):
            if process is not None and process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            self._thread.join(STOP_S_MAX)

    def _run(self) -> None:
        while not self._failed.is_set():
            try:
                stage = self._queue.popleft()
            except IndexError:
                return
            self.stages.append(stage)
            started_s = time.monotonic()
            status = self._stage(stage)
            self.took_s[stage.name] = time.monotonic() - started_s
            if status:
                if not self._failed.is_set():
                    self.failure = stage
                    self._failed.set()
                return
            if not self._shown:
                say(f"{stage.name} passed in {self.took_s[stage.name]:.0f} s")

    def _stage(self, stage: Stage) -> int:
        with stage.log.open("wb") as log:
            self._process = process = subprocess.Popen(
                stage.command,
                # This program's own path is not theirs.
                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            assert process.stdout is not None
            while piece := process.stdout.read1():  # type: ignore[attr-defined]
                log.write(piece)
                if self._shown:
                    sys.stdout.buffer.write(piece)
                    sys.stdout.flush()
        return process.wait()


def say(text: str) -> None:
    """A line of this program's own."""
    print(f"\n== {text}", flush=True)


def show(stage: Stage) -> None:
    """What a stage said."""
    say(f"{stage.name}: {' '.join(stage.command)}")
    sys.stdout.buffer.write(stage.log.read_bytes())
    sys.stdout.flush()


def main() -> int:
    """Run them all; returns the exit status."""
    # What a shell starts in the background ignores it, and so would the stages.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    failed = threading.Event()
    queue = deque(QUEUE)
    lanes = [Lane(queue, failed, shown=not index) for index in range(LANES)]
    started_s = time.monotonic()
    for lane in lanes:
        lane.start()
    try:
        for lane in lanes:
            lane.wait()
    finally:
        interrupted = sys.exc_info()[0] is not None
        if interrupted:
            failed.set()
        if failed.is_set():
            for lane in lanes:
                lane.stop()
    failure = next((lane.failure for lane in lanes if lane.failure), None)
    for lane in lanes[1:]:
        for stage in lane.stages:
            if stage.name in lane.took_s and stage is not failure:
                show(stage)
    report(lanes, time.monotonic() - started_s)
    if failure is not None:
        show(failure)
        say(f"{failure.name} FAILED; it says why above")
        return 1
    return 0


def report(lanes: Sequence[Lane], took_s: float) -> None:
    """Say how long what took."""
    stages = {name: seconds for lane in lanes for name, seconds in lane.took_s.items()}
    tests = {
        name: seconds
        for lane in lanes
        for stage in lane.stages
        for name, seconds in timings_of(stage.timings).items()
    }
    say(f"{took_s:.0f} s by the clock")
    print("\n".join(lines_of(stages, tests, BUDGETS_S)), flush=True)


if __name__ == "__main__":
    # One template for all stages: each would take seconds to start its own.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    programs.sharing = True
    programs.share_template()
    sys.exit(main())
