"""Kills processes while users' scripts train, and compares with runs that nothing disturbed.

A round starts a few scripts (`script.py`, each a process of its own that knows nothing of
failures), kills what chance chooses until they end, and compares: every value that they wrote down,
and the adapter and the optimizer state that they saved at the end, to the byte. The oracle is made
once, before anything is killed: each script alone on the cluster.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from clusters import RunningCluster, free_ports
from faults.report import Outcome, Report
from faults.users import Script, delete_models
from faults.victims import (
    ALL,
    GROUP,
    LATEST,
    RANK,
    RANK_POINTS,
    TRAINING_POINTS,
    NotBack,
    Victims,
    alive,
    wait_until,
)
from programs import environment

ONCE = os.pathsep.join(
    filter(None, [str(Path(__file__).parent / "once"), os.environ.get("PYTHONPATH", "")])
)
"""PYTHONPATH with which processes take failpoints that are meant for one of them."""
ROUND_S_MAX = 600.0
START_S_MAX = 3.0

FAILPOINT = "failpoint"
KINDS: Mapping[str, int] = {
    **{RANK: 3, GROUP: 1, "training": 3, "checkpoint": 1, "sampler": 1, ALL: 2, FAILPOINT: 5}
}


@dataclass(frozen=True)
class Plan:
    """What to do. Everything that chance decides follows from `seed`."""

    base_model: Path
    out: Path
    kills: int
    seed: int
    steps: int = 100
    scripts: int = 2
    ranks: int = 1
    batch: int = 6
    length: int = 40
    pause_s_max: float = 1.5
    """Longest time between serving again and the next kill."""
    failpoint_wait_s_max: float = 8.0
    """A failpoint that is not reached for so long is given up; counted from serving."""
    kinds: Mapping[str, int] = field(default_factory=lambda: dict(KINDS))
    """What is killed, and how often beside the others."""

    def settings(self) -> dict[str, str]:
        """Environment of the clusters: small parts, so that there is a middle to be killed in."""
        return {
            "TINSMITH_TRAINING_SNAPSHOT_STEPS": "7",
            # Kills by hand do not count.
            "TINSMITH_TRAINING_CALL_ATTEMPTS_MAX": "2",
            "TINSMITH_TRAINER_MICRO_BATCH_TOKENS_MAX": str(2 * self.length),
            "TINSMITH_TRAINER_COLLECTIVE_TIMEOUT_S": "5",
        }


class Harness:
    """Runs a plan.

    Attributes:
        report: What happened so far.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._points = self._shuffled_points()
        self._events: TextIO
        self.report = Report()

    def _shuffled_points(self) -> Iterator[str]:
        while True:
            points = [*TRAINING_POINTS, *RANK_POINTS]
            self._rng.shuffle(points)
            yield from points

    def run(self) -> Report:
        """Do it; what happens goes to `out/events.log` too.

        Raises:
            Exception: Something did not come back, or a script failed; the files in `out` say why.
        """
        plan = self._plan
        plan.out.mkdir(parents=True, exist_ok=True)
        once = plan.out / "once"
        once.mkdir()
        with ExitStack() as stack:
            self._events = stack.enter_context((plan.out / "events.log").open("w", buffering=1))
            taken = {"PYTHONPATH": ONCE, "TINSMITH_TEST_ONCE": str(once.resolve())}
            stack.enter_context(environment(**taken, **plan.settings()))
            data, port = plan.out / "cluster", free_ports()
            cluster = stack.enter_context(
                RunningCluster(plan.base_model, data, ranks=plan.ranks, port=port, keep=True)
            )
            victims = Victims(cluster, once)
            stack.callback(victims.close)
            twins = [self._undisturbed(cluster, index) for index in range(plan.scripts)]
            while self.report.kills < plan.kills:
                self._round(cluster, victims, twins)
        return self.report

    def _undisturbed(self, cluster: RunningCluster, index: int) -> Outcome:
        script = self._script(cluster, index, self._plan.out / "twin")
        script.wait(ROUND_S_MAX)
        outcome = script.outcome(cluster.addresses["checkpoint"])
        delete_models(cluster.address)
        self._say(f"undisturbed script {index}: {len(outcome.lines)} values")
        return outcome

    def _script(self, cluster: RunningCluster, index: int, folder: Path) -> Script:
        plan = self._plan
        options = ("--steps", plan.steps, "--batch", plan.batch, "--length", plan.length)
        return Script(cluster.address, cluster.base_model, index, folder, *map(str, options))

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self._events)

    # --- one round ----------------------------------------------------------------------------

    def _round(self, cluster: RunningCluster, victims: Victims, twins: Sequence[Outcome]) -> None:
        self.report.rounds += 1
        folder = self._plan.out / f"round-{self.report.rounds}"
        self._say(f"round {self.report.rounds}")
        with ExitStack() as stack:
            scripts = [self._script(cluster, index, folder) for index in range(self._plan.scripts)]
            for script in scripts:
                stack.callback(script.end)
            self._sleep(self._rng.uniform(0, START_S_MAX), scripts)
            give_up_s = time.monotonic() + ROUND_S_MAX
            while any(script.running for script in scripts):
                if time.monotonic() > give_up_s:
                    raise NotBack(f"a script did not end; see {folder}")
                if self.report.kills < self._plan.kills:
                    self._disturb(victims, scripts)
                else:
                    time.sleep(0.05)
            for script in scripts:
                script.wait(0)
        wait_until(victims.serving)
        for script, twin in zip(scripts, twins, strict=True):
            outcome = script.outcome(cluster.addresses["checkpoint"])
            self.report.compare(str(script.log), outcome, twin, self._plan.steps)
        delete_models(cluster.address)

    def _disturb(self, victims: Victims, scripts: Sequence["Script"]) -> None:
        rng = self._rng
        self._sleep(rng.uniform(0.05, self._plan.pause_s_max), scripts)
        if not any(script.running for script in scripts):
            return
        kinds = self._plan.kinds
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        if kind == FAILPOINT:
            self._failpoint(victims, scripts, next(self._points))
            return
        killed_s = time.monotonic()
        dead = victims.kill(kind, rng)
        if not dead:
            return
        self._count(kind, dead)
        if rng.random() < 0.3:  # and something else before that one is back
            time.sleep(rng.uniform(0, 4))
            kind = rng.choice([kind for kind in kinds if kind != FAILPOINT])
            again = victims.kill(kind, rng)
            if again:
                self._count(f"{kind}, during a recovery", again)
            dead += again
        self._back(victims, dead, killed_s)

    def _failpoint(self, victims: Victims, scripts: Sequence["Script"], point: str) -> None:
        at = self._rng.randint(1, LATEST[point])
        kind = victims.arm(point, at)
        # Whoever has it must start anew; that is a kill as well.
        dead = victims.kill_process(kind)
        if not dead:
            victims.disarm()
            return
        self._count("training" if kind == "training" else GROUP, dead)
        with contextlib.suppress(NotBack):
            wait_until(lambda: victims.armed_pid(kind) is not None, 20)
        pid = victims.armed_pid(kind)
        give_up_s = None
        while pid is not None and alive(pid) and any(script.running for script in scripts):
            if give_up_s is None and victims.serving():
                give_up_s = time.monotonic() + self._plan.failpoint_wait_s_max
            if give_up_s is not None and time.monotonic() > give_up_s:
                break
            time.sleep(0.1)
        killed_s = time.monotonic()
        if pid is not None and not alive(pid):
            self._count(f"at {point}", [pid])
            dead.append(pid)
        else:
            self.report.missed[point] += 1
            self._say(f"{point}@{at} was not reached")
            victims.disarm()
            dead += victims.kill_process(kind)  # so that it does not act later
        self._back(victims, dead, killed_s)

    def _count(self, kind: str, pids: Sequence[int]) -> None:
        self.report.killed[kind] += 1
        self._say(f"killed {kind} ({', '.join(map(str, pids))})")

    def _back(self, victims: Victims, dead: Sequence[int], killed_s: float) -> None:
        took_s = victims.until_back(dead) - killed_s
        self.report.recovery_s.append(took_s)
        self._say(f"all serve after {took_s:.2f} s")

    def _sleep(self, seconds: float, scripts: Sequence["Script"]) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and any(script.running for script in scripts):
            time.sleep(0.02)


@contextlib.contextmanager
def victims_of(
    base_model: Path, folder: Path, **settings: str
) -> Iterator[tuple[RunningCluster, Victims]]:
    """A cluster that starts again what dies, and its processes, which take failpoints."""
    once = folder / "once"
    once.mkdir()
    taken = {"PYTHONPATH": ONCE, "TINSMITH_TEST_ONCE": str(once.resolve())}
    with (
        environment(**taken, **settings),
        RunningCluster(base_model, folder / "cluster", port=free_ports(), keep=True) as cluster,
        contextlib.closing(Victims(cluster, once)) as victims,
    ):
        yield cluster, victims
