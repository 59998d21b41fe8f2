"""Two thousand calls at once: when all have their answers, and who else has one meanwhile."""

import tempfile
from pathlib import Path

import numpy as np
import psutil

from bench.harness import Result, Timing, estimate
from bench.remote import Remote
from bench.sides import Settings
from sampler_server import sampler_process
from tinsmith.sampling_client import WHOLE
from tinsmithd.sampler.server import SERVICE_NAME
from tiny_models import write_tiny_model

CALLS = 2000
TARGETS_MS = {50: None, 99: 10.0}
KINDS = {"whole answers": WHOLE, "streams": ()}
"""What calls want, as metadata."""


def crowd(settings: Settings) -> list[Result]:
    """A Sampler as `tinsmith up` starts it, on a tiny model; a neighbour asks for its health."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_tiny_model(folder / "tiny-llama")
        with sampler_process(model, folder) as (pid, address):
            server = psutil.Process(pid)
            return [
                result
                for kind in KINDS
                for result in _measured(address, server, kind, settings.pairs)
            ]


def _measured(address: str, server: psutil.Process, kind: str, rounds: int) -> list[Result]:
    waits, late, ended_s, memory = [], [], [], []
    with (
        Remote("bench.health_probe:HealthProbe", address, SERVICE_NAME) as probe,
        Remote("bench.crowd_client:CrowdClient", address) as callers,
    ):
        for index in range(-1, rounds):
            probe.call("start")
            calls = CALLS if index >= 0 else CALLS // 10
            took_s = callers.call("run", calls, KINDS[kind])
            found = np.array(probe.call("stop"))  # (checks, 2)
            memory.append(server.memory_info().rss / 2**20)
            if index >= 0:
                waits.append(found[:, 0])
                late.append(found[:, 1])
                ended_s.append(took_s)
    every, machine = np.concatenate(waits) * 1e3, np.concatenate(late) * 1e3
    notes = (
        f"{len(every)} checks beside {len(waits)} x {CALLS} calls; the neighbour itself woke up to"
        f" {np.percentile(machine, 99):.1f} ms late (p99); memory after each"
        f" {', '.join(f'{each:.0f}' for each in memory)} MiB"
    )
    return [
        Result(
            "crowd",
            f"health beside {CALLS} {kind} at once, p{percent}",
            estimate(every, lambda s, p=percent: float(np.percentile(s, p))),
            "ms",
            target=target,
            sides={"all calls": Timing(float(np.median(ended_s)), 0.0)},
            notes=notes,
        )
        for percent, target in TARGETS_MS.items()
    ]
