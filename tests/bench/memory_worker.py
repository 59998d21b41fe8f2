"""One side of row 10, in a process of its own: prints its memory as JSON, saves its numbers.

Arguments: "ours" or "bare", model folder, folder of the adapter's first state, tokens, threads,
ZeRO stage, file for the numbers (.npz).

The peak is VmHWM of `/proc/self/status`; writing 5 to `/proc/self/clear_refs` sets it back to what
is resident, and what was resident just before the call (weights, libraries) is taken off. A call
with few tokens goes before, so that what is made once is there.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch

from bench import workloads
from bench.configs import SHAPES
from bench.sides import BareLoop, Ours, Settings
from tinsmithd.state import files as state_files

WARM_UP_TOKENS = 32


def status_bytes(name: str) -> int:
    """A size in `/proc/self/status`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def main() -> None:
    """Measure one forward and backward."""
    side, folder, state, tokens, threads, zero_stage, out = sys.argv[1:]
    torch.set_num_threads(int(threads))
    files = {path.name: path.read_bytes() for path in Path(state).iterdir()}
    start = state_files.from_files(files, None)
    vocab = SHAPES[Path(folder).name].vocab
    warm_up = workloads.make_batch([WARM_UP_TOKENS], vocab, seed=1)
    batch = workloads.make_batch([int(tokens)], vocab)
    if side == "ours":
        settings = Settings(models=Path(folder).parent, zero_stage=int(zero_stage))
        ours = Ours(Path(folder), settings, lora=start.tuning)
        run, clear, gradients = ours.forward_backward, ours.clear, ours.take_gradients
    else:
        bare = BareLoop(Path(folder), start)
        run, clear, gradients = bare.padded, bare.clear, bare.take_gradients
    run(warm_up)
    clear()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    (logprobs,) = run(batch)
    peak = status_bytes("VmHWM")
    print(json.dumps({"before_bytes": before, "peak_bytes": peak}))
    np.savez(out, logprobs=logprobs, **gradients())


if __name__ == "__main__":
    main()
