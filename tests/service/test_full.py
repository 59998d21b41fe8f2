"""Full fine-tuning through the wire: one model that trains all weights, on a whole cluster."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tinsmith
from clusters import RunningCluster
from tinsmith import AdamParams, Datum, ModelInput, SamplingParams
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster
from tiny_models import write_tiny_model
from tokenizers_for_tests import write_llama2_tokenizer
from wire import reason_and_field

TOKENS = [5, 6, 7, 8, 9]
ADAM = AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer's files transformers 4 wrote."""
    folder = write_tiny_model(tmp_path_factory.mktemp("base") / "tiny-llama-2")
    write_llama2_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def own_cluster(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """A cluster without other models, which would be suspended for a full one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_TRAINING_SUSPEND_IDLE_S", "0")
        with RunningCluster(base, tmp_path_factory.mktemp("full")) as running:
            yield running


@pytest.fixture
def service(own_cluster: RunningCluster) -> tinsmith.ServiceClient:
    """A way into it."""
    return tinsmith.ServiceClient(base_url=own_cluster.address)


@pytest.fixture
def stubs(own_cluster: RunningCluster) -> Iterator[Cluster]:
    """Its stubs; every model is deleted afterwards."""
    with Cluster(own_cluster.address) as cluster:
        yield cluster
        for model in cluster.training.ListModels(pb.ListModelsRequest()).models:
            cluster.training.DeleteModel(pb.DeleteModelRequest(model_id=model.model_id))


@pytest.fixture
def trainer(
    stubs: Cluster, service: tinsmith.ServiceClient, own_cluster: RunningCluster
) -> tinsmith.TrainingClient:
    """A full model."""
    return service.create_full_training_client(own_cluster.base_model).result()


def example() -> list[Datum]:
    inputs = {"target_tokens": np.array(TOKENS[1:]), "weights": np.ones(len(TOKENS) - 1)}
    return [Datum(ModelInput.from_ints(TOKENS[:-1]), inputs)]


def logprobs_of(trainer: tinsmith.TrainingClient) -> np.ndarray:
    result = trainer.forward(example(), "cross_entropy").result()
    return result.loss_fn_outputs[0]["logprobs"].to_numpy()


def train(trainer: tinsmith.TrainingClient, steps: int = 3) -> None:
    for _ in range(steps):
        trainer.forward_backward(example(), "cross_entropy")
        trainer.optim_step(ADAM).result()


def create(stubs: Cluster, **fields: object) -> pb.Model:
    return stubs.training.CreateModel(pb.CreateModelRequest(**fields)).model  # type: ignore[arg-type]


def test_a_downloaded_full_model_loads_in_transformers(
    service: tinsmith.ServiceClient,
    trainer: tinsmith.TrainingClient,
    base: Path,
    tmp_path: Path,
) -> None:
    """Train, save, download: plain transformers gives the service's logprobs, and the tokenizer's
    files are those of the base, byte for byte."""
    before = logprobs_of(trainer)
    train(trainer)
    expected = logprobs_of(trainer)
    assert expected.sum() > before.sum() + 1
    rest = service.create_rest_client()
    for save in (trainer.save_state, trainer.save_weights_for_sampler):
        path = save("done").result().path
        folder = rest.download_checkpoint(path, tmp_path / save.__name__).result()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits = model(torch.tensor([TOKENS[:-1]])).logits[0].log_softmax(-1)
        found = logits.gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0].detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
        tokenizers = [AutoTokenizer.from_pretrained(f) for f in (folder, base)]
        assert len({str(t("one two").input_ids) for t in tokenizers}) == 1
        names = {path.name for path in base.iterdir() if "token" in path.name}
        assert names == {path.name for path in folder.iterdir() if "token" in path.name}
        for name in names:
            assert (folder / name).read_bytes() == (base / name).read_bytes(), name
        info = rest.get_weights_info_by_tinker_path(path).result()
        assert (info.is_lora, info.lora_rank) == (False, None)
    assert not trainer.get_info().is_lora
    runs = rest.list_training_runs().result().training_runs
    assert [run.is_lora for run in runs if run.training_run_id == trainer.model_id] == [False]


def test_a_full_checkpoint_continues_bit_identically(
    service: tinsmith.ServiceClient, stubs: Cluster, trainer: tinsmith.TrainingClient
) -> None:
    """Loaded back, and in a new model after the first was deleted: the same next steps."""
    train(trainer, 2)
    path = trainer.save_state("middle").result().path
    train(trainer, 2)
    expected = logprobs_of(trainer)
    trainer.load_state_with_optimizer(path).result()
    train(trainer, 2)
    np.testing.assert_array_equal(logprobs_of(trainer), expected)
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=trainer.model_id))
    again = service.create_training_client_from_state_with_optimizer(path).result()
    assert not again.get_info().is_lora
    train(again, 2)
    np.testing.assert_array_equal(logprobs_of(again), expected)


def test_a_full_model_and_another_take_turns_at_the_ranks(stubs: Cluster) -> None:
    """Whoever is called is there, alone where one of them trains all weights; nobody is refused."""
    full, lora = {"full_config": pb.FullConfig()}, {"lora_config": pb.LoraConfig(rank=2)}
    for first, second in ((full, lora), (lora, full), (full, full)):
        models = [create(stubs, **first), create(stubs, **second)]
        assert models[0].WhichOneof("tuning") == next(iter(first))
        for model in models:
            step = stubs.training.OptimStep(pb.OptimStepRequest(model_id=model.model_id, seq_id=1))
            assert step.metrics["step:last"] == 1
        listed = stubs.training.ListModels(pb.ListModelsRequest()).models
        states = [model.state for model in listed]  # newest first
        suspended, ready = pb.ModelState.MODEL_STATE_SUSPENDED, pb.ModelState.MODEL_STATE_READY
        assert states == [ready, suspended]
        for model in models:
            stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=model.model_id))


def test_an_adapter_after_a_full_model_starts_from_the_base(
    stubs: Cluster, service: tinsmith.ServiceClient, own_cluster: RunningCluster
) -> None:
    """What the full model changed is gone with it."""

    def adapter() -> np.ndarray:
        made = service.create_lora_training_client(own_cluster.base_model, rank=2, seed=3)
        found = logprobs_of(made.result())
        stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=made.result().model_id))
        return found

    before = adapter()
    full = service.create_full_training_client(own_cluster.base_model).result()
    train(full)
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=full.model_id))
    np.testing.assert_array_equal(adapter(), before)


def test_a_checkpoint_of_the_other_kind_is_not_loaded(
    stubs: Cluster,
    service: tinsmith.ServiceClient,
    own_cluster: RunningCluster,
    trainer: tinsmith.TrainingClient,
) -> None:
    """An adapter into a full model and the other way: typed error, the model is as before."""
    full_path = trainer.save_state("full").result().path
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=trainer.model_id))
    lora = service.create_lora_training_client(own_cluster.base_model, rank=2, seed=3).result()
    before = logprobs_of(lora)
    with pytest.raises(tinsmith.FailedPreconditionError) as refusal:
        lora.load_state(full_path).result()
    assert refusal.value.reason == "INCOMPATIBLE_CHECKPOINT"
    np.testing.assert_array_equal(logprobs_of(lora), before)
    lora_path = lora.save_state("lora").result().path
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=lora.model_id))
    again = service.create_full_training_client(own_cluster.base_model).result()
    with pytest.raises(tinsmith.FailedPreconditionError) as refusal:
        again.load_state(lora_path).result()
    assert refusal.value.reason == "INCOMPATIBLE_CHECKPOINT"


def test_the_sampler_refuses_a_full_checkpoint(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient
) -> None:
    """Typed and at once; the shortcut saves nothing."""
    path = trainer.save_weights_for_sampler("full").result().path
    sampler = service.create_sampling_client(model_path=path).result()
    with pytest.raises(tinsmith.FailedPreconditionError, match="export") as refusal:
        sampler.sample(ModelInput.from_ints(TOKENS), 1, SamplingParams(max_tokens=2)).result()
    assert refusal.value.reason == "INCOMPATIBLE_CHECKPOINT"
    with pytest.raises(tinsmith.UnimplementedError):
        trainer.save_weights_and_get_sampling_client()
    assert trainer.save_state("next").result().path  # no number is missing


def test_an_archive_of_the_other_format_is_refused(
    stubs: Cluster, trainer: tinsmith.TrainingClient
) -> None:
    """PEFT of a full checkpoint: the field and the right format are named."""
    path = trainer.save_state("formats").result().path
    request = pb.ExportCheckpointRequest(
        checkpoint_path=path, format=pb.ExportFormat.EXPORT_FORMAT_PEFT_TAR
    )
    with pytest.raises(grpc.RpcError, match="EXPORT_FORMAT_HF_TAR") as refusal:
        list(stubs.checkpoint.ExportCheckpoint(request))
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_and_field(refusal.value)[1] == "format"


def test_a_full_config_beside_a_checkpoint_is_refused(stubs: Cluster) -> None:
    """The checkpoint says what it is."""
    with pytest.raises(grpc.RpcError) as refusal:
        create(stubs, full_config=pb.FullConfig(), checkpoint_path="tinsmith://m/weights/a")
    assert reason_and_field(refusal.value)[1] == "full_config"
