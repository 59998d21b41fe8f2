"""What must be equal is equal, through the wire, on a cluster with production wiring."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import tinsmith
from clusters import RunningCluster
from formulas import FORMULAS, make_inputs
from tinsmith import types

ADAM = types.AdamParams(learning_rate=1e-2, eps=0.1)
SEQUENCES = [[10, 20, 30, 40, 50, 60], [7, 8, 9, 10], [200, 100, 50, 25, 12]]


@pytest.fixture
def service(cluster: RunningCluster) -> tinsmith.ServiceClient:
    """A client of the shared tiny cluster."""
    return tinsmith.ServiceClient(base_url=cluster.address)


def new_model(service: tinsmith.ServiceClient, **kwargs: Any) -> tinsmith.TrainingClient:
    base_model = service.get_server_capabilities().supported_models[0].model_name
    return service.create_lora_training_client(
        base_model, **{"rank": 4, "seed": 3, **kwargs}
    ).result()


def datum(tokens: list[int], **inputs: Any) -> types.Datum:
    arrays = {"target_tokens": np.array(tokens[1:]), **inputs}
    return types.Datum(types.ModelInput.from_ints(tokens[:-1]), arrays)


def weighted(tokens: list[int], weight: float = 1.0) -> types.Datum:
    return datum(tokens, weights=np.full(len(tokens) - 1, weight, np.float32))


def logprobs_of(client: tinsmith.TrainingClient) -> np.ndarray:
    result = client.forward([weighted(s) for s in SEQUENCES], "cross_entropy").result()
    return np.concatenate([np.asarray(o["logprobs"]) for o in result.loss_fn_outputs])


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo"])
def test_own_logprobs_give_minus_the_sum_of_advantages(
    service: tinsmith.ServiceClient, loss: types.LossFnType
) -> None:
    """At ratio 1, `loss:sum` is -sum(advantages)."""
    client = new_model(service)
    own = client.forward([weighted(s) for s in SEQUENCES], "cross_entropy").result()
    rng = np.random.default_rng(0)
    data, expected = [], 0.0
    for tokens, output in zip(SEQUENCES, own.loss_fn_outputs, strict=True):
        advantages = rng.normal(size=len(tokens) - 1).astype(np.float32)
        expected -= float(advantages.astype(np.float64).sum())
        data.append(datum(tokens, logprobs=output["logprobs"], advantages=advantages))
    result = client.forward_backward(data, loss).result()
    assert result.metrics["loss:sum"] == pytest.approx(expected, abs=1e-5)


def test_a_then_b_then_a_step_is_a_and_b_then_a_step(service: tinsmith.ServiceClient) -> None:
    """Gradients accumulate over calls: norm and logprobs to 1e-5."""
    data = [weighted(s) for s in SEQUENCES]
    two, one = new_model(service), new_model(service)
    two.forward_backward(data[:1], "cross_entropy")
    two.forward_backward(data[1:], "cross_entropy")
    one.forward_backward(data, "cross_entropy")
    norms = [c.optim_step(ADAM).result().metrics["grad_norm:last"] for c in (two, one)]  # type: ignore[index]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    np.testing.assert_allclose(logprobs_of(two), logprobs_of(one), atol=1e-5)


def test_cross_entropy_as_a_custom_loss_is_the_built_in_one(
    service: tinsmith.ServiceClient,
) -> None:
    """Same loss, same logprobs, same weights after the step."""
    data = [weighted(s, 0.5 + i) for i, s in enumerate(SEQUENCES)]

    def cross_entropy(data: list[types.Datum], logprobs: list[torch.Tensor]) -> Any:
        parts = [
            -(lp * d.loss_fn_inputs["weights"].to_torch()).sum()
            for d, lp in zip(data, logprobs, strict=True)
        ]
        return torch.stack(parts).sum(), {}

    custom, built_in = new_model(service), new_model(service)
    ours = custom.forward_backward_custom(data, cross_entropy).result()
    theirs = built_in.forward_backward(data, "cross_entropy").result()
    assert ours.metrics["loss:sum"] == pytest.approx(theirs.metrics["loss:sum"], rel=1e-6)
    for client in (custom, built_in):
        client.optim_step(ADAM)
    np.testing.assert_array_equal(logprobs_of(custom), logprobs_of(built_in))


def test_learning_rate_zero_changes_nothing(service: tinsmith.ServiceClient) -> None:
    """Logprobs stay bit for bit."""
    client = new_model(service)
    before = logprobs_of(client)
    client.forward_backward([weighted(s) for s in SEQUENCES], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=0.0))
    np.testing.assert_array_equal(before, logprobs_of(client))


@pytest.mark.parametrize("case", FORMULAS)
def test_each_loss_is_its_formula_and_its_finite_differences(
    service: tinsmith.ServiceClient, case: str
) -> None:
    """`loss:sum` is the formula in float64; a step on it is the step on a cross-entropy whose
    weights are the formula's central differences."""
    name, config = case.split(":")[0], dict(FORMULAS[case].config)
    formula: Callable[..., float] = FORMULAS[case].loss
    own = new_model(service).forward([weighted(s) for s in SEQUENCES], "cross_entropy").result()
    data, surrogate, expected = [], [], 0.0
    for index, (tokens, output) in enumerate(zip(SEQUENCES, own.loss_fn_outputs, strict=True)):
        lp = np.asarray(output["logprobs"], np.float64)
        inputs = make_inputs(lp, seed=index)
        used = {k: v.astype(np.float32) for k, v in inputs.items() if k in FORMULAS[case].inputs}
        exact = {k: v.astype(np.float64) for k, v in used.items()}
        expected += formula(lp, lp, exact)
        slopes = np.zeros_like(lp)
        for i in range(len(lp)):
            up, down = lp.copy(), lp.copy()
            up[i] += 1e-6
            down[i] -= 1e-6
            slopes[i] = (formula(up, lp, exact) - formula(down, lp, exact)) / 2e-6
        data.append(datum(tokens, **used))
        surrogate.append(datum(tokens, weights=(-slopes).astype(np.float32)))
    built_in, by_differences = new_model(service), new_model(service)
    result = built_in.forward_backward(data, name, config).result()  # type: ignore[arg-type]
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    by_differences.forward_backward(surrogate, "cross_entropy")
    norms = [
        c.optim_step(ADAM).result().metrics["grad_norm:last"] for c in (built_in, by_differences)
    ]  # type: ignore[index]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    np.testing.assert_allclose(logprobs_of(built_in), logprobs_of(by_differences), atol=2e-5)


def test_the_same_seed_gives_the_same_sample_whatever_else_runs(
    service: tinsmith.ServiceClient,
) -> None:
    """Alone and beside 12 others on base model and adapter: tokens and logprobs bit for bit."""
    trainer = new_model(service)
    trainer.forward_backward([weighted(s) for s in SEQUENCES], "cross_entropy")
    trainer.optim_step(types.AdamParams(learning_rate=3e-2))
    tuned = trainer.save_weights_and_get_sampling_client().result()
    base = service.create_sampling_client(base_model=tuned.get_base_model()).result()
    params = types.SamplingParams(max_tokens=20, seed=11, temperature=0.9, stop=[])
    prompt = types.ModelInput.from_ints([1, 2, 3])

    def seen(response: types.SampleResponse) -> Any:
        return [(s.tokens, s.logprobs, s.stop_reason) for s in response.sequences]

    alone = [seen(c.sample(prompt, 3, params).result()) for c in (base, tuned)]
    assert alone[0] != alone[1]
    others = [
        client.sample(types.ModelInput.from_ints([n + 5] * (n + 1)), 2, types.SamplingParams(40))
        for n in range(6)
        for client in (base, tuned)
    ]
    together = [c.sample(prompt, 3, params) for c in (base, tuned)]
    assert [seen(future.result()) for future in together] == alone
    for other in others:
        other.result()


# --- on real weights --------------------------------------------------------------------------

TEXTS = ["The capital of France is Paris.", "Tin melts at 232 degrees, which is not very hot."]


@pytest.fixture(scope="module")
def trained(real_cluster: RunningCluster) -> tuple[tinsmith.TrainingClient, str, list[list[int]]]:
    """A model on SmolLM2 after two steps, its sampler checkpoint, and some tokens."""
    service = tinsmith.ServiceClient(base_url=real_cluster.address)
    client = new_model(service, train_unembed=False)
    tokenizer = client.get_tokenizer()
    sequences = [tokenizer.encode(text) for text in TEXTS]
    for _ in range(2):
        client.forward_backward([weighted(s) for s in sequences], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-3))
    path = client.save_weights_for_sampler("trained").result().path
    return client, path, sequences


def sampler_logprobs(
    trained: tuple[tinsmith.TrainingClient, str, list[list[int]]],
) -> list[np.ndarray]:
    client, path, sequences = trained
    sampler = client.create_sampling_client(path).result()
    found = [sampler.compute_logprobs(types.ModelInput.from_ints(s)).result() for s in sequences]
    assert all(scores[0] is None for scores in found)
    return [np.array(scores[1:], np.float32) for scores in found]


def test_sampler_and_trainer_agree_on_real_weights(
    trained: tuple[tinsmith.TrainingClient, str, list[list[int]]],
) -> None:
    """Logprobs of the same tokens differ by at most 1e-4 in float32."""
    client, _, sequences = trained
    result = client.forward([weighted(s) for s in sequences], "cross_entropy").result()
    for found, output in zip(sampler_logprobs(trained), result.loss_fn_outputs, strict=True):
        np.testing.assert_allclose(found, np.asarray(output["logprobs"]), atol=1e-4)


def test_plain_transformers_and_peft_agree_with_the_sampler_on_real_weights(
    trained: tuple[tinsmith.TrainingClient, str, list[list[int]]], real_model: Path, tmp_path: Path
) -> None:
    """The downloaded adapter folder gives the Sampler's logprobs to 1e-4."""
    client, path, sequences = trained
    rest = tinsmith.RestClient(client._connection)
    rest.download_checkpoint(path, tmp_path / "adapter").result()
    base = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    before = [own_logprobs(base, s) for s in sequences]
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for tokens, found, untrained in zip(sequences, sampler_logprobs(trained), before, strict=True):
        np.testing.assert_allclose(found, own_logprobs(model, tokens), atol=1e-4)
        assert np.abs(found - untrained).max() > 1e-2


def own_logprobs(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        table = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return np.array([float(table[i, token]) for i, token in enumerate(tokens[1:])])


async def test_calls_from_coroutines_are_pipelined(service: tinsmith.ServiceClient) -> None:
    """Sent in order before any is answered; awaiting twice, as Tinker's `_async` names do."""
    client = new_model(service)
    data = [weighted(s) for s in SEQUENCES]
    futures = [await client.forward_backward_async(data, "cross_entropy") for _ in range(3)]
    step = await client.optim_step_async(ADAM)
    results = await asyncio.gather(*futures)
    assert len({r.metrics["loss:sum"] for r in results}) == 1
    assert (await step).metrics["step:last"] == 1
