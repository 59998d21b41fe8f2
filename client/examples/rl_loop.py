"""Reinforcement learning in one page: sample groups, compute a reward, train on the advantages.

    tinsmith up --base-model FOLDER            # in one terminal
    python client/examples/rl_loop.py          # in another

The reward is the share of an answer's characters that are digits: silly, and seen at a glance.
"""

import argparse
import os

import numpy as np

import tinsmith
from tinsmith import types

PROMPTS = ["My phone number is", "The year was", "Count with me:", "The price is"]


def reward(text: str) -> float:
    """Share of characters that are digits."""
    return sum(character.isdigit() for character in text) / max(len(text), 1)


def make_datum(prompt: list[int], sequence: types.SampledSequence, advantage: float) -> types.Datum:
    """One sample; positions that only read the prompt get advantage 0."""
    tokens = prompt + sequence.tokens
    reading = [0.0] * (len(prompt) - 1)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:]),
            "logprobs": np.array(reading + sequence.logprobs, np.float32),
            "advantages": np.array(reading + [advantage] * len(sequence.tokens), np.float32),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default=os.environ.get("TINSMITH_ADDRESS", "127.0.0.1:50051"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()

    service = tinsmith.ServiceClient(base_url=args.address)
    base_model = service.get_server_capabilities().supported_models[0].model_name
    trainer = service.create_lora_training_client(base_model, rank=16, seed=0).result()
    tokenizer = trainer.get_tokenizer()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    params = types.SamplingParams(max_tokens=args.max_tokens, temperature=1.0, stop=[])

    for step in range(args.steps):
        # A sampler with exactly the weights that the next gradient is for.
        sampler = trainer.save_weights_and_get_sampling_client().result()
        groups = [
            sampler.sample(types.ModelInput.from_ints(prompt), args.group_size, params)
            for prompt in prompts
        ]
        data, rewards = [], []
        for prompt, group in zip(prompts, groups, strict=True):
            sequences = group.result().sequences
            texts = [tokenizer.decode(sequence.tokens) for sequence in sequences]
            group_rewards = [reward(text) for text in texts]
            rewards += group_rewards
            baseline = float(np.mean(group_rewards))
            data += [
                make_datum(prompt, sequence, value - baseline)
                for sequence, value in zip(sequences, group_rewards, strict=True)
            ]
        trainer.forward_backward(data, "importance_sampling")
        trainer.optim_step(types.AdamParams(learning_rate=args.learning_rate)).result()
        example = " ".join(texts[0].split())[:50]
        print(f"step {step + 1:3}  reward {np.mean(rewards):.3f}  {PROMPTS[-1]}… {example}")


if __name__ == "__main__":
    main()
