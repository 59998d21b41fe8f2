"""A user's fine-tuning loop as anybody would write it: it knows nothing of failures.

It writes down every value that it gets, to the last bit, so that two runs can be compared.
"""

import argparse
from pathlib import Path
from typing import Any, TextIO

import numpy as np

import tinsmith
from tinsmith import types

DEPTH = 4
"""Steps that are under way before the first one's results are read."""


def make_data(rng: np.random.Generator, count: int, length: int) -> list[types.Datum]:
    """Random tokens and weights, of different lengths."""
    data = []
    for _ in range(count):
        tokens = rng.integers(0, 256, int(rng.integers(3, length)))
        weights = rng.normal(size=len(tokens) - 1).astype(np.float32)
        inputs = {"target_tokens": tokens[1:], "weights": weights}
        data.append(types.Datum(types.ModelInput.from_ints(tokens[:-1].tolist()), inputs))
    return data


def write_output(log: TextIO, what: str, output: types.ForwardBackwardOutput) -> None:
    """Metrics and logprobs of a call, exactly."""
    logprobs = b"".join(np.asarray(o["logprobs"]).tobytes() for o in output.loss_fn_outputs)
    print(what, sorted(output.metrics.items()), logprobs.hex(), file=log, flush=True)


def sample(log: TextIO, trainer: tinsmith.TrainingClient, step: int) -> None:
    """Two samples from the weights as they are now."""
    sampler = trainer.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=12, seed=step)
    response = sampler.sample(types.ModelInput.from_ints([1, 2, 3]), 2, params).result()
    for sequence in response.sequences:
        logprobs = np.asarray(sequence.logprobs).tobytes().hex()
        print("sample", step, list(sequence.tokens), logprobs, file=log, flush=True)


def train(log: TextIO, trainer: tinsmith.TrainingClient, args: argparse.Namespace) -> None:
    """The loop: two calls of a step go out at once, and several steps are under way."""
    rng = np.random.default_rng(args.seed)
    pending: list[tuple[int, Any, Any]] = []

    def read() -> None:
        step, result, stepped = pending.pop(0)
        write_output(log, f"forward_backward {step}", result.result())
        print("optim_step", step, sorted(stepped.result().metrics.items()), file=log, flush=True)

    for step in range(1, args.steps + 1):
        result = trainer.forward_backward(make_data(rng, args.batch, args.length), "cross_entropy")
        adam = types.AdamParams(
            learning_rate=1e-3 * (1 - step / (2 * args.steps)), weight_decay=0.1
        )
        pending.append((step, result, trainer.optim_step(adam)))
        if len(pending) > DEPTH:
            read()
        if step % 10 == 5:
            test = make_data(rng, 2, args.length)
            write_output(log, f"forward {step}", trainer.forward(test, "cross_entropy").result())
        if step % 25 == 15:
            trainer.save_state(f"step-{step}").result()
        if step % 50 == 30:
            path = trainer.save_state(f"step-{step}").result().path
            trainer.load_state_with_optimizer(path).result()
        if step % 25 == 20:
            trainer.save_weights_for_sampler(f"step-{step}").result()
            sample(log, trainer, step)
    while pending:
        read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", required=True)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=6, help="data in a call")
    parser.add_argument("--length", type=int, default=40, help="most tokens of a datum")
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    service = tinsmith.ServiceClient(base_url=args.address)
    trainer = service.create_lora_training_client(args.base_model, rank=8, seed=args.seed).result()
    with args.log.open("w") as log:
        train(log, trainer, args)
        path = trainer.save_state("final").result().path
        print("saved", path.rpartition("/")[2], file=log)
    Path(f"{args.log}.path").write_text(path)


if __name__ == "__main__":
    main()
