"""A user's script in a pod: train, save, sample, and print every number in full.

Argument: how many steps. A JSON object per line: the steps as they are done, then what came of it.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import tinsmith
from tinsmith import types

BATCH = 4
TOKENS = 48


def batch(step: int, count: int = BATCH, length: int = TOKENS) -> list[types.Datum]:
    """Data of one step, so many of so many tokens; the same in every run."""
    rng = np.random.default_rng(step)
    data = []
    for _ in range(count):
        tokens = rng.integers(0, 256, length + 1)
        inputs = {
            "target_tokens": tokens[1:],
            "weights": rng.normal(size=length).astype(np.float32),
        }
        prompt = types.ModelInput.from_ints(tokens[:-1].tolist())
        data.append(types.Datum(model_input=prompt, loss_fn_inputs=inputs))
    return data


def say(**values: object) -> None:
    """One line."""
    print(json.dumps(values), flush=True)


def main() -> None:
    """Train with two calls under way, save, sample."""
    steps = int(sys.argv[1])
    service = tinsmith.ServiceClient()
    (base_model,) = service.get_server_capabilities().supported_models
    client = service.create_lora_training_client(base_model=base_model.model_name, rank=4, seed=7)
    say(model_id=client.model_id)
    for step in range(steps):
        computed = client.forward_backward(batch(step), "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=1e-2))
        loss = computed.result().metrics["loss:sum"]
        say(step=step, loss=loss.hex(), norm=stepped.result().metrics["grad_norm:last"].hex())
    saved = client.save_state("end").result().path
    sampler = client.save_weights_and_get_sampling_client()
    prompt = types.ModelInput.from_ints([1, 2, 3])
    params = types.SamplingParams(max_tokens=12, seed=5, temperature=1.0)
    sampled = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
    with tempfile.TemporaryDirectory() as folder:
        service.create_rest_client().download_checkpoint(saved, folder).result()
        weights = Path(folder, "adapter_model.safetensors").read_bytes()
    say(
        tokens=[sequence.tokens for sequence in sampled.sequences],
        adapter=hashlib.sha256(weights).hexdigest(),
    )


if __name__ == "__main__":
    main()
