"""Teach a small model Pig Latin: supervised fine-tuning in one page.

    tinsmith up --base-model FOLDER            # in one terminal
    python client/examples/sft_loop.py         # in another

The held-out phrases are never trained on (their words are, in other company). Leaves in --out:
`loss.png`, and `adapter/`, a PEFT folder that transformers loads.
"""

import argparse
import os
import random
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

import tinsmith
from tinsmith import types

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WORDS = """
apple banana bread castle cheese chicken clever cloud coffee dragon family flower forest friend
garden green happy honey house market music night orange ocean queen rabbit river school silver
simple stone tiger train tree under village water window winter wonder young
""".split()


def pig_latin(word: str) -> str:
    """Move the first consonants to the back and add "ay"; after a first vowel just add "way"."""
    if word[0] in "aeiou":
        return word + "way"
    start = next((i for i, c in enumerate(word) if c in "aeiouy" and i > 0), len(word))
    if word.startswith("qu"):
        start = 2
    return word[start:] + word[:start] + "ay"


def make_phrases(count: int, rng: random.Random) -> list[str]:
    phrases: set[str] = set()
    while len(phrases) < count:
        phrases.add(" ".join(rng.sample(WORDS, 3)))
    return sorted(phrases)


def make_datum(tokenizer, phrase: str) -> types.Datum:
    """Prompt and answer as tokens; only the answer's tokens have weight."""
    prompt = encode_prompt(tokenizer, phrase)
    answer = " ".join(pig_latin(word) for word in phrase.split())
    completion = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    tokens = prompt + completion
    weights = [0.0] * len(prompt) + [1.0] * len(completion)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:]),
            "weights": np.array(weights[1:], dtype=np.float32),
        },
    )


def encode_prompt(tokenizer, phrase: str) -> list[int]:
    messages = [
        {"role": "system", "content": "Translate to Pig Latin."},
        {"role": "user", "content": phrase},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def mean_loss(output: types.ForwardBackwardOutput, data: list[types.Datum]) -> float:
    """Cross-entropy per weighted token, in nats."""
    weight = sum(datum.loss_fn_inputs["weights"].to_numpy().sum() for datum in data)
    return output.metrics["loss:sum"] / float(weight)


def show_answers(sampler, tokenizer, phrases: list[str], title: str) -> None:
    print(f"\n{title}")
    params = types.SamplingParams(max_tokens=24, temperature=0)
    futures = [
        sampler.sample(types.ModelInput.from_ints(encode_prompt(tokenizer, p)), 1, params)
        for p in phrases
    ]
    for phrase, future in zip(phrases, futures, strict=True):
        answer = tokenizer.decode(future.result().sequences[0].tokens, skip_special_tokens=True)
        right = answer.strip() == " ".join(pig_latin(word) for word in phrase.split())
        print(f"  {'✓' if right else '✗'} {phrase}  →  {' '.join(answer.split())[:60]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default=os.environ.get("TINSMITH_ADDRESS", "127.0.0.1:50051"))
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    service = tinsmith.ServiceClient(base_url=args.address)
    base_model = service.get_server_capabilities().supported_models[0].model_name
    print(f"fine-tuning {base_model} at {args.address}")
    # Not the head: it shares its weights with the embedding, and such an adapter cannot be merged.
    trainer = service.create_lora_training_client(
        base_model, rank=args.rank, seed=0, train_unembed=False
    ).result()
    tokenizer = trainer.get_tokenizer()

    rng = random.Random(0)
    phrases = make_phrases(args.steps * args.batch_size + 16, rng)
    rng.shuffle(phrases)
    held_out, training = phrases[:16], phrases[16:]
    test_data = [make_datum(tokenizer, phrase) for phrase in held_out]

    before = mean_loss(trainer.forward(test_data, "cross_entropy").result(), test_data)
    base = service.create_sampling_client(base_model=base_model).result()
    show_answers(base, tokenizer, held_out[:6], "held-out phrases before training")

    losses = []
    pending = []
    print()
    for step in range(args.steps):
        batch = training[step * args.batch_size : (step + 1) * args.batch_size]
        data = [make_datum(tokenizer, phrase) for phrase in batch]
        learning_rate = args.learning_rate * (1 - step / args.steps)
        # Both calls go out at once; the service keeps them in order.
        result = trainer.forward_backward(data, "cross_entropy")
        trainer.optim_step(types.AdamParams(learning_rate=learning_rate))
        pending.append((result, data))
    with tqdm(pending, unit="step") as progress:
        for result, data in progress:
            losses.append(mean_loss(result.result(), data))
            progress.set_postfix(loss=f"{losses[-1]:.3f}")

    after = mean_loss(trainer.forward(test_data, "cross_entropy").result(), test_data)
    path = trainer.save_weights_for_sampler("pig-latin", overwrite=True).result().path
    tuned = service.create_sampling_client(model_path=path).result()
    show_answers(tuned, tokenizer, held_out[:6], "held-out phrases after training")

    plt.figure(figsize=(6, 3.5))
    plt.plot(range(1, len(losses) + 1), losses, label="training batch")
    plt.plot([0, len(losses)], [before, after], "o", label="held-out, before and after")
    plt.xlabel("step")
    plt.ylabel("loss per token (nats)")
    plt.legend()
    plt.tight_layout()
    plt.savefig(args.out / "loss.png", dpi=120)
    service.create_rest_client().download_checkpoint(path, args.out / "adapter").result()

    print(f"\nheld-out loss {before:.3f} → {after:.3f} nats per token")
    print(f"curve:   {args.out / 'loss.png'}")
    print(f"adapter: {args.out / 'adapter'}  (a PEFT folder)")
    print(f"sampler: {path}")
    (args.out / "checkpoint.txt").write_text(path)


if __name__ == "__main__":
    main()
