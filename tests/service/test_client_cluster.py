"""The Tinker-shaped client against a real cluster."""

import asyncio
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinsmith
from clusters import RunningCluster
from tinsmith import AdamParams, Datum, ModelInput, SamplingParams

TOKENS = [5, 6, 7, 8, 9]
PROMPT = ModelInput.from_ints(TOKENS)


@pytest.fixture
def trainer(service: tinsmith.ServiceClient, cluster: RunningCluster) -> tinsmith.TrainingClient:
    """A fresh model of its own."""
    return service.create_lora_training_client(cluster.base_model, rank=4, seed=1).result()


def example(make: Any = np.asarray) -> list[Datum]:
    inputs = {"target_tokens": make(TOKENS[1:]), "weights": make([1.0] * (len(TOKENS) - 1))}
    return [Datum(ModelInput.from_ints(TOKENS[:-1]), inputs)]


def loss_of(trainer: tinsmith.TrainingClient) -> float:
    return trainer.forward(example(), "cross_entropy").result().metrics["loss:sum"]


def test_results_are_one_type_whatever_was_passed(trainer: tinsmith.TrainingClient) -> None:
    """For numpy, torch and lists; all of them convert, and the numbers are the same."""
    import torch

    arrays = [
        trainer.forward(example(make), "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
        for make in (np.asarray, torch.tensor, lambda values: list(values))
    ]
    for array in arrays:
        assert type(array) is tinsmith.TensorData
        assert array.to_numpy().tolist() == array.to_torch().tolist() == arrays[0].tolist()


def test_missing_weights_are_ones(trainer: tinsmith.TrainingClient) -> None:
    """For cross_entropy; an input that another loss lacks is named, and the model goes on."""
    prompt, targets = ModelInput.from_ints([1, 2]), np.array([2, 3])
    outputs = [
        trainer.forward_backward([Datum(prompt, inputs)], "cross_entropy").result()
        for inputs in (
            {"target_tokens": targets},
            {"target_tokens": targets, "weights": np.ones(2)},
        )
    ]
    assert outputs[0] == outputs[1]
    with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
        trainer.forward_backward([Datum(prompt, {"target_tokens": targets})], "ppo").result()
    assert refusal.value.reason == "MISSING_FIELD"
    assert refusal.value.field in (
        'data[0].loss_fn_inputs["advantages"]',
        'data[0].loss_fn_inputs["logprobs"]',
    )
    assert refusal.value.request_id
    assert loss_of(trainer) > 0


def test_a_client_future_is_the_client(
    service: tinsmith.ServiceClient, cluster: RunningCluster
) -> None:
    """Tinker scripts of both ages work: with and without `.result()`."""
    future = service.create_lora_training_client(cluster.base_model, rank=2)
    assert future.get_info().model_id == future.result().model_id
    assert loss_of(future) == loss_of(future.result())  # type: ignore[arg-type]


def test_a_broken_custom_loss_leaves_the_model_as_it_was(
    trainer: tinsmith.TrainingClient,
) -> None:
    """Nothing is added and no number is missing."""

    def broken(data: Any, logprobs: Any) -> Any:
        raise RuntimeError("mine")

    failed = trainer.forward_backward_custom(example(), broken)
    step = trainer.optim_step(AdamParams(learning_rate=0.1))
    with pytest.raises(RuntimeError, match="mine"):
        failed.result()
    assert step.result().metrics["grad_norm:last"] == 0  # type: ignore[index]


def test_a_custom_loss_equals_the_built_in(
    service: tinsmith.ServiceClient, cluster: RunningCluster
) -> None:
    """-sum(logprobs) by the client's detour takes the step that cross_entropy takes."""

    def negative_sum(data: Any, logprobs: Any) -> Any:
        return -logprobs.sum(), {"n": len(logprobs)}

    losses = []
    for custom in (False, True):
        made = service.create_lora_training_client(cluster.base_model, rank=4, seed=3)
        model = made.result()
        if custom:
            result = model.forward_backward_custom(example(), negative_sum).result()
            assert result.metrics["n"] == 1
            assert result.metrics["surrogate_loss:sum"] == pytest.approx(result.loss)
        else:
            result = model.forward_backward(example(), "cross_entropy").result()
        # A large eps: with a small one Adam would hide a wrong scale.
        model.optim_step(AdamParams(learning_rate=0.1, eps=0.1)).result()
        losses.append((result.metrics["loss:sum"], loss_of(model)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][1] < losses[0][0]


def test_states_are_saved_and_loaded(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient
) -> None:
    """A loaded state gives the loss that was saved; `tinker://` names the same path."""
    trainer.forward_backward(example(), "cross_entropy")
    trainer.optim_step(AdamParams(learning_rate=0.05)).result()
    saved = loss_of(trainer)
    path = trainer.save_state("before").result().path
    trainer.forward_backward(example(), "cross_entropy")
    trainer.optim_step(AdamParams(learning_rate=0.05)).result()
    assert loss_of(trainer) != saved
    trainer.load_state_with_optimizer(path.replace("tinsmith://", "tinker://")).result()
    assert loss_of(trainer) == saved
    other = service.create_training_client_from_state(path).result()
    assert loss_of(other) == saved


def test_sampling_is_repeatable_streams_and_pickles(
    trainer: tinsmith.TrainingClient,
) -> None:
    """One seed, three ways to ask, the same tokens."""
    sampler = trainer.save_weights_and_get_sampling_client().result()
    params = SamplingParams(max_tokens=6, seed=7, stop=[])
    first = sampler.sample(PROMPT, 2, params).result()
    assert [len(s.tokens) for s in first.sequences] == [6, 6]
    again = pickle.loads(pickle.dumps(sampler)).sample(PROMPT, 2, params).result()
    streamed: list[list[int]] = [[], []]
    for part in sampler.sample_stream(PROMPT, 2, params):
        streamed[part.sequence_index].extend(part.tokens)
    tokens = [s.tokens for s in first.sequences]
    assert tokens == [s.tokens for s in again.sequences] == streamed


def test_a_sampling_client_never_changes_under_its_user(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient
) -> None:
    """Its name is given to other weights: it and a pickled copy go on with theirs, or are refused;
    a client that is opened later has the new ones."""

    def save() -> str:
        trainer.forward_backward(example(), "cross_entropy").result()
        trainer.optim_step(AdamParams(learning_rate=0.3)).result()
        return trainer.save_weights_for_sampler("best", overwrite=True).result().path

    def scores(client: tinsmith.SamplingClient) -> list[float | None]:
        return client.compute_logprobs(PROMPT).result()

    used = service.create_sampling_client(save()).result()
    first = scores(used)
    save()
    second = trainer.forward(example(), "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    unused = service.create_sampling_client(used.model_path).result()
    newest = service.create_sampling_client(save()).result()
    assert scores(used) == scores(pickle.loads(pickle.dumps(used))) == first
    assert scores(newest) != first
    try:
        found: object = scores(unused)[1:]  # the Sampler has them if it was told in time
    except tinsmith.FailedPreconditionError as refusal:
        found = refusal.reason
    assert found in ("CHECKPOINT_REPLACED", pytest.approx(list(second), abs=1e-4))
    parts = list(used.sample_stream(PROMPT, 1, SamplingParams(max_tokens=3, seed=1)))
    again = used.sample(PROMPT, 1, SamplingParams(max_tokens=3, seed=1)).result()
    assert [t for part in parts for t in part.tokens] == list(again.sequences[0].tokens)


def test_prompt_logprobs_are_those_of_training(trainer: tinsmith.TrainingClient) -> None:
    """compute_logprobs, sample and forward score the same tokens alike."""
    sampler = trainer.save_weights_and_get_sampling_client().result()
    scored = sampler.compute_logprobs(PROMPT).result()
    assert scored[0] is None
    trained = trainer.forward(example(), "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    assert scored[1:] == pytest.approx(list(trained), abs=1e-4)
    response = sampler.sample(
        PROMPT, 1, SamplingParams(max_tokens=1), include_prompt_logprobs=True
    ).result()
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[1:] == pytest.approx(scored[1:], abs=1e-5)


def test_checkpoints_are_looked_after_and_downloaded(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient, tmp_path: Path
) -> None:
    """List, inspect, copy, expire, download, delete."""
    rest = service.create_rest_client()
    path = trainer.save_weights_for_sampler("kept", user_metadata={"k": "v"}).result().path
    [found] = rest.list_checkpoints(trainer.model_id).result().checkpoints
    assert (found.tinker_path, found.user_metadata) == (path, {"k": "v"})
    assert found.time.tzinfo is not None
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    copy = rest.copy_weights(path).result()
    folder = rest.download_checkpoint(path, tmp_path / "adapter").result()
    names = {file.name for file in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinsmith.NotFoundError):
        rest.get_weights_info_by_tinker_path(path).result()
    left = rest.list_checkpoints(trainer.model_id).result().checkpoints
    assert [c.tinker_path for c in left] == [copy]
    assert left[0].checkpoint_type == "sampler"


def test_the_tokenizer_is_the_base_models(trainer: tinsmith.TrainingClient) -> None:
    """It arrives over the wire and goes there and back."""
    tokenizer = trainer.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("hello", add_special_tokens=False)) == "hello"


def test_one_client_works_in_several_event_loops(
    trainer: tinsmith.TrainingClient,
) -> None:
    """Futures belong to no loop; `_async` twins of training give futures."""

    async def step() -> float:
        future = await trainer.forward_backward_async(example(), "cross_entropy")  # type: ignore[attr-defined]
        return (await future).metrics["loss:sum"]

    assert asyncio.run(step()) == asyncio.run(step())


# --- more than one client, more than 1,024 data ---------------------------------------------------


def test_a_call_of_many_data_is_one_call_and_sums_are_equal(
    service: tinsmith.ServiceClient, cluster: RunningCluster
) -> None:
    """3,000 data at once give the sum, the outputs and the step of three calls of 1,000."""
    rng = np.random.default_rng(1)
    data = [
        Datum(
            ModelInput.from_ints(rng.integers(0, 250, 2)),
            {"target_tokens": rng.integers(0, 250, 2), "weights": rng.normal(size=2)},
        )
        for _ in range(3000)
    ]
    sums, outputs, norms = [], [], []
    for size in (3000, 1000):
        made = service.create_lora_training_client(cluster.base_model, rank=2, seed=4)
        with made.result() as model:
            parts = [data[start : start + size] for start in range(0, len(data), size)]
            results = [model.forward_backward(part, "cross_entropy").result() for part in parts]
            sums.append(sum(result.loss for result in results))
            outputs.append([out["logprobs"] for r in results for out in r.loss_fn_outputs])
            norms.append(model.optim_step(AdamParams()).result().metrics["grad_norm:last"])  # type: ignore[index]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    np.testing.assert_allclose(np.stack(outputs[0]), np.stack(outputs[1]), atol=1e-5)


def test_arrays_of_any_dtype_give_the_same_numbers(trainer: tinsmith.TrainingClient) -> None:
    """Masks as weights, unsigned targets, lists: what arrives is the same."""
    import torch

    targets, weights = TOKENS[1:], [1, 0, 1, 1]
    forms: list[tuple[Any, Any]] = [
        (targets, weights),
        (np.array(targets, np.uint16), np.array(weights, bool)),
        (np.array(targets, np.uint32), np.array(weights, np.int64)),
        (torch.tensor(targets, dtype=torch.int32), torch.tensor(weights, dtype=torch.bool)),
    ]
    losses = set()
    for target, weight in forms:
        inputs = {"target_tokens": target, "weights": weight}
        datum = Datum(ModelInput.from_ints(np.array(TOKENS[:-1], np.uint8)), inputs)
        losses.add(trainer.forward([datum], "cross_entropy").result().loss)
    assert len(losses) == 1


def test_a_client_attaches_to_a_model_and_the_one_before_hears_of_it(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient
) -> None:
    """It goes on after the last call, with the state that is there; nobody's call is taken for
    another's."""
    trainer.forward_backward(example(), "cross_entropy")
    trainer.optim_step(AdamParams(learning_rate=0.05))
    trained = loss_of(trainer)
    other = service.get_training_client(trainer.model_id).result()
    assert other.get_info() == trainer.get_info()
    assert loss_of(other) == trained
    # The same content as the new client's next call: without the mark between them it would be
    # taken for a repeat, and one of the two steps would silently not be made.
    step = AdamParams(learning_rate=0.0)
    with pytest.raises(tinsmith.FailedPreconditionError, match="another client") as refusal:
        trainer.optim_step(step).result()
    assert refusal.value.reason == "SEQ_ID_CONFLICT"
    steps = other.optim_step(step).result().metrics
    assert steps is not None
    assert steps["step:last"] == 2
    with pytest.raises(tinsmith.FailedPreconditionError):
        trainer.forward(example(), "cross_entropy").result()
    again = service.get_training_client(trainer.model_id).result()
    assert loss_of(again) == trained
    with pytest.raises(tinsmith.NotFoundError):
        service.get_training_client("no-such-model").result()


def test_a_client_attaches_where_another_one_left_a_gap(
    service: tinsmith.ServiceClient,
    trainer: tinsmith.TrainingClient,
    stubs: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A script died with a call sent and the one before it not: that model is not lost."""
    from tinsmith import _lane
    from tinsmith import v1 as pb

    monkeypatch.setattr(_lane, "STILL_S_MAX", 0.5)
    before = loss_of(trainer)  # number 1
    request = pb.OptimStepRequest(
        model_id=trainer.model_id, seq_id=3, adam_params=pb.AdamParams(learning_rate=0.0)
    )
    orphan = stubs.training.OptimStep.future(request)
    while not stubs.training.GetModel(
        pb.GetModelRequest(model_id=trainer.model_id)
    ).model.pending_calls:
        pass
    other = service.get_training_client(trainer.model_id).result()
    assert loss_of(other) == before
    assert orphan.result(60).metrics["step:last"] == 1


def test_a_bad_argument_costs_a_real_model_nothing(trainer: tinsmith.TrainingClient) -> None:
    """Neither its number nor its time."""
    before = loss_of(trainer)
    for bad in (10, "\ud800", b"name", None):
        with pytest.raises(tinsmith.InvalidArgumentError):
            trainer.save_state(bad)  # type: ignore[arg-type]

    def broken(data: Any, logprobs: Any) -> Any:
        raise StopIteration

    failed = trainer.forward_backward_custom(example(), broken)
    assert loss_of(trainer) == before
    with pytest.raises(RuntimeError):
        failed.result()
