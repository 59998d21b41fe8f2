"""Row "gateway": what the stock SDK and the gateway add to a step, and what waiting costs.

The SDK is in an environment of its own; `make bench` installs it in `build/sdk`.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import programs
from bench.clocks import cpu_clock
from bench.harness import Agreement, Estimate, Result, Timing, estimate
from bench.remote import Remote
from bench.sides import Settings
from clusters import RunningCluster
from gateways import RunningGateway, running_gateway
from tiny_models import write_tiny_model

SDK_PYTHON = Path(os.environ.get("SDK_VENV", "build/sdk/0.38.0")) / "bin" / "python"
PROGRAM = Path(__file__).with_name("step_program.py")
DATA, TOKENS = 8, 128
ROUNDS_PER_PAIR = 10
WARM_UPS = 5
STEP_TARGET_MS = 8.0
FUTURES = 2000
BEATS = 500
BEAT_PAUSE_S = 0.01
BEAT_TARGET_MS = 10.0
IDLE_S = 5.0
POLL_S = 40.0
"""As long as may be: no caller has to ask again while what waiting costs is measured."""
CPU_TARGET_PERCENT = 2.0
SETTLE_S = 1.0


class Program:
    """A process that runs `step_program`; a context manager that ends it.

    Args:
        command: The interpreter, and what stands before the program.
        env: Its whole environment.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        arguments = ["tiny-llama", str(DATA), str(TOKENS)]
        self._process = subprocess.Popen(
            [*command, str(PROGRAM), *arguments],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> Mapping[str, Any]:
        """Make a step.

        Raises:
            RuntimeError: The program ended; standard error has why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with {self._process.wait()}")
        found: Mapping[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def gateway(settings: Settings) -> list[Result]:
    """The same program by the stock SDK and by this client, on one cluster; then 2,000 callers
    whose results do not come."""
    if not SDK_PYTHON.exists():
        raise FileNotFoundError(f"no {SDK_PYTHON}: `make bench ROWS=gateway` installs it")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_tiny_model(folder / "tiny-llama", context_length=2 * TOKENS)
        with (
            RunningCluster(model, folder / "cluster") as running,
            running_gateway(running.address, folder / "gateway", poll_s_max=POLL_S) as gate,
        ):
            return [*_steps(running, gate, folder, settings), *_waiting(gate)]


@contextlib.contextmanager
def _sides(running: RunningCluster, gate: RunningGateway, home: Path) -> Iterator[list[Program]]:
    """The stock SDK on the gateway, this client, and the SDK where nothing is computed."""
    sdk = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONWARNINGS": "ignore",
        "TINKER_API_KEY": "tml-bench",
    }
    own = programs.variables(TINSMITH_ADDRESS=running.address)
    with contextlib.ExitStack() as stack:
        empty = stack.enter_context(Remote("bench.empty_server:EmptyServer", DATA, TOKENS))
        urls = (gate.url, f"http://127.0.0.1:{empty.call('port')}")
        programs_of_sdk = [
            stack.enter_context(Program([str(SDK_PYTHON), "-P"], sdk | {"TINKER_BASE_URL": url}))
            for url in urls
        ]
        client = Program([sys.executable, "-P", "-m", "tinsmith.tinker"], own)
        yield [programs_of_sdk[0], stack.enter_context(client), programs_of_sdk[1]]


def _steps(
    running: RunningCluster, gate: RunningGateway, home: Path, settings: Settings
) -> list[Result]:
    walls, cpus, apart = [], [], []
    with _sides(running, gate, home) as sides:
        for number in range(-WARM_UPS, settings.pairs * ROUNDS_PER_PAIR):
            found = {side: sides[side].step() for side in ((0, 1, 2), (2, 1, 0))[number % 2]}
            sdk, client = found[0]["logprobs"], found[1]["logprobs"]
            apart.append(np.abs(np.subtract(sdk, client)).max())
            if number >= 0:
                walls.append([found[side]["wall_s"] for side in range(3)])
                cpus.append([found[side]["cpu_s"] for side in range(3)])
    seconds = np.array(walls)  # (rounds, 3)
    names = ("SDK", "own client", "SDK alone")
    middles = map(Timing, np.median(seconds, 0).tolist(), np.median(cpus, 0).tolist())
    timings = dict(zip(names, middles, strict=True))
    least = ", ".join(f"{each * 1e3:.1f}" for each in seconds.min(0))
    return [
        Result(
            "gateway",
            f"step of {DATA} x {TOKENS} tokens: stock SDK through the gateway - own client",
            estimate((seconds[:, 0] - seconds[:, 1]) * 1e3),
            "ms",
            target=STEP_TARGET_MS,
            sides=timings,
            agreement=Agreement(float(np.max(apart)), 0.0),
            notes=f"p50 of {len(seconds)} steps of each, in turn; least {least} ms; CPU is of the"
            " programs alone",
        ),
        Result(
            "gateway",
            "of that, the stock SDK itself: a step at a server that computes nothing",
            estimate(seconds[:, 2] * 1e3),
            "ms",
        ),
    ]


def _waiting(gate: RunningGateway) -> list[Result]:
    host, _, port = gate.url.removeprefix("http://").rpartition(":")
    clock = cpu_clock([gate.pid], own=False)
    with Remote("bench.waiting_futures:WaitingFutures", host, int(port)) as callers:
        callers.call("wait", "tiny-llama", FUTURES)
        time.sleep(SETTLE_S)
        beats_ms = np.array(callers.call("beat", BEATS, BEAT_PAUSE_S)) * 1e3
        cpu_s, begun_s = clock(), time.perf_counter()
        time.sleep(IDLE_S)
        percent = 100 * (clock() - cpu_s) / (time.perf_counter() - begun_s)
        waiting = callers.call("still_waiting")
    assert waiting == FUTURES, f"only {waiting} still waited"
    return [
        Result(
            "gateway",
            f"heartbeat beside {FUTURES} waiting futures, p99",
            estimate(beats_ms, lambda s: float(np.percentile(s, 99))),
            "ms",
            target=BEAT_TARGET_MS,
            notes=f"{BEATS} beats, one after the other, p50 {np.median(beats_ms):.2f} ms",
        ),
        Result(
            "gateway",
            f"CPU of the gateway while {FUTURES} futures wait and nothing comes",
            Estimate(percent, percent, percent),
            "%",
            target=CPU_TARGET_PERCENT,
            notes=f"over {IDLE_S:g} s, of one core",
        ),
    ]
