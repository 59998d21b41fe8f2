"""Direct preference optimisation in one page: a custom loss over pairs (Rafailov et al. 2023).

    tinsmith up --base-model FOLDER            # in one terminal
    python client/examples/dpo_loop.py         # in another

The loss is written here, in torch, over two sequences at a time; the service computes logprobs
and gradients. Prints how often held-out pairs are ordered as preferred.
"""

import argparse
import os

import numpy as np
import torch

import tinsmith
from tinsmith import types

ANIMALS = "ant bat bear bee cat cow crab crow deer dog duck eel elk fox frog goat hare hen".split()
QUESTION = "Is the {} an animal? Answer:"
CHOSEN, REJECTED = " Yes, it certainly is.", " Who cares."


def make_datum(tokenizer, question: str, answer: str) -> types.Datum:
    """Question and answer; `weights` marks the answer's tokens."""
    prompt = tokenizer.encode(question)
    tokens = prompt + tokenizer.encode(answer)
    weights = [0.0] * (len(prompt) - 1) + [1.0] * (len(tokens) - len(prompt))
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": torch.tensor(tokens[1:]),
            "weights": torch.tensor(weights),
        },
    )


def answer_logprobs(data: list[types.Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
    """Logprob of each answer, `(2 * pairs,)`: chosen and rejected alternate."""
    sums = [
        (lp * datum.loss_fn_inputs["weights"].to_torch()).sum()
        for datum, lp in zip(data, logprobs, strict=True)
    ]
    return torch.stack(sums)


def dpo_loss(reference: torch.Tensor, beta: float):
    """-log sigmoid(beta * (margin of the policy - margin of the reference)), summed over pairs."""

    def loss_fn(data, logprobs):
        gain = answer_logprobs(data, logprobs) - reference
        margins = gain[0::2] - gain[1::2]
        loss = -torch.nn.functional.logsigmoid(beta * margins).sum()
        return loss, {"margin": margins.mean().item(), "accuracy": (margins > 0).float().mean()}

    return loss_fn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default=os.environ.get("TINSMITH_ADDRESS", "127.0.0.1:50051"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-pairs", type=int, default=4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    args = parser.parse_args()

    service = tinsmith.ServiceClient(base_url=args.address)
    base_model = service.get_server_capabilities().supported_models[0].model_name
    trainer = service.create_lora_training_client(base_model, rank=16, seed=0).result()
    tokenizer = trainer.get_tokenizer()
    pairs = [
        [make_datum(tokenizer, QUESTION.format(animal), answer) for answer in (CHOSEN, REJECTED)]
        for animal in ANIMALS
    ]

    def logprobs_of(data: list[types.Datum]) -> torch.Tensor:
        outputs = trainer.forward(data, "cross_entropy").result().loss_fn_outputs
        return answer_logprobs(data, [output["logprobs"] for output in outputs])

    # A fresh adapter changes nothing yet: these are the reference model's logprobs.
    reference = [logprobs_of(pair) for pair in pairs]
    held_out, training = pairs[:6], list(range(6, len(pairs)))

    def margin(which: list[list[types.Datum]]) -> float:
        values = [logprobs_of(pair) for pair in which]
        return float(np.mean([(value[0] - value[1]).item() for value in values]))

    before = margin(held_out)
    rng = np.random.default_rng(0)
    for step in range(args.steps):
        batch = rng.choice(training, args.batch_pairs, replace=False)
        data = [datum for index in batch for datum in pairs[index]]
        loss_fn = dpo_loss(torch.cat([reference[index] for index in batch]), args.beta)
        loss, metrics = trainer.forward_backward_custom(data, loss_fn)
        trainer.optim_step(types.AdamParams(learning_rate=args.learning_rate)).result()
        margins = f"margin {metrics['margin']:.2f}  accuracy {metrics['accuracy']:.2f}"
        print(f"step {step + 1:3}  loss {loss / args.batch_pairs:.3f}  {margins}")
    print(f"held-out margin, chosen over rejected: {before:.2f} → {margin(held_out):.2f} nats")


if __name__ == "__main__":
    main()
