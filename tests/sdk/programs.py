"""What a stock Tinker SDK is asked to do; runs where only that SDK is installed.

    python programs.py NAME

Each function is a program of its own, written for the SDKs from 0.18 to 0.38. It prints one line of
JSON, what it computed, so that runs can be compared.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

if "SDK_TORCH" in os.environ:  # custom losses need torch, which an SDK looks for as it is imported
    sys.path.append(os.environ["SDK_TORCH"])

import tinker
from tinker import types

BASE_MODEL = os.environ.get("SDK_BASE_MODEL", "tiny-llama")
STEPS = int(os.environ.get("SDK_STEPS", "4"))
PAUSE = os.environ.get("SDK_PAUSE", "")


def now(made: Any) -> Any:
    """A client: newer SDKs give a future of it."""
    return made.result() if hasattr(made, "result") else made


def datum(shift: int = 0, length: int = 6, **inputs: Any) -> types.Datum:
    tokens = [5 + (i * 7 + shift) % 200 for i in range(length + 1)]
    filled = {"target_tokens": tokens[1:], **inputs}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=filled)


def model(service: Any, **options: Any) -> Any:
    return now(
        service.create_lora_training_client(base_model=BASE_MODEL, rank=4, seed=7, **options)
    )


def weighted(shift: int) -> types.Datum:
    return datum(shift, weights=[1.0, 0.5, 1.0, 0.0, 1.0, 1.0])


def losses(training: Any) -> float:
    out = training.forward([weighted(i) for i in range(3)], "cross_entropy").result()
    return float(out.metrics["loss:sum"])


def sft(service: Any) -> Any:
    """Supervised training: gradients of several calls add up to one step, all pipelined."""
    training = model(service)
    futures = []
    for step in range(STEPS):
        for part in range(2):
            data = [weighted(10 * step + 3 * part + i) for i in range(3)]
            futures.append(training.forward_backward(data, "cross_entropy"))
        futures.append(training.optim_step(types.AdamParams(learning_rate=1e-3)))
        if PAUSE:
            print("step", file=sys.stderr, flush=True)
            [future.result() for future in futures[-3:]]
    results = [future.result() for future in futures]
    seen = [out.metrics["loss:sum"] for out in results if hasattr(out, "loss_fn_outputs")]
    return {"losses": seen, "end": losses(training)}


def pieces(service: Any) -> Any:
    """More data than one request takes: the SDK cuts them, and they are one sum."""
    training = model(service)
    data = [weighted(i % 50) for i in range(1100)]
    out = training.forward_backward(data, "cross_entropy").result()
    assert len(out.loss_fn_outputs) == 1100
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    return {"sum": out.metrics["loss:sum"], "end": losses(training)}


def custom(service: Any) -> Any:
    """A loss of the user's own, DPO: ln 2 where the model is its own reference."""
    import torch

    training = model(service)
    pairs = [datum(i, weights=[1.0] * 6) for i in range(4)]
    reference = training.forward(pairs, "cross_entropy").result().loss_fn_outputs
    before = [float(sum(out["logprobs"].tolist())) for out in reference]

    def dpo(data: Any, logprobs: Any) -> Any:
        margins = [each.sum() - ref for each, ref in zip(logprobs, before, strict=True)]
        pairs = [margins[i] - margins[i + 1] for i in range(0, len(margins), 2)]
        loss = -sum(torch.nn.functional.logsigmoid(0.1 * pair) for pair in pairs)
        return loss, {"dpo:sum": float(loss)}

    seen = []
    for _ in range(2):
        out = training.forward_backward_custom(pairs, dpo).result()
        training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        seen.append(out.metrics["dpo:sum"])
    assert abs(seen[0] / 2 - math.log(2)) < 1e-4, seen
    assert seen[1] < seen[0]
    return {"losses": seen}


def rl(service: Any) -> Any:
    """The losses of reinforcement learning, with their settings."""
    training = model(service)
    found = {}
    for loss, config in (
        ("importance_sampling", None),
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        ("cispo", None),
        ("dro", {"beta": 0.1}),
    ):
        data = [
            datum(i, logprobs=[-5.0] * 6, advantages=[1.0, -1.0, 0.5, 0.0, 1.0, 1.0])
            for i in range(3)
        ]
        out = training.forward_backward(data, loss, config).result()
        training.optim_step(types.AdamParams(learning_rate=1e-4, grad_clip_norm=1.0)).result()
        found[loss] = out.metrics["loss:sum"]
    return found


def state(service: Any) -> Any:
    """Saved, and loaded into the same model and into new ones, with the optimizer and without."""
    training = model(service, user_metadata={"run": "one"})
    training.forward_backward([weighted(1)], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    path = training.save_state("s1", ttl_seconds=3600).result().path
    saved = losses(training)
    training.forward_backward([weighted(2)], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    went_on = losses(training)
    assert went_on != saved
    training.load_state_with_optimizer(path).result()
    assert losses(training) == saved
    other = now(service.create_training_client_from_state_with_optimizer(path))
    assert losses(other) == saved
    other.forward_backward([weighted(2)], "cross_entropy")
    other.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    assert losses(other) == went_on
    plain = now(service.create_training_client_from_state(path))
    assert losses(plain) == saved
    sampler = training.save_weights_for_sampler("w1").result().path
    assert sampler.endswith("/sampler_weights/w1")
    info = training.get_info()
    assert info.lora_rank == 4
    return {"saved": saved, "went_on": went_on, "rank": info.lora_rank}


def errors(service: Any) -> Any:
    """What is wrong is said at once, and the model goes on."""
    said = {}
    training = model(service)

    def caught(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
        else:
            raise AssertionError(f"{name} passed")

    caught(
        "no such base",
        lambda: now(service.create_lora_training_client(base_model="org/absent", rank=4)),
    )
    caught("loss", lambda: training.forward_backward([weighted(1)], "stable_reinforce").result())
    caught(
        "shape",
        lambda: training.forward_backward([datum(1, weights=[1.0])], "cross_entropy").result(),
    )
    caught(
        "token",
        lambda: training.forward_backward(
            [
                types.Datum(
                    model_input=types.ModelInput.from_ints([10**6]),
                    loss_fn_inputs={"target_tokens": [1], "weights": [1.0]},
                )
            ],
            "cross_entropy",
        ).result(),
    )
    caught("path", lambda: training.load_state("tinker://x/weights/absent").result())
    caught("name", lambda: training.save_state("no/slash").result())
    training.forward_backward([weighted(1)], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    return {"said": sorted(said), "texts": said, "end": losses(training)}


def sample(service: Any) -> Any:
    """Samples of weights without a name, of named ones and of the base; logprobs; many at once."""
    training = model(service)
    training.forward_backward([weighted(1)], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    prompt = types.ModelInput.from_ints([5, 12, 19, 26])
    params = types.SamplingParams(max_tokens=6, seed=3, temperature=1.0, top_p=1.0, top_k=-1)
    unnamed = now(training.save_weights_and_get_sampling_client())
    first = unnamed.sample(prompt, 2, params).result()
    path = training.save_weights_for_sampler("w1").result().path
    named = now(service.create_sampling_client(model_path=path))
    again = named.sample(prompt, 2, params, include_prompt_logprobs=True).result()
    assert [each.tokens for each in first.sequences] == [each.tokens for each in again.sequences]
    logprobs = named.compute_logprobs(prompt).result()
    assert logprobs[0] is None
    assert logprobs[1:] == again.prompt_logprobs[1:]
    base = now(service.create_sampling_client(base_model=BASE_MODEL))
    many = [base.sample(prompt, 1, types.SamplingParams(max_tokens=2, seed=i)) for i in range(200)]
    assert all(len(each.result().sequences) == 1 for each in many)
    return {"tokens": [list(each.tokens) for each in again.sequences], "logprobs": logprobs[1:]}


def rest(service: Any) -> Any:
    """What there is, listed, changed and deleted."""
    training = model(service, user_metadata={"run": "two"})
    path = training.save_state("s1").result().path
    training.save_weights_for_sampler("w1").result()
    client = tinker.RestClient() if hasattr(tinker, "RestClient") else None
    client = client or service.create_rest_client()
    run = path.split("/")[2]
    names = sorted(each.checkpoint_id for each in client.list_checkpoints(run).result().checkpoints)
    assert names == ["sampler_weights/w1", "weights/s1"]
    assert client.get_training_run(run).result().base_model == BASE_MODEL
    assert client.get_training_run_by_tinker_path(path).result().training_run_id == run
    assert client.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    assert run in [
        each.training_run_id for each in client.list_training_runs().result().training_runs
    ]
    assert client.list_user_checkpoints().result().checkpoints
    assert client.list_sessions().result().sessions
    assert run in client.get_session(run.split(":")[0]).result().training_run_ids
    client.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    client.publish_checkpoint_from_tinker_path(path).result()
    client.unpublish_checkpoint_from_tinker_path(path).result()
    client.delete_checkpoint(run, "sampler_weights/w1").result()
    client.delete_checkpoint_from_tinker_path(path).result()
    return {"left": len(client.list_checkpoints(run).result().checkpoints)}


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    each.__name__: each for each in (sft, pieces, custom, rl, state, errors, sample, rest)
}


def main(name: str) -> None:
    """Run one program, and print what it found."""
    service = tinker.ServiceClient()
    found = PROGRAMS[name](service)
    if hasattr(service, "close"):
        service.close("success").result()
    print(json.dumps({"found": found}))


if __name__ == "__main__":
    main(sys.argv[1])
