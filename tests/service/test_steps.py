"""ListSteps: the optimizer steps of a model, with what was computed for them."""

from typing import Any

import grpc
import pytest

from tinsmith import v1 as pb
from tinsmith.cluster import Cluster
from training_calls import call, forward_backward, step
from wire import reason_and_field


def listed(stubs: Cluster, model_id: str, **fields: Any) -> pb.ListStepsResponse:
    return stubs.training.ListSteps(pb.ListStepsRequest(model_id=model_id, **fields))


def test_each_step_is_listed_with_what_was_computed_for_it(stubs: Cluster, model: pb.Model) -> None:
    """Newest first, in pages; sums over the calls whose gradients it applied, and nothing of those
    that it did not."""
    model_id = model.model_id
    assert listed(stubs, model_id) == pb.ListStepsResponse()
    losses, norms = [], []
    for count in (1, 2, 0):  # calls before each step
        answers = [forward_backward(stubs, call(model_id))[-1] for _ in range(count)]
        losses.append(sum(answer.metrics["loss:sum"] for answer in answers))
        answer = stubs.training.OptimStep(step(model_id, 0, learning_rate=0.01 * (count + 1)))
        norms.append(answer.metrics["grad_norm:last"])
    found = listed(stubs, model_id)
    assert (found.total_size, found.next_page_token) == (3, "")
    assert [each.step_count for each in found.steps] == [3, 2, 1]
    empty, second, first = (dict(each.metrics) for each in found.steps)
    assert (first["loss:sum"], second["loss:sum"]) == pytest.approx(losses[:2], rel=1e-12)
    assert [each["grad_norm:last"] for each in (first, second, empty)] == norms
    rates = [each["learning_rate:last"] for each in (first, second, empty)]
    assert rates == pytest.approx([0.02, 0.03, 0.01])
    assert (second["calls:sum"], second["data:sum"]) == (2, 2)
    assert second["tokens:sum"] == 2 * first["tokens:sum"]
    assert "loss:sum" not in empty
    times = [each.create_time.ToNanoseconds() for each in found.steps]
    assert times == sorted(times, reverse=True)
    page = listed(stubs, model_id, page_size=2)
    rest = listed(stubs, model_id, page_size=2, page_token=page.next_page_token)
    assert [*page.steps, *rest.steps] == list(found.steps)
    assert rest.next_page_token == ""


def test_a_load_is_no_step_and_changes_none(stubs: Cluster, model: pb.Model) -> None:
    """After it the counts are those of the state; a refused step is in no history either."""
    model_id = model.model_id
    save = pb.SaveCheckpointRequest(model_id=model_id, kind=1, name="before")
    path = stubs.training.SaveCheckpoint(save).checkpoint_path
    for seq_id in (1, 2):
        stubs.training.OptimStep(step(model_id, seq_id))
    load = pb.LoadCheckpointRequest(model_id=model_id, seq_id=3, checkpoint_path=path)
    forward_backward(stubs, call(model_id))
    stubs.training.LoadCheckpoint(load)
    with pytest.raises(grpc.RpcError):
        stubs.training.OptimStep(step(model_id, 4, beta1=2.0))
    stubs.training.OptimStep(step(model_id, 5))
    found = listed(stubs, model_id).steps
    assert [(each.seq_id, each.step_count) for each in found] == [(5, 1), (2, 2), (1, 1)]
    assert "loss:sum" not in found[0].metrics


def test_a_model_that_is_not_there_has_no_steps(stubs: Cluster) -> None:
    """Refused by reason; a page that is none by its field."""
    for fields, expected in (
        ({"model_id": "absent"}, ("MODEL_NOT_FOUND", "")),
        ({"model_id": "absent", "page_size": -1}, ("INVALID_FIELD", "page_size")),
        ({"model_id": "absent", "page_token": "x"}, ("INVALID_FIELD", "page_token")),
    ):
        with pytest.raises(grpc.RpcError) as refusal:
            stubs.training.ListSteps(pb.ListStepsRequest(**fields))  # type: ignore[arg-type]
        assert reason_and_field(refusal.value) == expected
