"""A program for Tinker, run by the stock SDK or by this client: a side of row "gateway".

python step_program.py BASE_MODEL DATA TOKENS

It makes a model, and then a step for each line that it reads: `forward_backward` and `optim_step`,
sent one after the other, both answers awaited. It answers with a line of JSON: `wall_s` and `cpu_s`
of the step, and the `logprobs` of all tokens. It needs nothing but what is imported as `tinker`.
"""

import json
import sys
import time
from typing import Any

import tinker
from tinker import types

VOCAB_SIZE = 200
RANK = 8


def data_of(count: int, length: int) -> list[types.Datum]:
    """The data of every step: numbers that look drawn, the same in each process."""
    found = []
    for row in range(count):
        tokens = [5 + (row * 7919 + place * place * 31) % VOCAB_SIZE for place in range(length + 1)]
        inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": [1.0] * length}
        prompt = types.ModelInput.from_ints(tokens[:-1])
        found.append(types.Datum(model_input=prompt, loss_fn_inputs=inputs))
    return found


def main() -> None:
    """Make a step for each line."""
    base_model, count, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    service = tinker.ServiceClient()
    made = service.create_lora_training_client(base_model=base_model, rank=RANK, seed=1)
    training: Any = made.result() if hasattr(made, "result") else made
    data = data_of(count, length)
    params = types.AdamParams(learning_rate=1e-4)
    for _ in sys.stdin:
        cpu_s, begun_s = time.process_time(), time.perf_counter()
        forward = training.forward_backward(data, "cross_entropy")
        step = training.optim_step(params)
        output = forward.result()
        step.result()
        wall_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - cpu_s
        arrays = [each["logprobs"].tolist() for each in output.loss_fn_outputs]
        logprobs = [float(each) for array in arrays for each in array]
        print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "logprobs": logprobs}), flush=True)


if __name__ == "__main__":
    main()
