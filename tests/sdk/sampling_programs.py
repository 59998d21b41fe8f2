"""What a stock Tinker SDK is asked to sample and to look after; as `programs.py`.

python sampling_programs.py NAME
"""

import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tinker
from tinker import types

BASE_MODEL = os.environ.get("SDK_BASE_MODEL", "tiny-llama")
MANY = int(os.environ.get("SDK_MANY", "200"))
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
Params = types.SamplingParams


def now(made: Any) -> Any:
    """A client: newer SDKs give a future of it."""
    return made.result() if hasattr(made, "result") else made


def prompt_of(tokens: Sequence[int] = PROMPT) -> types.ModelInput:
    """A prompt of these tokens."""
    return types.ModelInput.from_ints(list(tokens))


def drawn(sampler: Any, count: int = 1, **settings: Any) -> list[list[int]]:
    """Tokens of samples."""
    found = sampler.sample(prompt_of(), count, Params(**settings)).result()
    return [list(each.tokens) for each in found.sequences]


def small_model(service: Any) -> Any:
    """A model to save weights of, after one step."""
    training = now(
        service.create_lora_training_client(
            base_model=BASE_MODEL, rank=4, seed=7, train_unembed=False
        )
    )
    inputs = {"target_tokens": PROMPT[1:], "weights": [1.0] * 7}
    datum = types.Datum(model_input=prompt_of(PROMPT[:-1]), loss_fn_inputs=inputs)
    training.forward_backward([datum], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=0.05)).result()
    return training


def refused(call: Callable[[], Any], *parts: str) -> str:
    """What a call is refused with, which names these parts."""
    try:
        call()
    except (tinker.TinkerError, ValueError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
        assert all(part in text for part in parts), text
        return text
    raise AssertionError("it was not refused")


def parameters(service: Any) -> Any:
    """Seeds, temperature, cuts, stops; tokens have the logprobs that they were drawn with."""
    sampler = now(service.create_sampling_client(base_model=BASE_MODEL))
    settings = {"max_tokens": 12, "seed": 7, "temperature": 0.8, "top_k": 30, "top_p": 0.95}
    one, two = drawn(sampler, 3, **settings), drawn(sampler, 3, **settings)
    assert one == two
    assert len(one) == 3
    assert one != drawn(sampler, 3, **{**settings, "seed": 8})
    greedy = drawn(sampler, 2, max_tokens=6, temperature=0)
    assert greedy[0] == greedy[1]
    assert drawn(sampler, 1, max_tokens=6, top_k=1) == greedy[:1]
    stop = greedy[0][3]
    found = sampler.sample(prompt_of(), 1, Params(max_tokens=9, temperature=0, stop=[stop]))
    sequence = found.result().sequences[0]
    assert sequence.stop_reason == "stop"
    assert list(sequence.tokens) == greedy[0][: greedy[0].index(stop) + 1]
    assert sequence.logprobs is not None
    assert len(sequence.logprobs) == len(sequence.tokens)
    assert len(drawn(sampler, 1, max_tokens=40, stop=[])[0]) == 40
    return {"seeded": one, "greedy": greedy}


def prompts(service: Any) -> Any:
    """Logprobs of a prompt, and the likeliest tokens at each position."""
    sampler = now(service.create_sampling_client(base_model=BASE_MODEL))
    logprobs = sampler.compute_logprobs(prompt_of()).result()
    assert logprobs[0] is None
    assert len(logprobs) == len(PROMPT)
    found = sampler.sample(prompt_of(), 1, Params(max_tokens=1, seed=1), True, 3).result()
    same = [
        a is b or math.isclose(a, b, abs_tol=1e-5)
        for a, b in zip(found.prompt_logprobs, logprobs, strict=True)
    ]
    assert all(same)
    topk = found.topk_prompt_logprobs
    assert topk[0] is None
    assert [len(row) for row in topk[1:]] == [3] * 7
    best = sampler.sample(prompt_of(), 1, Params(max_tokens=1, temperature=0)).result()
    alone = sampler.compute_logprobs(prompt_of([*PROMPT, best.sequences[0].tokens[0]])).result()
    assert math.isclose(alone[-1], best.sequences[0].logprobs[0], abs_tol=1e-4)
    return {"logprobs": [round(each, 4) for each in logprobs[1:]]}


def scores(service: Any) -> Any:
    """What SDKs from 0.33 on ask for besides."""
    sampler = now(service.create_sampling_client(base_model=BASE_MODEL))
    whole = sampler.compute_logprobs(prompt_of()).result()
    last = sampler.compute_logprobs(prompt_of(), prompt_logprobs_last_n=3).result()
    assert last[:5] == [None] * 5
    assert np.allclose(whole[5:], last[5:], atol=1e-5)
    ids = np.full((7, 3), -1, np.int64)
    ids[6, 0], ids[2, 2], ids[2, 0] = PROMPT[7], PROMPT[3], 9
    dense = types.TensorData.from_numpy(ids)
    sparse = types.TensorData(
        data=[9, PROMPT[3], PROMPT[7]],
        dtype="int64",
        shape=[7, 3],
        sparse_crow_indices=[0, 0, 0, 2, 2, 2, 2, 3],
        sparse_col_indices=[0, 2, 0],
    )
    found = [
        sampler.sample(
            prompt_of(),
            1,
            Params(max_tokens=2, seed=1, temperature=0.5),
            topk_sample_logprobs=2,
            target_prompt_logprobs=targets,
            prompt_alt_tokens_k=4,
        ).result()
        for targets in (dense, sparse)
    ]
    table = found[0].target_prompt_logprobs.to_numpy()
    assert math.isclose(table[6, 0], whole[7], abs_tol=1e-5)
    assert math.isclose(table[2, 2], whole[3], abs_tol=1e-5)
    cells = found[1].target_prompt_logprobs
    assert np.allclose(cells.data, [table[2, 0], table[2, 2], table[6, 0]])
    assert cells.sparse_col_indices == [0, 2, 0]
    alternatives = found[0].prompt_alt_tokens
    assert alternatives.tokens.to_numpy().shape == (7, 4)
    assert alternatives.tokens.to_numpy().dtype == np.int64
    assert (alternatives.logprobs.to_numpy() < 0).all()
    sequence = found[0].sequences[0]
    assert [len(row) for row in sequence.topk_logprobs] == [2, 2]
    assert len({each.sequences[0].sequence_id for each in found}) == 2
    said = refused(
        lambda: sampler.sample(
            prompt_of(), 1, Params(max_tokens=1), True, prompt_logprobs_last_n=8
        ).result(),
        "last_n",
    )
    return {"said": said}


def weights(service: Any) -> Any:
    """Samplers of a model: with a name, without one, by path; each keeps its weights."""
    training = small_model(service)
    settings = {"max_tokens": 8, "seed": 3}
    first = now(training.save_weights_and_get_sampling_client(name="x"))
    before = drawn(first, 2, **settings)
    path = training.save_weights_for_sampler("w1").result().path
    named = now(service.create_sampling_client(model_path=path))
    assert drawn(named, 2, **settings) == before
    inputs = {"target_tokens": [1] * 7, "weights": [5.0] * 7}
    datum = types.Datum(model_input=prompt_of(PROMPT[:-1]), loss_fn_inputs=inputs)
    training.forward_backward([datum], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=0.5)).result()
    second = now(training.save_weights_and_get_sampling_client(name="x"))
    after = drawn(second, 2, **settings)
    assert after != before
    assert drawn(first, 2, **settings) == drawn(named, 2, **settings) == before
    base = now(service.create_sampling_client(base_model=BASE_MODEL))
    assert drawn(base, 2, **settings) != after
    training.save_state("t1").result()
    wrong = path.replace("sampler_weights/w1", "weights/t1")
    refused(lambda: now(service.create_sampling_client(model_path=wrong)), "training checkpoint")
    return {"tokens": before}


def many(service: Any) -> Any:
    """Many at once; each has a seed of its own and ends."""
    sampler = now(service.create_sampling_client(base_model=BASE_MODEL))
    begun = time.monotonic()
    futures = [
        sampler.sample(prompt_of(), 1, Params(max_tokens=6, seed=seed)) for seed in range(MANY)
    ]
    tokens = [list(each.result().sequences[0].tokens) for each in futures]
    took_s = time.monotonic() - begun
    print(f"{MANY} samples in {took_s:.1f} s", file=sys.stderr)
    return {"tokens": tokens}


def slow(service: Any) -> Any:
    """Long ones without a seed, for whoever kills servers meanwhile."""
    sampler = now(service.create_sampling_client(base_model=BASE_MODEL))
    futures = [
        sampler.sample(prompt_of([*PROMPT, i]), 2, Params(max_tokens=300, stop=[], seed=i))
        for i in range(24)
    ]
    print("begun", file=sys.stderr, flush=True)
    return {"tokens": [[list(s.tokens) for s in each.result().sequences] for each in futures]}


def refusals(service: Any) -> Any:
    """What is wrong is said at once, and names the field."""
    sampler = now(service.create_sampling_client(base_model=BASE_MODEL))

    def sample(prompt: types.ModelInput | None = None, count: int = 1, **settings: Any) -> Any:
        return sampler.sample(prompt or prompt_of(), count, Params(**settings)).result()

    image = types.ImageChunk(data=b"x", format="png", expected_tokens=3)
    said = [
        refused(lambda: sample(max_tokens=0), "max_tokens"),
        refused(lambda: sample(count=0, max_tokens=1), "num_samples"),
        refused(lambda: sample(count=4000, max_tokens=1), "num_samples_max"),
        refused(lambda: sample(max_tokens=1, temperature=-1.0), "temperature"),
        refused(lambda: sample(max_tokens=1, top_p=0.0), "top_p"),
        refused(lambda: sample(max_tokens=10**9), "context_length"),
        refused(lambda: sample(prompt_of([10**6]), max_tokens=1), "token"),
        refused(lambda: sample(types.ModelInput(chunks=[image]), max_tokens=1), "images"),
        refused(lambda: now(service.create_sampling_client(base_model="absent")), "tiny-llama"),
        refused(
            lambda: now(service.create_sampling_client(model_path="tinker://a/sampler_weights/b")),
            "no checkpoint",
        ),
    ]
    return {"said": said}


def cancelled(service: Any) -> Any:
    """A sample that is given up stops, and others go on."""
    sampler = now(service.create_sampling_client(base_model=BASE_MODEL))

    async def give_up() -> None:
        wait = sampler.sample(prompt_of(), 64, Params(max_tokens=400, stop=[])).result_async(1.0)
        try:
            await wait
        except (TimeoutError, asyncio.CancelledError):
            return
        print("it was there before it was given up", file=sys.stderr)

    asyncio.run(give_up())
    return {"tokens": drawn(sampler, 1, max_tokens=5, seed=1)}


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    each.__name__: each
    for each in (parameters, prompts, scores, weights, many, slow, refusals, cancelled)
}


def run(program: Callable[[Any], Any]) -> None:
    """Run one program, and print what it found."""
    service = tinker.ServiceClient()
    found = program(service)
    print(json.dumps({"version": tinker.__version__, "program": program.__name__, **found}))
    if hasattr(service, "close"):
        service.close("success").result()


if __name__ == "__main__":
    run(PROGRAMS[sys.argv[1]])
