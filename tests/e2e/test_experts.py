"""The default adapter on a model with experts, from its creation to samples."""

from collections.abc import Iterator

import numpy as np
import pytest

from clusters import RunningCluster
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster, connect
from tiny_models import write_tiny_model
from training_calls import TOKENS, call, forward_backward, logprobs, step, tokens_of


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = write_tiny_model(
        *(tmp_path_factory.mktemp("base") / "experts", "qwen3_moe"),
        **{"num_experts": 16, "num_experts_per_tok": 4},
    )
    with (
        RunningCluster(folder, tmp_path_factory.mktemp("data")) as running,
        connect(running.address) as cluster,
    ):
        yield cluster


def test_experts_share_the_rank_and_the_sampler_computes_with_it(stubs: Cluster) -> None:
    """GetModel tells what each expert has; a checkpoint keeps it; the Sampler's numbers are the
    trainer's."""
    (base,) = stubs.capabilities.base_models
    assert base.active_expert_count == 4
    asked = pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=8, seed=7))
    model_id = stubs.training.CreateModel(asked).model.model_id
    told = stubs.training.GetModel(pb.GetModelRequest(model_id=model_id)).model.lora_config
    assert (told.rank, told.expert_rank) == (8, 2)
    for seq_id in (1, 3):
        forward_backward(stubs, call(model_id, seq_id))
        stubs.training.OptimStep(step(model_id, seq_id + 1, learning_rate=1e-2, eps=0.1))
    found = logprobs(stubs, model_id)
    path = stubs.training.SaveCheckpoint(
        pb.SaveCheckpointRequest(
            model_id=model_id, name="s", kind=pb.CheckpointKind.CHECKPOINT_KIND_SAMPLER
        )
    ).checkpoint_path
    again = stubs.training.CreateModel(pb.CreateModelRequest(checkpoint_path=path)).model
    assert again.lora_config.expert_rank == 2
    np.testing.assert_array_equal(logprobs(stubs, again.model_id), found)
    scored = stubs.sampler.ComputeLogprobs(
        pb.ComputeLogprobsRequest(checkpoint_path=path, prompt=tokens_of([*TOKENS, TOKENS[-1] + 1]))
    ).prompt_logprobs
    np.testing.assert_allclose(tensors.decode(scored.logprobs)[1:], found, atol=1e-4)
