"""The client of row 11, in a process of its own: a script as a user has it, and nothing else.

Arguments: address of the Training server, model id, calls before those that count, calls that
count, process ids whose CPU time counts (separated by commas), file for the results (.npz): arrays
`wall_s`, `cpu_s` and `engine_s`, and `logprobs_<i>` of each datum of the last call.

Beside an engine and PyTorch, whose memory comes and goes between the calls, a megabyte is written
into pages that the system has to find first, which takes several times as long as to send it.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bench.clocks import cpu_clock
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.cluster import connect
from tinsmithd.domain import Datum

TARGETS_PER_POSITION = 64
"""Many targets per position make many bytes of few tokens, so that computing does not drown the
wire: each position has 8 bytes of token and 12 per target."""
DATUM_TOKENS = 256
DATA = 5
VOCAB_SIZE = 256


def wide_data() -> list[Datum]:
    """A megabyte of data."""
    rng = np.random.default_rng(0)
    shape = (DATUM_TOKENS, TARGETS_PER_POSITION)
    return [
        Datum(
            rng.integers(0, VOCAB_SIZE, DATUM_TOKENS),
            {
                "target_tokens": rng.integers(0, VOCAB_SIZE, shape),
                "weights": rng.normal(size=shape).astype(np.float32),
            },
        )
        for _ in range(DATA)
    ]


def requests_of(model_id: str, data: Sequence[Datum]) -> Iterator[pb.ForwardBackwardRequest]:
    """The call with them: a message for each, since each has some 200 KB."""
    header: dict[str, Any] = {"model_id": model_id, "loss_fn": {"cross_entropy": {}}}
    for datum in data:
        request = pb.ForwardBackwardRequest(**header)
        written = request.data.add()
        tensors.write(written.model_input.chunks.add().tokens, datum.tokens)
        for name, array in datum.loss_fn_inputs.items():
            tensors.write(written.loss_fn_inputs[name], array)
        yield request
        header = {}


def main() -> None:
    """Make the calls, each with a step after it that changes nothing and is not timed."""
    address, model_id, warm_ups, calls, pids, out = sys.argv[1:]
    data = wide_data()
    clock = cpu_clock([int(pid) for pid in pids.split(",")])
    step = pb.OptimStepRequest(model_id=model_id, adam_params=pb.AdamParams(learning_rate=0))
    seconds: list[tuple[float, float, float]] = []
    logprobs: list[np.ndarray] = []
    with connect(address) as cluster:
        for _ in range(int(warm_ups) + int(calls)):
            cpu_s, start_s = clock(), time.perf_counter()
            stream = cluster.training.ForwardBackward(requests_of(model_id, data))
            outputs = [output for response in stream for output in response.outputs]
            logprobs = [tensors.decode(output.loss_fn_outputs["logprobs"]) for output in outputs]
            wall_s, cpu_s = time.perf_counter() - start_s, clock() - cpu_s
            engine_s = float(dict(stream.trailing_metadata())["tinsmith-engine-seconds"])
            seconds.append((wall_s, cpu_s, engine_s))
            cluster.training.OptimStep(step)
    walls, cpus, engines = np.array(seconds[int(warm_ups) :]).T
    arrays = {f"logprobs_{i}": found for i, found in enumerate(logprobs)}
    np.savez(out, wall_s=walls, cpu_s=cpus, engine_s=engines, **arrays)


if __name__ == "__main__":
    main()
