"""Every Python example of Tinker's documents, as written there, against a real cluster.

What an example leaves to its surroundings (`data`, `remove_mask`, a client) is supplied here.
"""

from typing import List  # noqa: UP035  # as the document writes it

import numpy as np
import pytest
import torch

import tinsmith as tinker
from clusters import RunningCluster
from tinsmith import Datum


@pytest.fixture
def training_client(cluster: RunningCluster) -> tinker.TrainingClient:
    """A client for a small model."""
    service_client = tinker.ServiceClient(base_url=cluster.address)
    return service_client.create_lora_training_client(cluster.base_model, rank=4).result()


@pytest.fixture
def data() -> list[Datum]:
    """Two sequences with torch targets."""
    return [
        Datum(
            model_input=tinker.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": torch.tensor(tokens[1:])},
        )
        for tokens in ([5, 6, 7, 8], [9, 10, 11])
    ]


# --- losses.mdx: forward_backward, from the Cookbook's rl/train.py ------------------------------


def remove_mask(datum: tinker.Datum) -> tinker.Datum:
    """The Cookbook's helper: the mask is not an input of the loss."""
    inputs = {key: value for key, value in datum.loss_fn_inputs.items() if key != "mask"}
    return tinker.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)


async def forward_backward(
    training_client: tinker.TrainingClient,
    batch_d: List[tinker.Datum],  # noqa: UP006
) -> List[torch.Tensor]:  # noqa: UP006
    """Accumulate gradients on a minibatch of data"""
    fwd_bwd_future = await training_client.forward_backward_async(
        list(map(remove_mask, batch_d)), loss_fn="importance_sampling"
    )
    fwd_bwd_result = await fwd_bwd_future.result_async()

    # Extract training logprobs from loss_fn_outputs
    training_logprobs_D: list[torch.Tensor] = []
    for output in fwd_bwd_result.loss_fn_outputs:
        training_logprobs = output["logprobs"].to_torch()
        training_logprobs_D.append(training_logprobs)

    return training_logprobs_D


async def test_forward_backward_example(
    training_client: tinker.TrainingClient, data: list[Datum]
) -> None:
    """The Cookbook's coroutine returns one tensor of logprobs per datum."""
    batch = [
        Datum(
            datum.model_input,
            {
                **datum.loss_fn_inputs,
                "logprobs": torch.full((datum.model_input.length,), -5.0),
                "advantages": torch.ones(datum.model_input.length),
                "mask": torch.ones(datum.model_input.length),
            },
        )
        for datum in data
    ]
    logprobs = await forward_backward(training_client, batch)
    assert [type(tensor) for tensor in logprobs] == [torch.Tensor, torch.Tensor]
    assert [tensor.shape for tensor in logprobs] == [(3,), (2,)]
    assert all((tensor < 0).all() for tensor in logprobs)


# --- losses.mdx: forward_backward_custom ------------------------------------------------------


def logprob_squared_loss(
    data: list[Datum], logprobs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    loss = (logprobs**2).sum()
    return loss, {"logprob_squared_loss": loss.item()}


def variance_loss(
    data: list[Datum], logprobs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    flat_logprobs = torch.cat(logprobs)
    variance = torch.var(flat_logprobs)
    return variance, {"variance_loss": variance.item()}


def test_custom_loss_example(training_client: tinker.TrainingClient, data: list[Datum]) -> None:
    """`loss, metrics = ...` as the document writes it, and the gradients really arrive."""
    loss, metrics = training_client.forward_backward_custom(data, logprob_squared_loss)
    assert loss == metrics["loss:sum"] == pytest.approx(metrics["logprob_squared_loss"])
    step = training_client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    assert step.metrics is not None
    assert step.metrics["grad_norm:last"] > 0
    later, _ = training_client.forward_backward_custom(data, logprob_squared_loss)
    assert later < loss


def test_variance_loss_example(training_client: tinker.TrainingClient, data: list[Datum]) -> None:
    """A loss over several sequences at once."""
    result = training_client.forward_backward_custom(data, variance_loss).result()
    logprobs = np.concatenate([np.asarray(o["logprobs"]) for o in result.loss_fn_outputs])
    assert result.metrics["variance_loss"] == pytest.approx(logprobs.var(ddof=1), rel=1e-5)
