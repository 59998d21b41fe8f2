"""Peak memory: of a call above the weights (row 10), and of a rank while it loads."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import programs
from bench.configs import SHAPES, L, write_model
from bench.harness import Result, compare, estimate
from bench.sides import Ours, Settings
from checkpoints import to_files

TARGET = 0.40
TOKENS = 2048
ROUNDS_MAX = 3
"""Memory hardly varies, and each round starts two processes."""
SHARE_FACTOR, PROCESS_BYTES = 1.25, 600e6
"""What a rank may take while it loads: so many times its share, and so much for the process."""


def peak_memory(settings: Settings) -> list[Result]:
    """Row 10: one datum, each side in fresh processes in turn."""
    shape = SHAPES[settings.shape or "H"]
    folder = write_model(shape, settings.models)
    start = Ours(folder, settings).start
    peaks: dict[str, list[int]] = {"ours": [], "bare": []}
    with tempfile.TemporaryDirectory() as scratch:
        state = Path(scratch) / "state"
        state.mkdir()
        for name, content in to_files(start).items():
            (state / name).write_bytes(content)
        for _ in range(min(settings.pairs, ROUNDS_MAX)):
            for side, found in peaks.items():
                out = Path(scratch) / f"{side}.npz"
                found.append(_peak_bytes(side, folder, state, out, settings))
        numbers = []
        for side in peaks:
            arrays = dict(np.load(Path(scratch) / f"{side}.npz"))
            numbers.append(([arrays.pop("logprobs")], arrays))
    ours, bare = (np.array(values, float) for values in peaks.values())
    mib = {side: float(np.median(values)) / 2**20 for side, values in peaks.items()}
    return [
        Result(
            "10",
            f"peak memory above weights, {TOKENS} tokens, vocabulary {shape.vocab:,} / bare loop",
            estimate(ours / bare),
            target=TARGET,
            agreement=compare(*numbers),
            notes=f"VmHWM above VmRSS before the call, MiB: ours {mib['ours']:,.0f}, "
            f"bare {mib['bare']:,.0f}",
        )
    ]


def loading(settings: Settings) -> list[Result]:
    """Row "loading": a model in sharded files, in ZeRO stage 3 on 1, 2 and 4 ranks."""
    shape = SHAPES[settings.shape] if settings.shape else L
    folder = write_model(shape, settings.models, dtype=torch.bfloat16)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    results = []
    for ranks in (1, 2, 4):
        arguments = (str(folder), "bfloat16", "lora")
        done = programs.run("bench.loading_worker", *arguments, ranks=ranks, timeout_s=600)
        if done.returncode:
            raise RuntimeError(f"a rank ended with {done.returncode}:\n{done.stderr[-3000:]}")
        found = [json.loads(line) for line in done.stdout.splitlines()]
        allowed = SHARE_FACTOR * size / ranks + PROCESS_BYTES
        peak, wall_s = (max(rank[name] for rank in found) for name in ("peak_bytes", "wall_s"))
        results.append(
            Result(
                "loading",
                f"peak RSS of a rank, stage 3, {ranks} rank(s) / ({SHARE_FACTOR} shares + 0.6 GB)",
                estimate(np.array([peak / allowed])),
                target=1.0,
                notes=f"{peak / 1e9:.2f} GB of a model of {size / 1e9:.2f} GB, {wall_s:.1f} s",
            )
        )
    return results


def _peak_bytes(side: str, folder: Path, state: Path, out: Path, settings: Settings) -> int:
    command = [
        *(sys.executable, "-m", "bench.memory_worker", side, str(folder), str(state)),
        *(str(TOKENS), str(settings.threads), str(settings.zero_stage), str(out)),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return int(found["peak_bytes"] - found["before_bytes"])
